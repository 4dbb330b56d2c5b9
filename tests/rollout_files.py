"""Rollouts in files, and what `gd2po analyze` makes of them, for its tests."""

import numpy as np
import pandas as pd

from gd2po_trl import analysis
from gd2po_trl.cli import main as gd2po


HAND_MADE = [
    # step, prompt, completion, correctness, length
    (1, "p", "a", 3.0, 0.1),  # up, down: conflict
    (1, "p", "b", 3.0, 0.4),  # up, up
    (1, "p", "c", -3.0, 0.5),  # down, up: conflict
    (1, "p", "d", -3.0, 0.0),  # down, down
    (1, "q", "a", 3.0, 0.2),  # no signal in either
    (1, "q", "b", 3.0, 0.2),
    (1, "q", "c", 3.0, 0.2),
    (1, "q", "d", 3.0, 0.2),
    (2, "p", "a", 1.0, 0.3),  # up, mean
    (2, "p", "b", -1.0, 0.3),  # down, mean
    (2, "p", "c", 1.0, 0.1),  # up, down: conflict
    (2, "p", "d", -1.0, 0.5),  # down, up: conflict
]
COLUMNS = ["step", "prompt", "completion", "correctness", "length"]


def hand_made_table() -> pd.DataFrame:
    return pd.DataFrame(HAND_MADE, columns=COLUMNS)


def rollouts_table(prompts, steps=None) -> pd.DataFrame:
    table = pd.DataFrame({"prompt": prompts, "completion": [f"c{row}" for row in range(len(prompts))]})
    generator = np.random.default_rng(0)
    table["a"], table["b"] = generator.normal(size=(2, len(prompts)))
    if steps is not None:
        table["step"] = steps
    return table


def write(table: pd.DataFrame, path):
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        table.to_json(path, orient="records", lines=True)
    return path


def analyze(*sources, thresholds=(0.2, 0.8), **options):
    return analysis.analyze(*sources, thresholds=thresholds, **options)


def command(*arguments) -> int:
    return gd2po(["analyze", *map(str, arguments)])
