"""What the runs of a comparison amount to: intervals over seeds, paired differences, corrected p-values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .curves import AXES, Curves, observed_ranges, quantity_values
from .running import Outcome
from .seed_statistics import Interval, PairedTest, holm, mean_interval, paired_test
from .variants import Contrast, Variant


if TYPE_CHECKING:
    import pandas as pd

# A difference counts if its p-value, after Holm's correction, is below this.
SIGNIFICANT = 0.05
# With fewer seeds than this, the verdict says how little can be seen.
FEW_SEEDS = 5


@dataclass
class RunResult:
    """
    One run's numbers.

    Args:
        outcome ([`Outcome`]): How it ended.
        curves ([`Curves`] or `None`): What it logged; `None` if it failed.
        values (`dict`): `{axis: {"final" | "area": {quantity: value}}}`; empty if it failed.
        gained (`bool`): Whether its normalized sum ended above where it began.
    """

    outcome: Outcome
    curves: Curves | None
    values: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    gained: bool = False


@dataclass(frozen=True)
class Comparison:
    """One paired difference: `variant` minus `against` in a quantity, with Holm's correction within its family."""

    label: str
    variant: str
    against: str
    axis: str
    kind: str
    quantity: str
    test: PairedTest
    p_holm: float

    def to_dict(self) -> dict[str, Any]:
        """Plain strings and numbers."""
        interval = self.test.difference
        return {
            "effect": self.label,
            **{key: getattr(self, key) for key in ("variant", "against", "axis", "kind", "quantity")},
            "pairs": interval.count,
            "difference": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "p_t": self.test.p_t,
            "p_sign_flip": self.test.p_sign_flip,
            "p_holm": self.p_holm,
        }


@dataclass
class Results:
    """
    A whole comparison.

    Args:
        variants (`list` of [`Variant`]): In the order of the tables.
        baseline (`str`): Name of the variant that the others are compared with.
        runs (`dict[str, list[RunResult]]`): Runs per variant, in the order of `seeds`.
        seeds (`list[int]`): Seeds.
        quantities (`list[str]`): Rewards, `"sum"` and `"worst"`.
        weights (`dict[str, float]`): Weight of each reward, of which `sum` and `worst` use the sign.
        ranges (`dict[str, tuple[float, float]]`): What the normalized rewards refer to.
        budgets (`dict[str, float]`): Per axis, what every finished run has spent.
        final_share (`float`): Share of a budget, at its end, over which final values are averaged; 0 takes the end.
        tables (`dict[tuple[str, str], list[Comparison]]`): Differences to the baseline, per axis and kind.
        contrasts (`list[Comparison]`): Differences between variants that differ in one thing.
        report (`str`): The report in markdown.
        learning_rates (`dict[str, float]`): Learning rate of each variant, where each got its own.
        folder (`Path`, *optional*), written (`list[str]`): Where the report is, and the names of its files.
        notes (`list[str]`): What else is to be known.
    """

    variants: list[Variant]
    baseline: str
    runs: dict[str, list[RunResult]]
    seeds: list[int]
    quantities: list[str]
    weights: dict[str, float]
    ranges: dict[str, tuple[float, float]]
    budgets: dict[str, float]
    final_share: float
    tables: dict[tuple[str, str], list[Comparison]]
    contrasts: list[Comparison]
    report: str = ""
    learning_rates: dict[str, float] = field(default_factory=dict)
    folder: Path | None = None
    written: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def interval(self, variant: str, axis: str, kind: str, quantity: str) -> Interval:
        """Mean over the finished seeds of `variant`."""
        return mean_interval([run.values[axis][kind][quantity] for run in self.runs[variant] if run.curves])

    def curves(self, variant: str) -> list[Curves]:
        """What the finished runs of `variant` logged."""
        return [run.curves for run in self.runs[variant] if run.curves is not None]

    @property
    def finished(self) -> bool:
        """Whether any run finished."""
        return any(map(self.curves, self.runs))

    @property
    def failures(self) -> list[RunResult]:
        return [run for runs in self.runs.values() for run in runs if run.curves is None]

    @property
    def verdict(self) -> str:
        """Which methods differ from the baseline in their final values, in a sentence or two."""
        total, failed = len(self.variants) * len(self.seeds), len(self.failures)
        if failed == total:
            return f"All {total} runs failed: {self.failures[0].outcome.failure}"
        lost = f" Runs that failed and are left out: {failed} of {total}." if failed else ""
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        rows = self.tables["steps", "final"]
        if not rows:
            return f"There is one method, {self.baseline}, and nothing to compare it with.{lost}"
        pairs = max(row.test.difference.count for row in rows)
        if pairs < 2:
            return f"One seed cannot tell a difference from noise: train more of them.{lost}"
        different = [row for row in rows if row.p_holm < SIGNIFICANT]
        if not different:
            few = " Only a large difference would show with so few." if len(self.seeds) < FEW_SEEDS else ""
            return f"No method differs from {self.baseline} with {seeds}.{few}{lost}"
        parts = []
        for name in dict.fromkeys(row.variant for row in different):
            changes = [
                f"{row.quantity} {'higher' if row.test.difference.mean > 0 else 'lower'} "
                f"({row.test.difference.mean:+.3g})"
                for row in different
                if row.variant == name
            ]
            parts.append(f"{name}: {', '.join(changes)}")
        return f"Different from {self.baseline} at the end of training, with {seeds}: {'; '.join(parts)}.{lost}"

    def to_frame(self) -> "pd.DataFrame":
        """
        Final values, their differences to the baseline and the tests, one row per method and quantity.

        Columns: `method`, `quantity`, `mean`, `low`, `high`, `difference`, `difference_low`, `difference_high`, `p`
        (t-test), `p_holm`, `seeds`. Bounds are those of the 95 % intervals.
        """
        import pandas as pd

        tests = {(row.variant, row.quantity): row.to_dict() for row in self.tables["steps", "final"]}
        lines = []
        for variant, quantity in product([variant.name for variant in self.variants], self.quantities):
            interval, test = self.interval(variant, "steps", "final", quantity), tests.get((variant, quantity), {})
            line = {"method": variant, "quantity": quantity}
            line |= {"mean": interval.mean, "low": interval.low, "high": interval.high}
            line |= {
                column: test.get(key, math.nan)
                for column, key in {
                    "difference": "difference",
                    "difference_low": "low",
                    "difference_high": "high",
                    "p": "p_t",
                    "p_holm": "p_holm",
                }.items()
            }
            lines.append(line | {"seeds": interval.count})
        return pd.DataFrame(lines)

    def _repr_markdown_(self) -> str:
        return self.report or self.verdict


