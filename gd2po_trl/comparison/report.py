"""A comparison as markdown tables and as JSON."""

import math
from pathlib import Path
from typing import Any

from .. import reporting
from ..reporting import markdown_table
from .curves import AXES, counted_rewards
from .results import SIGNIFICANT, Comparison, Results
from .statistics import Interval, mean_interval, smallest_sign_flip_p
from .variants import mask_secrets


KINDS = ("final", "area")
SHARED_MACHINE = "Seconds hold only for a machine without other work, other runs of the comparison included."


def markdown(results: Results, caption: str, learning_rates: dict[str, float]) -> str:
    """
    The report.

    Args:
        results ([`Results`]): From `evaluate`.
        caption (`str`): The command that produced it.
        learning_rates (`dict[str, float]`): Learning rate of each variant, where each got its own; else empty.
    """
    sections = [f"**{results.verdict}**", f"`{caption}`", _summary(results)]
    if results.failures:
        sections.append(_failures(results))
    if any(run.curves for runs in results.runs.values() for run in runs):
        sections += [_final_table(results, learning_rates), _difference_table(results)]
        if results.contrasts:
            sections.append(_contrast_table(results))
        sections += [_budget_table(results), _cost_table(results)]
    sections.append(_seed_table(results))
    return "\n\n".join(sections) + "\n"


def _summary(results: Results) -> str:
    seeds = len(results.seeds)
    return (
        f"{seeds} seeds ({', '.join(map(str, results.seeds))}). {_made_of(results)} Intervals are 95 % (Student's t "
        f"over the seeds). Differences are paired by seed; p-values are two-sided. {_corrected_together(results)}\\* "
        f"marks p < 0.05 after the correction. With {seeds} seeds the sign-flip test cannot give less than "
        f"{smallest_sign_flip_p(seeds):.3g}."
    )


def _corrected_together(results: Results) -> str:
    family = len(results.tables["steps", "final"])
    if family == 0:
        return ""
    sentence = (
        f"Holm's correction is of the t-test's p-values, over the {family} differences that belong to one budget and "
        "one kind (final or area): every method but the baseline in each reward, `sum` and `worst`, also where a "
        "table shows the last two only. Different budgets and kinds are not corrected for each other. "
    )
    if results.contrasts:
        sentence += f"The {len(results.contrasts)} rows of *one thing at a time* are corrected among themselves. "
    return sentence


def _made_of(results: Results) -> str:
    counted = counted_rewards(results.ranges, results.weights)
    ranges = "; ".join(
        f"{name} {results.ranges[name][0]:g} to {results.ranges[name][1]:g}"
        + (", lower is better" if results.weights[name] < 0 else "")
        for name in counted
    )
    left_out = [
        f"{name} (weight 0)" if results.weights[name] == 0 else f"{name} (the same in all runs)"
        for name in results.ranges
        if name not in counted
    ]
    return (
        f"`sum` is the sum of the rewards, each as a share of its range{f' ({ranges})' if ranges else ''}; `worst` is "
        "the lowest of these shares." + (f" Left out of both: {', '.join(left_out)}." if left_out else "")
    )


def _failures(results: Results) -> str:
    lines = [
        f"**{len(results.failures)} of {len(results.seeds) * len(results.variants)} runs failed.** They are missing "
        "from every mean and difference below, which therefore only hold for runs that do not fail:",
        "",
    ]
    lines += [f"- {run.outcome.run.label}: {run.outcome.failure}" for run in results.failures]
    return "\n".join(lines)


def _final_table(results: Results, learning_rates: dict[str, float]) -> str:
    header = ["method", "runs", *results.quantities, *(["learning rate"] if learning_rates else [])]
    rows = []
    for variant in results.variants:
        cells = [variant.name, _run_count(results, variant.name)]
        cells += [
            _plus_minus(results.interval(variant.name, "steps", "final", quantity)) for quantity in results.quantities
        ]
        cells += [f"{learning_rates[variant.name]:g}"] if learning_rates else []
        rows.append(cells)
    return _table(f"Final value: {_final_meaning(results)} the steps", header, rows)


def _difference_table(results: Results) -> str:
    rows = [[row.variant, row.quantity, *_test_cells(row)] for row in results.tables["steps", "final"]]
    header = ["method", "quantity", "difference", "p (t)", "p (sign flip)", "p (Holm)", "pairs"]
    return _table(f"Final value: difference to {results.baseline}", header, rows)


def _contrast_table(results: Results) -> str:
    rows = [
        [row.label, f"{row.variant} - {row.against}", row.quantity, *_test_cells(row)] for row in results.contrasts
    ]
    header = ["effect of", "difference of", "quantity", "difference", "p (t)", "p (sign flip)", "p (Holm)", "pairs"]
    return _table("Final value: one thing at a time", header, rows)


def _budget_table(results: Results) -> str:
    columns = [(kind, quantity) for kind in KINDS for quantity in ("sum", "worst")]
    header = ["budget", "method", *(f"{kind} {quantity}" for kind, quantity in columns)]
    rows = []
    for axis in AXES:
        for index, variant in enumerate(results.variants):
            cells = [f"{_amount(results.budgets[axis])} {axis}" if index == 0 else "", variant.name]
            for kind, quantity in columns:
                interval = results.interval(variant.name, axis, kind, quantity)
                row = _find(results.tables[axis, kind], variant.name, quantity)
                cells.append(_mean_and_difference(interval, row))
            rows.append(cells)
    budgets = "; ".join(f"*{axis}*: {meaning}" for axis, meaning in AXES.items())
    explained = (
        f"Mean over the seeds; in brackets the difference to {results.baseline} with half its interval. *final*: "
        f"{_final_meaning(results)} the budget; *area*: mean over the whole budget. {budgets}. {SHARED_MACHINE}"
    )
    title = "At equal budget: as much as every finished run has spent"
    return _table(title, header, rows) + f"\n\n{explained}"


