"""The figures of a comparison: curves over each budget, and the trade-off between sum and worst reward."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy import stats

from ..reporting import MUTED, PALETTE
from .curves import AXES, quantity_curves
from .results import Results
from .seed_statistics import mean_interval


# Beyond these the line style changes.
COLORS = [MUTED, *PALETTE]
LINES = ["-", "--", ":", "-."]
POINTS = 60
# Fewer finished runs than this are drawn one by one.
SEEDS_OF_A_BAND = 4
# Longest title in the usual size of its font.
TITLE_LENGTH = 26


def draw_curves(results: Results, path: Path) -> None:
    """
    Every quantity over steps, trained tokens and time, as a PNG: the mean over the seeds with its 95 % interval.

    The y axes cover the single runs; an interval may reach beyond. Of few seeds, whose intervals would hide the
    curves, the single runs are shown instead.
    """
    names = results.quantities
    figure = _figure(3.4 * len(names), 3.0 * len(AXES))
    panels = figure.subplots(len(AXES), len(names), squeeze=False)
    for row, (axis, meaning) in enumerate(AXES.items()):
        grid = np.linspace(0, results.budgets[axis], POINTS)
        for column, name in enumerate(names):
            panel = panels[row, column]
            seen = []
            for index, variant in enumerate(results.variants):
                finished = results.curves(variant.name)
                if not finished:
                    continue
                curves = [quantity_curves(run, results.ranges, results.weights)[name] for run in finished]
                spent = [run.spent[axis] for run in finished]
                heights = np.stack([np.interp(grid, *pair) for pair in zip(spent, curves, strict=True)])
                seen += [heights.min(), heights.max()]
                mean, color = heights.mean(0), COLORS[index % len(COLORS)]
                style = LINES[index // len(COLORS) % len(LINES)]
                panel.plot(grid, mean, style, color=color, linewidth=1.6, label=_legend(results, variant.name))
                if len(finished) < SEEDS_OF_A_BAND:
                    panel.plot(grid, heights.T, color=color, alpha=0.35, linewidth=0.7)
                else:
                    half = stats.t.ppf(0.975, len(finished) - 1) * stats.sem(heights)
                    panel.fill_between(grid, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
            panel.spines[["top", "right"]].set_visible(False)
            low, high = min(seen), max(seen)
            panel.set_ylim(low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1))
            _count_axis(panel, results.budgets[axis])
            panel.set_xlabel(meaning.split(" (")[0])
            if row == 0:
                panel.set_title(name, fontsize=min(12.0, 12 * TITLE_LENGTH / len(name)))
    _legend_above(figure, panels[0, 0], 3.4 * len(names))
    figure.savefig(path)


def draw_trade_off(results: Results, path: Path) -> None:
    """Final sum against final worst reward, and against trained tokens: every seed, and the means, as a PNG."""
    figure = _figure(11, 4.8)
    balance, cost = figure.subplots(1, 2)
    for index, variant in enumerate(results.variants):
        final = [run.values["steps"]["final"] for run in results.runs[variant.name] if run.curves]
        if not final:
            continue
        sums = [values["sum"] for values in final]
        tokens = [run.total["tokens"] for run in results.curves(variant.name)]
        for panel, other in ((balance, [values["worst"] for values in final]), (cost, tokens)):
            color, label = COLORS[index % len(COLORS)], _legend(results, variant.name)
            panel.scatter(other, sums, s=14, color=color, alpha=0.4, linewidth=0)
            x, y = mean_interval(other), mean_interval(sums)
            error = {} if x.count < 2 else {"xerr": x.half_width, "yerr": y.half_width}
            panel.errorbar(x.mean, y.mean, fmt="os^Dv<>P"[index % 8], color=color, capsize=3, label=label, **error)
    balance.set_xlabel("worst normalized reward at the end")
    _count_axis(cost, cost.get_xlim()[1])
    cost.set_xlabel("trained tokens of the whole run")
    for panel in (balance, cost):
        panel.set_ylabel("sum of normalized rewards at the end")
    _legend_above(figure, balance, 11)
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _count_axis(panel, largest: float) -> None:
    """Few ticks, and thousands as k, so that long numbers do not run into each other."""
    panel.xaxis.set_major_locator(MaxNLocator(5))
    if largest >= 1000:
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _legend_above(figure: Figure, panel, width: float) -> None:
    """One legend above all panels, in as many columns as the figure is wide enough for."""
    handles, labels = panel.get_legend_handles_labels()
    columns = max(1, int(width * 10 / (max(map(len, labels), default=1) + 6)))
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels) or 1), frameon=False)


def _legend(results: Results, variant: str) -> str:
    failed = sum(run.curves is None for run in results.runs[variant])
    return f"{variant} ({failed} failed)" if failed else variant
