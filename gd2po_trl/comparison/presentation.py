"""A comparison as Markdown, as JSON, and on a terminal of 80 columns: its plan, its progress and its tables."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reporting import Table, make_table, write_json
from ..terminal import duration, make_console
from .curves import AXES, Curves, counted_rewards
from .results import SIGNIFICANT, Comparison, Results
from .seed_statistics import Interval, mean_interval, smallest_sign_flip_p
from .variants import mask_secrets


if TYPE_CHECKING:
    from rich.console import Console

KINDS = ("final", "area")
SHARED_MACHINE = "Seconds hold only for a machine without other work, other runs of the comparison included."
TESTS = ["difference", "p (t)", "p (sign flip)", "p (Holm)", "pairs"]


# Markdown and JSON


def markdown(results: Results, caption: str, search: Sequence[dict[str, Any]] = ()) -> str:
    """The report; `caption` is the command that produced it, `search` what `choose_learning_rates` tried."""
    from jinja2 import Environment, PackageLoader

    tables = [_seed_table(results)]
    if results.finished:
        contrasts = [_contrast_table(results)] if results.contrasts else []
        differences = [_final_table(results), _difference_table(results), *contrasts]
        tables = [*differences, _budget_table(results), _cost_table(results), *tables]
    sections = [table.markdown() for table in tables] + results.notes
    sections += [_search_table(search).markdown()] if search else []
    counted = counted_rewards(results.ranges, results.weights)
    environment = Environment(loader=PackageLoader("gd2po_trl.comparison", ""), keep_trailing_newline=True)
    return environment.get_template("report.md.jinja").render(
        results=results,
        caption=caption,
        counted=[
            "{} {:g} to {:g}".format(name, *results.ranges[name])
            + (", lower is better" if results.weights[name] < 0 else "")
            for name in counted
        ],
        left_out=[
            f"{name} ({'weight 0' if results.weights[name] == 0 else 'the same in all runs'})"
            for name in results.ranges
            if name not in counted
        ],
        family=len(results.tables["steps", "final"]),
        smallest_p=f"{smallest_sign_flip_p(len(results.seeds)):.3g}",
        total=len(results.seeds) * len(results.variants),
        sections=sections,
    )


def _final_table(results: Results) -> Table:
    rates = results.learning_rates
    rows = [
        [
            variant.name,
            _run_count(results, variant.name),
            *(_plus_minus(results.interval(variant.name, "steps", "final", name)) for name in results.quantities),
            *([f"{rates[variant.name]:g}"] if rates else []),
        ]
        for variant in results.variants
    ]
    columns = ["method", "runs", *results.quantities, *(["learning rate"] if rates else [])]
    return Table(f"Final value: {_final_meaning(results)} the steps", columns, rows)


def _difference_table(results: Results) -> Table:
    rows = [[row.variant, row.quantity, *_test_cells(row)] for row in results.tables["steps", "final"]]
    return Table(f"Final value: difference to {results.baseline}", ["method", "quantity", *TESTS], rows)


def _contrast_table(results: Results) -> Table:
    rows = [
        [row.label, f"{row.variant} - {row.against}", row.quantity, *_test_cells(row)] for row in results.contrasts
    ]
    return Table("Final value: one thing at a time", ["effect of", "difference of", "quantity", *TESTS], rows)


def _budget_table(results: Results) -> Table:
    columns = [(kind, quantity) for kind in KINDS for quantity in ("sum", "worst")]
    rows = []
    for axis in AXES:
        for index, variant in enumerate(results.variants):
            cells = [f"{_amount(results.budgets[axis])} {axis}" if index == 0 else "", variant.name]
            for kind, quantity in columns:
                found = [
                    row
                    for row in results.tables[axis, kind]
                    if (row.variant, row.quantity) == (variant.name, quantity) and row.test.difference.count
                ]
                mean = results.interval(variant.name, axis, kind, quantity).mean
                difference = [f" ({_plus_minus(row.test.difference, mean='{:+.3f}')}{_star(row)})" for row in found]
                cells.append("–" if math.isnan(mean) else "".join([f"{mean:.3f}", *difference]))
            rows.append(cells)
    budgets = "; ".join(f"*{axis}*: {meaning}" for axis, meaning in AXES.items())
    return Table(
        "At equal budget: as much as every finished run has spent",
        ["budget", "method", *(f"{kind} {quantity}" for kind, quantity in columns)],
        rows,
        f"Mean over the seeds; in brackets the difference to {results.baseline} with half its interval. *final*: "
        f"{_final_meaning(results)} the budget; *area*: mean over the whole budget. {budgets}. {SHARED_MACHINE}",
    )


def _cost_table(results: Results) -> Table:
    columns: dict[str, tuple[str, Callable[[Curves], float]]] = {
        "trained rollouts": ("{:.1f}", lambda run: 100 * run.trained_rows),
        "trained tokens": ("{:,.0f}", lambda run: run.total["tokens"]),
        "update seconds": ("{:,.1f}", lambda run: run.total["update seconds"]),
        "seconds in steps": ("{:,.1f}", lambda run: run.total["seconds"]),
        "tokens per completion at the end": ("{:.1f}", lambda run: run.completion_length),
    }
    rows = []
    for variant in results.variants:
        runs = results.curves(variant.name)
        cells = [_plus_minus(mean_interval(list(map(value, runs))), form) for form, value in columns.values()]
        rows.append([variant.name, f"{cells[0]} %", *cells[1:]])
    return Table("What a whole run costs", ["method", *columns], rows, SHARED_MACHINE)


def _seed_table(results: Results) -> Table:
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
    return Table(
        "Every run: final values",
        ["method", "seed", "result", *results.quantities],
        rows,
        "*no gain*: the sum of the normalized rewards ended no higher than it began.",
    )


def _search_table(search: Sequence[dict[str, Any]]) -> Table:
    rates = sorted({entry["learning_rate"] for entry in search})
    rows: dict[str, list[str]] = {entry["variant"]: [entry["variant"], *["" for _ in rates]] for entry in search}
    for entry in search:
        text = "failed" if math.isnan(entry["score"]) else f"{entry['score']:.3f}"
        place = 1 + rates.index(entry["learning_rate"])
        rows[entry["variant"]][place] = f"**{text}**" if entry["chosen"] else text
    edges = [entry["variant"] for entry in search if entry["at_edge"]]
    return Table(
        "Learning rates, chosen on seeds of their own: final sum of normalized rewards",
        ["method", *(f"{rate:g}" for rate in rates)],
        list(rows.values()),
        f"At the edge of what was tried: {', '.join(edges)}. A wider range may serve them better." if edges else "",
    )


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


def _test_cells(row: Comparison) -> list[str]:
    interval = row.test.difference
    difference = "–" if interval.count == 0 else f"{interval.mean:+.3f}"
    if interval.count > 1:
        difference += f"{_star(row)} [{interval.low:+.3f}, {interval.high:+.3f}]"
    ps = [f"{p:.3f}" if not math.isnan(p) else "–" for p in (row.test.p_t, row.test.p_sign_flip, row.p_holm)]
    return [difference, *ps, str(interval.count)]


def _star(row: Comparison) -> str:
    return "\\*" if row.p_holm < SIGNIFICANT else ""


def _plus_minus(interval: Interval, form: str = "{:.3f}", mean: str = "") -> str:
    if interval.count == 0:
        return "–"
    text = (mean or form).format(interval.mean)
    return text if interval.count == 1 else f"{text} ± {form.format(interval.half_width)}"


def write_results(path: Path, results: Results, caption: str, search: Sequence[dict[str, Any]] = ()) -> None:
    """Write everything that the tables and figures show, and every run's values, to the JSON file `path`."""
    document = {
        "command": caption,
        "seeds": results.seeds,
        "baseline": results.baseline,
        "ranges": results.ranges,
        "budgets": results.budgets,
        "learning_rates": results.learning_rates,
        "learning_rate_search": search,
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
        "differences": [row.to_dict() for rows in (*results.tables.values(), results.contrasts) for row in rows],
    }
    write_json(path, document)


