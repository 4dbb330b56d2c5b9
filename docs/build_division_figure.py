"""
Draws `docs/images/division.png`: one group in which dividing by its own spread makes a whisper as loud as a shout.

    python docs/build_division_figure.py
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gd2po_trl import compute_advantages


OUTPUT = Path(__file__).with_name("images") / "division.png"
INK, MUTED = "#1f2933", "#6b7785"
COLORS = {"correctness": "#0a6ebd", "length": "#d1570c"}
# One prompt, eight rollouts: correctness tells them apart, length hardly does.
REWARDS = torch.tensor(
    [[3.0, 0.94], [3.0, 0.95], [3.0, 0.94], [2.0, 0.96], [-3.0, 0.96], [-3.0, 0.97], [-1.0, 0.96], [-3.0, 0.95]]
)
# The spread that each of the two has within a group of the quickstart task's first batches.
TYPICAL_SPREAD = {"correctness": 1.79, "length": 0.243}


def advantages(scale_rewards: str, weights: list[float]) -> torch.Tensor:
    settings = {"conflict_filter": None, "consensus_weighting": None, "whitening": None}
    return compute_advantages(
        REWARDS, len(REWARDS), reward_weights=weights, scale_rewards=scale_rewards, **settings
    ).per_reward


def draw() -> None:
    """Draw the figure into `OUTPUT`."""
    panels = {
        "Divided by the typical spread (equal units)": advantages(
            "none", [1 / spread for spread in TYPICAL_SPREAD.values()]
        ),
        "Divided by this group's own spread (GDPO)": advantages("group", [1.0, 1.0]),
    }
    figure = Figure(figsize=(11, 4.2), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places = torch.arange(len(REWARDS))
    for panel, (title, values) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        conflicts = (values.amax(1) > 0) & (values.amin(1) < 0)
        for index, (name, color) in enumerate(COLORS.items()):
            panel.bar(places + 0.36 * (index - 0.5), values[:, index], width=0.34, color=color, label=name)
        panel.plot(places, values.sum(1), "D", color=INK, markersize=5, label="sum")
        panel.axhline(0, color=MUTED, linewidth=0.8)
        panel.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
        panel.set_xlabel(f"rollout of one prompt ({int(conflicts.sum())} of {len(REWARDS)} conflict)", color=INK)
        panel.set_xticks(places, [str(place + 1) for place in places.tolist()])
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=INK, labelsize=9, color=MUTED)
    figure.axes[0].set_ylabel("advantage, before summing", color=INK)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(OUTPUT)


if __name__ == "__main__":
    draw()