def _cost_table(results: Results) -> str:
    header = [
        "method",
        "trained rollouts",
        "trained tokens",
        "update seconds",
        "seconds in steps",
        "tokens per completion at the end",
    ]
    rows = []
    for variant in results.variants:
        runs = [run.curves for run in results.runs[variant.name] if run.curves is not None]
        rows.append(
            [
                variant.name,
                _plus_minus(mean_interval([100 * run.trained_rows for run in runs]), "{:.1f}") + " %",
                _plus_minus(mean_interval([run.total["tokens"] for run in runs]), "{:,.0f}"),
                _plus_minus(mean_interval([run.total["update seconds"] for run in runs]), "{:,.1f}"),
                _plus_minus(mean_interval([run.total["seconds"] for run in runs]), "{:,.1f}"),
                _plus_minus(mean_interval([run.completion_length for run in runs]), "{:.1f}"),
            ]
        )
    return _table("What a whole run costs", header, rows) + f"\n\n{SHARED_MACHINE}"


def _seed_table(results: Results) -> str:
    header = ["method", "seed", "result", *results.quantities]
    rows = []
    for variant in results.variants:
        for run in results.runs[variant.name]:
            cells = [variant.name, str(run.outcome.run.seed)]
            if run.curves is None:
                cells += ["FAILED", *["–"] * len(results.quantities)]
            else:
                cells += ["finished" if run.gained else "finished, no gain"]
                cells += [f"{run.values['steps']['final'][quantity]:.3f}" for quantity in results.quantities]
            rows.append(cells)
    table = _table("Every run: final values", header, rows)
    return table + "\n\n*no gain*: the sum of the normalised rewards ended no higher than it began."


def _final_meaning(results: Results) -> str:
    return f"mean over the last {results.final_share:.0%} of" if results.final_share else "at the end of"


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _run_count(results: Results, variant: str) -> str:
    runs = results.runs[variant]
    failed = sum(run.curves is None for run in runs)
    flat = sum(run.curves is not None and not run.gained for run in runs)
    notes = [f"{failed} failed"] * bool(failed) + [f"{flat} without gain"] * bool(flat)
    return f"{len(runs)}" + (f" ({', '.join(notes)})" if notes else "")


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    return f"**{title}**\n\n{markdown_table(header, rows)}"


def _test_cells(row: Comparison) -> list[str]:
    ps = [f"{p:.3f}" if not math.isnan(p) else "–" for p in (row.test.p_t, row.test.p_sign_flip, row.p_holm)]
    return [_difference(row), *ps, str(row.test.difference.count)]


def _find(rows: list[Comparison], variant: str, quantity: str) -> Comparison | None:
    return next((row for row in rows if row.variant == variant and row.quantity == quantity), None)


def _difference(row: Comparison | None) -> str:
    if row is None or row.test.difference.count == 0:
        return "–"
    interval = row.test.difference
    if interval.count == 1:
        return f"{interval.mean:+.3f}"
    return f"{interval.mean:+.3f}{_star(row)} [{interval.low:+.3f}, {interval.high:+.3f}]"


def _mean_and_difference(interval: Interval, row: Comparison | None) -> str:
    if interval.count == 0:
        return "–"
    mean = f"{interval.mean:.3f}"
    if row is None or row.test.difference.count == 0:
        return mean
    return f"{mean} ({_plus_minus(row.test.difference, '{:.3f}', '{:+.3f}')}{_star(row)})"


def _star(row: Comparison) -> str:
    return "\\*" if row.p_holm < SIGNIFICANT else ""


def _plus_minus(interval: Interval, form: str = "{:.3f}", mean_form: str = "") -> str:
    if interval.count == 0:
        return "–"
    mean = (mean_form or form).format(interval.mean)
    return mean if interval.count == 1 else f"{mean} ± {form.format(interval.half_width)}"


def write_json(
    path: Path, results: Results, caption: str, learning_rates: dict[str, float], tuning: list[dict[str, Any]]
) -> None:
    """Write everything that the tables and figures show, and every run's values, to `path`."""
    document = {
        "command": caption,
        "seeds": results.seeds,
        "baseline": results.baseline,
        "ranges": results.ranges,
        "budgets": results.budgets,
        "learning_rates": learning_rates,
        "learning_rate_search": tuning,
        "variants": {
            variant.name: {"method": variant.method, "overrides": mask_secrets(variant.overrides)}
            for variant in results.variants
        },
        "runs": [
            {
                "variant": name,
                "seed": run.outcome.run.seed,
                "failure": run.outcome.failure,
                "gained": run.gained,
                "process_seconds": run.outcome.seconds,
                "trained_rows": run.curves.trained_rows if run.curves else None,
                "total": run.curves.total if run.curves else None,
                "values": run.values,
            }
            for name, runs in results.runs.items()
            for run in runs
        ],
        "differences": [
            _comparison_entry(row) for rows in (*results.tables.values(), results.contrasts) for row in rows
        ],
    }
    reporting.write_json(path, document)


def _comparison_entry(row: Comparison) -> dict[str, Any]:
    return {
        "effect": row.label,
        "variant": row.variant,
        "against": row.against,
        "axis": row.axis,
        "kind": row.kind,
        "quantity": row.quantity,
        "pairs": row.test.difference.count,
        "difference": row.test.difference.mean,
        "low": row.test.difference.low,
        "high": row.test.difference.high,
        "p_t": row.test.p_t,
        "p_sign_flip": row.test.p_sign_flip,
        "p_holm": row.p_holm,
    }