# The terminal


class Display:
    """
    Prints lines, and below them, on a terminal, a bar over all runs and one for each run at work.

    A context manager, which gives the terminal back however the training ends.
    """

    def __init__(self, console: "Console | None" = None):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = console or make_console()
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            speed_estimate_period=float("inf"),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._bars.stop()

    def line(self, text: str) -> None:
        """Print one line; in a file it is whole, and there at once."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)
        self.console.file.flush()

    def watch(self, done: int, total: int, active: list[tuple[str, int, int]]) -> None:
        """Show how far the runs are, as `run_all` says it."""
        parts = done + sum(step / steps for _, step, steps in active if steps)
        shown = [("all runs", parts, total, f"{done} of {total}")]
        shown += [
            (name, step, steps, f"step {step} of {steps}" if steps else "starting") for name, step, steps in active
        ]
        for name in self._tasks.keys() - {name for name, *_ in shown}:
            self._bars.remove_task(self._tasks.pop(name))
        for name, completed, of, count in shown:
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(name, count="")
            self._bars.update(self._tasks[name], completed=completed, total=of or None, count=count)


def print_results(results: Results, console: "Console | None" = None) -> None:
    """Print the verdict, the final values, the differences to the baseline, and what the runs cost."""
    from rich.text import Text

    console = console or make_console()
    console.print("\n", Text(results.verdict, style="bold"), "\n", sep="")
    for run in results.failures:
        console.print(f"Failed: {run.outcome.run.label}: {run.outcome.failure}")
    if results.finished:
        final = _final_table(results)
        console.print(_fitting(f"{final.title}, ± half the 95 % interval over the seeds", final, console))
        console.print("sum: of the rewards, each as a share of its range. worst: the lowest of these shares.\n")
        for table, hidden in ((_difference_table(results), ()), (_contrast_table(results), ("difference of",))):
            if table.rows:
                shown = [i for i, name in enumerate(table.columns) if name not in (*hidden, *TESTS[1:3], "pairs")]
                rows = [[row[i].replace("\\", "") for i in shown] for row in table.rows]
                console.print(make_table(table.title, [table.columns[i] for i in shown], rows, text_columns=2))
        console.print(make_table("What a run costs", *_short_costs(results)))
    for note in results.notes:
        console.print(note)
    where = f"{results.folder}: {', '.join(results.written)}"
    console.print(f"All tables and figures are in {where}.", soft_wrap=not console.is_terminal)


def _fitting(title: str, table: Table, console: "Console") -> Any:
    """The table as it is or, where it is too wide for the console, turned on its side."""
    lines = [table.columns, *table.rows]
    if sum(max(len(cell) for cell in cells) + 3 for cells in zip(*lines, strict=True)) <= console.width:
        return make_table(title, table.columns, table.rows)
    turned = [list(cells) for cells in zip(*lines, strict=True)]
    return make_table(title, ["", *turned[0][1:]], turned[1:])


def _short_costs(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = []
    for variant in results.variants:
        if runs := results.curves(variant.name):
            mean = {axis: sum(run.total[axis] for run in runs) / len(runs) for axis in AXES}
            share = sum(run.trained_rows for run in runs) / len(runs)
            times = [duration(mean["update seconds"]), duration(mean["seconds"])]
            rows.append([variant.name, f"{share:.0%}", f"{mean['tokens']:,.0f}", *times])
    return ["method", "trained rollouts", "trained tokens", "update time", "time"], rows
