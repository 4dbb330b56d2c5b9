"""The figures of the report as one PNG."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..diagnostics import pair_name
from ..reporting import GRID, INK, MUTED, PALETTE
from ..terminal import printable
from .records import CONSENSUS_BINS, Analysis, PairFigures


RAMP = LinearSegmentedColormap.from_list("ramp", ["#f6f8fa", "#f5b38a", "#d1570c", "#7a2d02"])
KEPT = LinearSegmentedColormap.from_list("kept", ["#d1570c", "#f5c6a6", "#cfe3f3", "#0a6ebd"])
# Points of a curve over training; more steps are averaged into this many.
MAX_POINTS = 80
MAX_PAIRS = 6
# Rewards up to which the cells of the matrix have room for numbers.
MAX_ANNOTATED = 10


def draw(analysis: Analysis, path: Path) -> None:
    """Draw `analysis` into the PNG file `path`. No display is needed, and no global state of matplotlib is touched."""
    layout = ConstrainedLayoutEngine(w_pad=0.18, h_pad=0.16, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(16, 9.4), dpi=130, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 3)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(MUTED)
        panel.tick_params(colors=INK, labelsize=9, length=3, color=MUTED)
    drawn = (_over_training, _pair_matrix, _kept, _consensus, _agreement, _shares)
    for draw_panel, panel in zip(drawn, panels.flat, strict=True):
        draw_panel(panel, analysis)
    figure.savefig(path)


def _title(panel, title: str, subtitle: str) -> None:
    panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=21)
    line = panel.text(0, 1.025, subtitle, transform=panel.transAxes, fontsize=8.8, color=MUTED, va="bottom")
    line.set_in_layout(False)


def _label(name: str, length: int = 30) -> str:
    name = " ".join(printable(name).split())
    if len(name) > length:
        name = f"{name[: length // 2]}…{name[len(name) - (length - length // 2 - 1) :]}"
    # A dollar sign would start a formula.
    return name.replace("$", r"\$")


def _legend(panel, columns: int, **options) -> None:
    legend = panel.legend(fontsize=8, frameon=False, loc="upper left", ncols=columns, **options)
    # Else a long name would take its room from the other panels.
    legend.set_in_layout(False)


def _nothing(panel, text: str) -> None:
    panel.axis("off")
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", va="center", fontsize=10, color=MUTED)


def _binned(steps: np.ndarray, values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `MAX_POINTS` averages of `values` over neighboring steps."""
    x, y = [], []
    for part in np.array_split(np.arange(len(steps)), min(MAX_POINTS, len(steps))):
        known = part[~np.isnan(values[part])]
        x.append(steps[part].mean())
        y.append(np.average(values[known], weights=weights[known]) if weights[known].sum() > 0 else np.nan)
    return np.array(x), np.array(y)


def _over_training(panel, analysis: Analysis) -> None:
    if len(analysis.rewards) < 2:
        _title(panel, "Conflict", "")
        return _nothing(panel, "one reward: no conflict")
    pairs = sorted(analysis.pairs, key=lambda pair: -pair.conflict_ratio)[:MAX_PAIRS]
    if len(analysis.over_steps.step) == 1:
        return _at_one_step(panel, analysis, pairs)
    _title(panel, "Conflict over training", "share of rollouts that one reward favors and another disfavors")
    over = analysis.over_steps
    steps, weights = np.array(over.step, dtype=float), np.array(over.rollouts, dtype=float)
    marker = "o" if len(steps) <= 30 else None
    ratio = _binned(steps, np.array(over.conflict_ratio), weights)
    panel.plot(*ratio, color=PALETTE[0], lw=2.3, marker=marker, ms=3.5, label="any two rewards", zorder=3)
    if len(analysis.pairs) > 1:
        for pair, color in zip(pairs, PALETTE[1:], strict=False):
            values = np.array(over.pair_conflict_ratio[pair_name(pair.first, pair.second)])
            panel.plot(*_binned(steps, values, weights), color=color, lw=1.3, marker=marker, ms=2.5, label=_pair(pair))
    unrelated = _binned(steps, np.array(over.unrelated_ratio), weights)
    panel.plot(*unrelated, color=MUTED, lw=1.2, ls=(0, (4, 3)), label="any two, by chance")
    # Room for the legend above the curves.
    top = max(panel.get_ylim()[1], 0.02)
    columns = 2 if max(len(_pair(pair)) for pair in pairs) <= 26 else 1
    panel.set_ylim(0, top * (1.2 + 0.1 * len(pairs) / columns))
    panel.set_yticks([tick for tick in panel.get_yticks() if 0 <= tick <= min(top, 1.0) + 1e-9])
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    panel.set_xlabel("training step", fontsize=9, color=INK)
    panel.grid(axis="y", color=GRID, lw=0.7)
    panel.set_axisbelow(True)
    _legend(panel, columns, handlelength=1.6, columnspacing=1.2)


