"""A comparison on a terminal: its plan, its progress with the time left, and its tables in 80 columns."""

import math
from typing import TYPE_CHECKING, Any

from ..reporting import make_table
from ..terminal import duration, make_console, number
from .results import Comparison, Results
from .running import Progress
from .statistics import Interval, mean_interval


if TYPE_CHECKING:
    from rich.console import Console

    from .experiment import Experiment


class Display:
    """
    Prints lines, and below them, on a terminal, a bar over all runs and a line for each run at work.

    A context manager, which gives the terminal back however the training ends.
    """

    def __init__(self, console: "Console | None" = None):
        self.console = console or make_console()
        self._live: Any = None

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def line(self, text: str) -> None:
        """Print one line; in a file it is whole, and there at once."""
        self.console.print(text, soft_wrap=not self.console.is_terminal)
        self.console.file.flush()

    def plan(self, experiment: "Experiment") -> None:
        """Say what will be trained."""
        names, seeds = [variant.name for variant in experiment.variants], experiment.seeds
        places = (
            f"one at a time on each of the devices {', '.join(experiment.devices)}"
            if experiment.devices
            else f"{experiment.jobs} at a time"
        )
        count, many = len(names) * seeds, "s" if seeds > 1 else ""
        self.line(
            f"{count} run{'s' if count > 1 else ''}: {', '.join(names)}, each with {seeds} seed{many}, {places}. "
            f"Compared with {experiment.baseline}. Logs and results go to {experiment.output}."
        )
        if experiment.learning_rates:
            tuning = len(names) * len(experiment.learning_rates) * experiment.tuning_seeds
            self.line(f"Before that, {tuning} runs choose the learning rates.")

    def watch(self, progress: Progress) -> None:
        """Show how far the runs are."""
        if not self.console.is_terminal:
            return
        if self._live is None:
            from rich.live import Live

            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        self._live.update(_progress(progress))


def _progress(progress: Progress) -> Any:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = progress.seconds_left
    parts = progress.done + sum(step / steps for _, step, steps in progress.active if steps)
    line = Table.grid(padding=(0, 1), expand=True)
    line.add_column(no_wrap=True)
    line.add_column(ratio=1)
    line.add_column(no_wrap=True)
    line.add_row(
        f"{progress.done} of {progress.total} runs",
        ProgressBar(total=progress.total, completed=parts),
        f"{duration(progress.seconds)} elapsed, {'-:--' if left is None else 'about ' + duration(left)} left",
    )
    lines = [
        Text(f"  {label}: {f'step {step} of {steps}' if steps else 'starting'}")
        for label, step, steps in progress.active
    ]
    return Group(line, *lines)


def print_results(results: Results, console: "Console | None" = None) -> None:
    """Print the verdict, the final values, the differences to the baseline, and what the runs cost."""
    from rich.text import Text

    console = console or make_console()
    console.print()
    console.print(Text(results.verdict, style="bold"))
    console.print()
    for run in results.failures:
        console.print(f"Failed: {run.outcome.run.label}: {run.outcome.failure}")
    if any(run.curves for runs in results.runs.values() for run in runs):
        share = f"the last {results.final_share:.0%} of the steps" if results.final_share else "the end"
        columns = ["method", *results.quantities]
        rows = [
            [
                variant.name,
                *(plus_minus(results.interval(variant.name, "steps", "final", name)) for name in results.quantities),
            ]
            for variant in results.variants
        ]
        console.print(_fitting(f"Mean over {share} ± half the 95 % interval over the seeds", columns, rows, console))
        console.print("sum: of the rewards, each as a share of its range. worst: the lowest of these shares.\n")
        for title, differences in (
            (f"Difference to {results.baseline}", results.tables["steps", "final"]),
            ("One thing at a time", results.contrasts),
        ):
            if differences:
                columns = ["method", "quantity", "difference", "95 % interval", "p (Holm)"]
                console.print(make_table(title, columns, _difference_rows(differences), text_columns=2))
        console.print(make_table("What a run costs", *_costs(results)))
    for note in results.notes:
        console.print(note)
    where = f"{results.folder}: {', '.join(results.written)}"
    console.print(f"All tables and figures are in {where}.", soft_wrap=not console.is_terminal)


def _fitting(title: str, columns: list[str], rows: list[list[str]], console: "Console") -> Any:
    """The table as it is or, where it is too wide for the console, turned on its side."""
    table = make_table(title, columns, rows)
    if console.measure(table).minimum <= console.width and _width(columns, rows) <= console.width:
        return table
    turned = [list(cells) for cells in zip(columns, *rows, strict=True)]
    return make_table(title, ["", *turned[0][1:]], turned[1:])


def _width(columns: list[str], rows: list[list[str]]) -> int:
    return sum(max(len(cell) for cell in cells) + 3 for cells in zip(columns, *rows, strict=True))


def _difference_rows(differences: list[Comparison]) -> list[list[str]]:
    rows = []
    for index, row in enumerate(differences):
        name = row.label if row.label != row.variant else row.variant
        first = index == 0 or differences[index - 1].label != row.label
        interval = row.test.difference
        bounds = "–" if interval.count < 2 else f"{number(interval.low, '+')} to {number(interval.high, '+')}"
        mean = "–" if interval.count == 0 else number(interval.mean, "+")
        p = "–" if math.isnan(row.p_holm) else f"{row.p_holm:.3f}"
        rows.append([name if first else "", row.quantity, mean, bounds, p])
    return rows


def _costs(results: Results) -> tuple[list[str], list[list[str]]]:
    columns = ["method", "trained rollouts", "trained tokens", "update time", "time"]
    rows = []
    for variant in results.variants:
        runs = [run.curves for run in results.runs[variant.name] if run.curves is not None]
        if runs:
            totals = {axis: mean_interval([run.total[axis] for run in runs]).mean for axis in runs[0].total}
            share = mean_interval([run.trained_rows for run in runs]).mean
            rows.append(
                [
                    variant.name,
                    f"{share:.0%}",
                    f"{totals['tokens']:,.0f}",
                    duration(totals["update seconds"]),
                    duration(totals["seconds"]),
                ]
            )
    return columns, rows


def plus_minus(interval: Interval) -> str:
    """`0.512 ± 0.034`; without seeds for an interval the mean alone."""
    if interval.count == 0:
        return "–"
    mean = number(interval.mean)
    return mean if interval.count == 1 else f"{mean} ± {number(interval.half_width)}"
