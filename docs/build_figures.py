"""
Draws the pictures of README.md and docs/balance.md into `docs/images`, from committed figures alone.

    python docs/build_figures.py

The quickstart's curves are those of `benchmarks/results/quickstart-cpu.json`. To measure them anew (three minutes):

    for seed in 1 2 3; do gd2po quickstart --seed $seed --output outputs/curves/$seed; done
    python docs/build_figures.py --runs outputs/curves/1 outputs/curves/2 outputs/curves/3
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter
from PIL import Image

from gd2po_trl import compute_advantages
from gd2po_trl.reporting import GRID, INK, MUTED, PALETTE


IMAGES = Path(__file__).with_name("images")
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
CURVES, UPDATE_TIMES = RESULTS / "quickstart-cpu.json", RESULTS / "step_time-cpu.json"
SHADE = "#f1f3f5"
BLUE, ORANGE, GREEN, *_ = PALETTE
# One prompt, six rollouts. The third (right, short) and the fifth (half right, long) conflict.
METHOD_REWARDS = torch.tensor([[3.0, 0.7], [2.0, 0.6], [3.0, 0.2], [1.0, 0.3], [0.0, 1.0], [-2.0, 0.1]])
# One prompt, eight rollouts: correctness tells them apart, length hardly does.
DIVISION_REWARDS = torch.tensor(
    [[3.0, 0.94], [3.0, 0.95], [3.0, 0.94], [2.0, 0.96], [-3.0, 0.96], [-3.0, 0.97], [-1.0, 0.96], [-3.0, 0.95]]
)
# The spread of the two within a group, in the quickstart's first batches.
TYPICAL_SPREAD = {"correctness": 1.79, "length": 0.243}
RANGES = {"correctness": (-3, 3), "format": (0, 1), "length": (0, 1)}
CONFLICT = "gd2po/conflict_ratio"


def new_figure(width: float, height: float) -> Figure:
    """White, so that it reads in dark mode too; 10 points of a picture up to 6 inches wide are legible on a phone."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def style(panel, title: str) -> None:
    panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(MUTED)
    panel.tick_params(colors=INK, labelsize=10, color=MUTED)


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colors, which is a third of the size."""
    figure.canvas.draw()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64).save(path, optimize=True)


def draw_method(path: Path) -> None:
    """What two rewards say of each rollout of a group, and the advantages that GD²PO-Hard and GDPO make of it."""
    hard = compute_advantages(METHOD_REWARDS, len(METHOD_REWARDS))
    gdpo = compute_advantages(METHOD_REWARDS, len(METHOD_REWARDS), conflict_filter=None)
    places = torch.arange(len(METHOD_REWARDS))
    figure = new_figure(5.6, 5.2)
    above, below = figure.subplots(2, 1, sharex=True)
    style(above, "1  Each reward, normalized within the group")
    for index, (name, color) in enumerate((("correctness", BLUE), ("length", ORANGE))):
        above.bar(places + 0.36 * (index - 0.5), hard.per_reward[:, index], width=0.34, color=color, label=name)
    style(below, "2  Advantage that the policy is trained on")
    below.bar(places, hard.advantages, width=0.5, color=GREEN, label="GD²PO-Hard")
    below.plot(places, gdpo.advantages, "D", color=INK, fillstyle="none", markersize=6, label="GDPO")
    for panel in (above, below):
        panel.axhline(0, color=MUTED, linewidth=0.8)
        panel.set_ylim(-2.4, 2.6)
        panel.legend(frameon=False, fontsize=10, ncols=2, loc="upper right", borderaxespad=0, handlelength=1.2)
        for place in places[hard.conflict].tolist():
            panel.axvspan(place - 0.5, place + 0.5, color=SHADE, zorder=0, linewidth=0)
    for place in places[hard.conflict].tolist():
        above.text(place, -2.2, "conflict", ha="center", fontsize=10, color=MUTED)
        below.text(place, -2.2, "dropped", ha="center", fontsize=10, color=MUTED)
    below.set_xticks(places, [str(place + 1) for place in places.tolist()])
    below.set_xlabel("rollout of one prompt", fontsize=10, color=INK)
    save(figure, path)


def draw_quickstart(path: Path) -> None:
    """The quickstart: rewards and conflicts in training, a line per seed, and mean rewards on held-out prompts."""
    runs = list(json.loads(CURVES.read_text(encoding="utf-8"))["runs"].values())
    figure = new_figure(5.6, 4.6)
    panels = figure.subplots(2, 2, sharex=True).flat
    titles = [*(f"{name} ({low} to {high})" for name, (low, high) in RANGES.items()), "rollouts in conflict"]
    keys = [*(f"rewards/{name}/mean" for name in RANGES), CONFLICT]
    for panel, title, key, color in zip(panels, titles, keys, (BLUE, BLUE, BLUE, ORANGE), strict=True):
        style(panel, title)
        for index, run in enumerate(runs):
            label = "training, one line a seed" if index == 0 else None
            panel.plot(*zip(*run[key], strict=True), color=color, alpha=0.55, linewidth=1.2, label=label)
        if key != CONFLICT:
            held_out = [torch.tensor(run[f"eval_{key}"]) for run in runs]
            steps, values = torch.stack(held_out).mean(0).T
            panel.plot(steps, values, "o", color=INK, markersize=4.5, label="held out, mean")
        panel.grid(axis="y", color=GRID, linewidth=0.7)
        panel.set_axisbelow(True)
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.set_ylim(0)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=10)
    for panel in figure.axes[2:]:
        panel.set_xlabel("optimizer step", fontsize=10, color=INK)
    save(figure, path)


def draw_update_time(path: Path) -> None:
    """Update time against stock `GRPOTrainer`: tool-calling lengths, LoRA, 16 rollouts per prompt, dropped evenly."""
    rows = json.loads(UPDATE_TIMES.read_text(encoding="utf-8"))["rows"]
    setting = {"lengths": "tool calling", "num_generations": 16, "micro_batch": 4, "lora": True, "pattern": "even"}
    rows = [row for row in rows if setting.items() <= row.items() and row.get("update_share") is None]
    times = {(row["trainer"], row["dropped"]): row["time"] for row in rows}
    shares = sorted({share for _, share in times})
    places = torch.arange(len(shares))
    figure = new_figure(5.6, 3.8)
    panel = figure.subplots()
    style(panel, "Update time, as a share of stock GRPOTrainer's")
    panel.axhline(1, color=INK, linewidth=1.2, linestyle="--")
    panel.text(len(shares) - 0.5, 1.02, "stock TRL", ha="right", va="bottom", fontsize=10, color=INK)
    bars = {"skipping": ("dropped rollouts skipped", "#9cc4e4"), "both": ("and prompts run once, no padding", BLUE)}
    for index, (trainer, (label, color)) in enumerate(bars.items()):
        heights = [times[trainer, share] for share in shares]
        bar = panel.bar(places + 0.4 * (index - 0.5), heights, width=0.37, color=color, label=label)
        # Those of the lighter bars stand inside, since the first would meet the line of stock TRL.
        panel.bar_label(bar, fmt="%.2f", fontsize=10, color=INK, padding=-14 if trainer == "skipping" else 2)
    panel.set_xticks(places, [f"{share:.0%}" for share in shares])
    panel.set_xlabel("rollouts dropped by the filter", fontsize=10, color=INK)
    panel.set_ylim(0, 1.14)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=10, columnspacing=1, handlelength=1.2)
    save(figure, path)


def draw_division(path: Path) -> None:
    """One group in which dividing by its own spread makes small differences in length as large as right and wrong."""

    def advantages(scale_rewards: str, weights: list[float]) -> torch.Tensor:
        settings = {"conflict_filter": None, "consensus_weighting": None, "whitening": None}
        return compute_advantages(
            DIVISION_REWARDS, len(DIVISION_REWARDS), reward_weights=weights, scale_rewards=scale_rewards, **settings
        ).per_reward

    panels = {
        "Divided by the typical spread": advantages("none", [1 / spread for spread in TYPICAL_SPREAD.values()]),
        "Divided by this group's own spread (GDPO)": advantages("group", [1.0, 1.0]),
    }
    figure = new_figure(5.6, 5.4)
    places = torch.arange(len(DIVISION_REWARDS))
    for panel, (title, values) in zip(figure.subplots(2, 1, sharey=True), panels.items(), strict=True):
        style(panel, title)
        for index, (name, color) in enumerate(zip(TYPICAL_SPREAD, (BLUE, ORANGE), strict=True)):
            panel.bar(places + 0.36 * (index - 0.5), values[:, index], width=0.34, color=color, label=name)
        panel.plot(places, values.sum(1), "D", color=INK, markersize=5, label="sum")
        panel.axhline(0, color=MUTED, linewidth=0.8)
        panel.set_xticks(places, [str(place + 1) for place in places.tolist()])
        panel.set_ylabel("advantage", fontsize=10, color=INK)
    panel.set_xlabel("rollout of one prompt", fontsize=10, color=INK)
    figure.axes[0].legend(frameon=False, fontsize=10)
    save(figure, path)


def draw_all(folder: Path) -> None:
    for draw in (draw_method, draw_quickstart, draw_update_time, draw_division):
        draw(folder / f"{draw.__name__.removeprefix('draw_')}.png")


def distill(folders: list[Path]) -> None:
    """Write the curves of the quickstart's runs in `folders`, named by their seeds, into `CURVES`."""
    keys = [CONFLICT, *(f"{prefix}rewards/{name}/mean" for name in RANGES for prefix in ("", "eval_"))]
    runs = {}
    for folder in folders:
        log = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        runs[folder.name] = {key: [[row["step"], round(row[key], 4)] for row in log if key in row] for key in keys}
    lines = [f" {json.dumps(seed)}: {json.dumps(run)}" for seed, run in runs.items()]
    CURVES.write_text('{"runs": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draws the pictures of README.md and docs/balance.md.")
    parser.add_argument("--runs", nargs="+", type=Path, default=[], metavar="FOLDER", help="quickstart runs, by seed")
    options = parser.parse_args()
    if options.runs:
        distill(options.runs)
    draw_all(IMAGES)