def _pair(pair: PairFigures) -> str:
    return f"{_label(pair.first)} / {_label(pair.second)}"


def _at_one_step(panel, analysis: Analysis, pairs: list[PairFigures]) -> None:
    _title(panel, "Conflict", "share of rollouts that one reward favors and another disfavors")
    several = pairs if len(analysis.pairs) > 1 else []
    names = ["any two" if several else _pair(pairs[0]), *map(_pair, several)]
    shown: list[Analysis | PairFigures] = [analysis, *several]
    _bars(panel, names, {"measured": (PALETTE[0], [one.conflict_ratio for one in shown])}, digits=None)
    unrelated = [one.unrelated_ratio for one in reversed(shown)]
    marks = {"marker": "|", "s": 260, "linewidths": 2, "color": PALETTE[1], "label": "by chance", "zorder": 3}
    panel.scatter(unrelated, range(len(names)), **marks)
    if len(names) == 1:
        panel.set_ylim(-1.5, 1.5)
    _legend(panel, 2, bbox_to_anchor=(0, 1.03), markerscale=0.5)


def _bars(panel, names: list[str], series: dict[str, tuple[str, list[float]]], digits: int | None = 0) -> None:
    """Horizontal bars from the top down, those of several series side by side, with their values as percentages."""
    height = 0.55 if len(series) == 1 else 0.34
    y = np.arange(len(names))[::-1]
    for index, (label, (color, values)) in enumerate(series.items()):
        places: np.ndarray = y + (0 if len(series) == 1 else 0.19 - 0.38 * index)
        panel.barh(places, np.nan_to_num(values), height=height, color=color, label=label)
        for place, value in zip(places, values, strict=True):
            if digits is not None and not np.isnan(value):
                text = {"va": "center", "fontsize": 8.5, "color": INK}
                panel.text(max(value, 0) + 0.012, place, f"{value:.{digits}%}", **text)
    _share_axis(panel, names)
    panel.set_xlim(0, 1.1)
    panel.set_xticks(np.arange(0, 1.01, 0.2))


def _share_axis(panel, names: list[str]) -> None:
    """An x axis of percentages under bars from the top down, and room for a legend above them."""
    panel.set_yticks(range(len(names)), names[::-1])
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.spines["left"].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.set_ylim(-0.6, len(names) - 0.4 + 0.08 * len(names))


def _pair_matrix(panel, analysis: Analysis) -> None:
    _title(panel, "Who contradicts whom", "share of rollouts that the row favors and the column disfavors")
    names = [reward.name for reward in analysis.rewards]
    if len(names) < 2:
        return _nothing(panel, "one reward: no pair")
    matrix = np.full((len(names), len(names)), np.nan)
    for pair in analysis.pairs:
        first, second = names.index(pair.first), names.index(pair.second)
        matrix[first, second], matrix[second, first] = pair.first_up, pair.second_up
    top = max(np.nanmax(matrix), 0.05)
    panel.imshow(matrix, cmap=RAMP, vmin=0, vmax=top, aspect="auto")
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.set_yticks(range(len(names)), [_label(name) for name in names], fontsize=9)
    is_tight = sum(map(len, names)) > 48
    slanted = {"rotation": 20, "ha": "right", "rotation_mode": "anchor"} if is_tight else {}
    panel.set_xticks(range(len(names)), [_label(name) for name in names], fontsize=9, **slanted)
    panel.tick_params(length=0)
    size, digits = (10, 1) if len(names) <= 5 else (8, 0)
    for (row, column), value in np.ndenumerate(matrix):
        if not np.isnan(value) and len(names) <= MAX_ANNOTATED:
            color = "white" if value > 0.6 * top else INK
            panel.text(column, row, f"{value:.{digits}%}", ha="center", va="center", fontsize=size, color=color)