def evaluate(
    outcomes: dict[str, list[tuple[Outcome, Curves | None]]],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    *,
    baseline: str,
    weights: dict[str, float],
    ranges: dict[str, tuple[float, float]],
    contrasts: Sequence[Contrast] = (),
) -> Results:
    """
    Compare runs, of which `outcomes` has per variant, for every seed, how it ended and what it logged.

    A reward of weight 0 is left out of `sum` and `worst`, and low values of one of negative weight are good. Rewards
    without one of the known `ranges` use what was observed. `contrasts` whose variants were not run are left out.
    """
    finished = [curves for pairs in outcomes.values() for _, curves in pairs if curves is not None]
    ranges = {**observed_ranges(finished), **ranges}
    budgets = {axis: min((run.total[axis] for run in finished), default=math.nan) for axis in AXES}
    runs: dict[str, list[RunResult]] = {}
    for variant in variants:
        runs[variant.name] = []
        for outcome, curves in outcomes[variant.name]:
            result = RunResult(outcome, curves)
            if curves is not None:
                result.values = quantity_values(curves, ranges, weights, budgets)
                first = quantity_values(curves, ranges, weights, dict.fromkeys(AXES, 0.0))
                result.gained = result.values["steps"]["final"]["sum"] > first["steps"]["final"]["sum"]
            runs[variant.name].append(result)
    names = [name for name in weights if not finished or name in finished[0].rewards]
    results = Results(
        variants=list(variants),
        baseline=baseline,
        runs=runs,
        seeds=list(seeds),
        quantities=[*names, "sum", "worst"],
        weights=weights,
        ranges=ranges,
        budgets=budgets,
        final_share=finished[0].final_share if finished else 0.0,
        tables={},
        contrasts=[],
    )
    against_baseline = [
        Contrast(variant.name, variant.name, baseline) for variant in variants if variant.name != baseline
    ]
    for axis in AXES:
        for kind in ("final", "area"):
            results.tables[axis, kind] = _compare(results, against_baseline, axis, kind, results.quantities)
    present = [contrast for contrast in contrasts if {contrast.variant, contrast.against} <= runs.keys()]
    results.contrasts = _compare(results, present, "steps", "final", ["sum", "worst"])
    return results


def _compare(
    results: Results, contrasts: Sequence[Contrast], axis: str, kind: str, quantities: Sequence[str]
) -> list[Comparison]:
    """Every contrast in every quantity; together they are one family for Holm's correction."""
    rows = []
    for contrast in contrasts:
        pairs = [
            (run.values[axis][kind], base.values[axis][kind])
            for run, base in zip(results.runs[contrast.variant], results.runs[contrast.against], strict=True)
            if run.curves is not None and base.curves is not None
        ]
        for quantity in quantities:
            test = paired_test([run[quantity] for run, _ in pairs], [base[quantity] for _, base in pairs])
            rows.append((contrast, quantity, test))
    corrected = holm([test.p_t for *_, test in rows])
    return [
        Comparison(contrast.label, contrast.variant, contrast.against, axis, kind, quantity, test, p_holm)
        for (contrast, quantity, test), p_holm in zip(rows, corrected, strict=True)
    ]


def choose_learning_rates(
    curves: dict[str, dict[float, list[Curves | None]]],
    weights: dict[str, float],
    ranges: dict[str, tuple[float, float]],
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """
    The learning rate of each variant with the highest mean final sum of normalized rewards.

    `curves` has per variant and learning rate what the runs logged, `None` for a failed one. Returns the chosen
    learning rates, which lack a variant whose runs all failed, and one entry per variant and learning rate with its
    `score`, NaN where a run failed.
    """
    finished = [run for by_rate in curves.values() for runs in by_rate.values() for run in runs if run is not None]
    ranges = {**observed_ranges(finished), **ranges}
    budgets = {axis: min((run.total[axis] for run in finished), default=math.nan) for axis in AXES}

    def score(runs: Sequence[Curves | None]) -> float:
        if any(run is None for run in runs):
            return math.nan
        sums = [quantity_values(run, ranges, weights, budgets)["steps"]["final"]["sum"] for run in runs if run]
        return math.fsum(sums) / len(sums)

    chosen, search = {}, []
    for variant, by_rate in curves.items():
        scores = {rate: score(runs) for rate, runs in by_rate.items()}
        valid = {rate: value for rate, value in scores.items() if not math.isnan(value)}
        if valid:
            chosen[variant] = max(valid, key=lambda rate: valid[rate])
        for rate, value in scores.items():
            is_chosen = chosen.get(variant) == rate
            at_edge = is_chosen and len(scores) > 1 and rate in (min(scores), max(scores))
            search.append(
                {"variant": variant, "learning_rate": rate, "score": value, "chosen": is_chosen, "at_edge": at_edge}
            )
    return chosen, search