def _kept(panel, analysis: Analysis) -> None:
    _title(panel, "What the filters would keep", "of the rollouts with an advantage, and of its sum")
    if len(analysis.rewards) < 2:
        return _nothing(panel, "one reward: nothing to filter")
    series = {
        "rollouts": (PALETTE[0], [one.kept_ratio_with_signal for one in analysis.filters]),
        "advantages": ("#9cc4e4", [one.kept_push for one in analysis.filters]),
    }
    _bars(panel, [one.label for one in analysis.filters], series)
    _legend(panel, 2, bbox_to_anchor=(0, 1.03))


def _consensus(panel, analysis: Analysis) -> None:
    _title(panel, "Consensus weight of the groups", "share of groups, by the share of their rollouts that is kept")
    if len(analysis.rewards) < 2:
        return _nothing(panel, "one reward: every rollout is kept")
    shares = np.array([one.consensus_distribution for one in analysis.filters[::-1]])
    left = np.cumsum(shares, axis=1) - shares
    for index, name in enumerate(CONSENSUS_BINS):
        color = KEPT(index / (len(CONSENSUS_BINS) - 1))
        label = {"0": "none kept", "1": "all"}.get(name, name.replace(" to ", "–"))
        style = {"height": 0.62, "color": color, "label": label, "ec": "white", "lw": 0.8}
        panel.barh(range(len(shares)), shares[:, index], left=left[:, index], **style)
    _share_axis(panel, [one.label for one in analysis.filters])
    panel.set_xlim(0, 1)
    _legend(panel, 6, handlelength=0.9, handletextpad=0.4, columnspacing=0.9)


def _agreement(panel, analysis: Analysis) -> None:
    _title(panel, "How strongly they disagree", "conflicting rollouts by |agreement|: 0 cancels, 1 agrees")
    values = np.array(analysis.agreement_distribution)
    if values.sum() == 0:
        return _nothing(panel, "no conflicting rollouts")
    edges = np.linspace(0, 1, len(values) + 1)
    panel.bar(edges[:-1], values, width=np.diff(edges) * 0.92, align="edge", color=PALETTE[0])
    top = values.max() * 1.16
    for one in analysis.filters:
        if one.threshold:
            panel.axvline(one.threshold, color=PALETTE[1], lw=1.1, ls=(0, (4, 3)))
            panel.text(
                one.threshold - 0.008, top, f"τ {one.threshold:g}", ha="right", va="top", fontsize=8, color=PALETTE[1]
            )
    panel.set_ylim(0, top)
    panel.set_xlim(0, 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_xlabel("|agreement|; GD²PO-SNR drops what is left of its threshold τ", fontsize=9, color=INK)
    panel.grid(axis="y", color=GRID, lw=0.7)
    panel.set_axisbelow(True)


def _shares(panel, analysis: Analysis) -> None:
    _title(panel, "Which reward decides", "share of the squared advantage, by reward")
    summed = [reward.share_sum_then_normalise for reward in analysis.rewards]
    normalized = [reward.share_normalise_then_sum for reward in analysis.rewards]
    known = [value for value in (*summed, *normalized) if not np.isnan(value)]
    if not known:
        return _nothing(panel, "no reward varies within a group")
    series = {"GRPO (summed first)": (PALETTE[1], summed), "GDPO (normalized first)": (PALETTE[0], normalized)}
    _bars(panel, [_label(reward.name) for reward in analysis.rewards], series)
    panel.axvline(0, color=MUTED, lw=0.8)
    panel.set_xlim(min(0, *known) * 1.1, max(1.0, *known) * 1.12)
    panel.xaxis.set_major_locator(MaxNLocator(6))  # a share may be negative, or above 1
    _legend(panel, 2, bbox_to_anchor=(0, 1.03))
