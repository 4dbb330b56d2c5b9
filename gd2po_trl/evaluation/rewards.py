"""
Any rewards on any data: the mean of each before and after a training, and what lies between.

Prompts, completions and columns reach the rewards as in training; completions are greedy, one per prompt. Means and
differences have 95 % intervals (Student's t over the prompts), win rates Wilson's, as in the other evaluations.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..preflight import UNPASSED_COLUMNS, check_data
from ..reporting import print_table
from ..terminal import number
from .intervals import mean_and_interval, win_rate
from .predictions import EvalRow
from .scoring import SUM


if TYPE_CHECKING:
    pass

Scores = dict[str, dict[str, float | None]]


@dataclass(frozen=True)
class RewardRow(EvalRow):
    """One prompt of the data set labeled `dataset`, with the columns of its row, which reward functions may read."""

    dataset: str
    columns: dict[str, Any] = field(default_factory=dict)


def load_rows(
    datasets: dict[str, dict[str, Any]], rewards: dict[str, Callable], limit: int | None = None
) -> list[RewardRow]:
    """
    Loads prompts with their columns; ids are `label/0`, ...

    Args:
        datasets (`dict[str, dict]`):
            By label: arguments of [`~gd2po_trl.datasets.load_dataset_by_name`], where `name` defaults to the label.
        rewards (`dict[str, Callable]`): Reward functions by label, whose columns must be there.
        limit (`int`, *optional*): First rows of each data set. All by default.

    Raises:
        [`UsageError`]: if a data set is unknown, missing or empty, or lacks a column that a reward needs.
    """
    from ..datasets import load_dataset_by_name

    rows: list[RewardRow] = []
    for label, options in datasets.items():
        dataset = load_dataset_by_name(**{"name": label, "limit": limit, **options})
        if len(dataset) == 0:
            raise UsageError(f"The data set '{label}' has no rows.")
        try:
            check_data(f"data set '{label}'", dataset, list(rewards.values()), False)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(str(error)) from error
        names = [name for name in dataset.column_names if name not in UNPASSED_COLUMNS]
        for index, record in enumerate(dataset):
            columns = {name: record[name] for name in names}
            rows.append(RewardRow(f"{label}/{index}", _prompt(record["prompt"]), label, columns))
    if len({isinstance(row.prompt, str) for row in rows}) > 1:
        raise UsageError("One data set has prompts that are text and another has messages; evaluate them one by one.")
    return rows


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    # Arrow gives every message the keys of all.
    return [{key: value for key, value in message.items() if value is not None} for message in prompt]


def reward_arguments(model: str | None) -> dict[str, Any]:
    """What TRL passes to reward functions beside data: the state of the training in folder `model`, and two sinks."""
    from transformers import TrainerState

    try:
        state = TrainerState.load_from_json(str(Path(model or "") / "trainer_state.json"))
    except (OSError, ValueError, TypeError):
        state = TrainerState()
    ignored = {"log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
    return {"trainer_state": state, **ignored}


def add_completion_ids(sets: Iterable[dict[str, dict[str, Any]]], model: str) -> None:
    """Adds what each completion is in tokens of the tokenizer in `model`, for rewards that count them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        return  # an adapter without a tokenizer of its own
    for records in sets:
        for record in records.values():
            ids = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            ended = record.get("finish_reason") == "stop" and tokenizer.eos_token_id is not None
            record["completion_ids"] = [*ids, *([tokenizer.eos_token_id] if ended else [])]


def summarize(
    rows: Sequence[RewardRow],
    predictions: dict[str, dict[str, Any]],
    scores: Scores,
    weights: dict[str, float],
    before: Scores | None = None,
) -> dict[str, Any]:
    """
    The results per data set.

    Args:
        rows (`Sequence[RewardRow]`): Prompts.
        predictions (`dict[str, dict]`): Completions by row id, for the counts.
        scores (`dict[str, dict]`): Score per row id and reward, `None` where there is none.
        weights (`dict[str, float]`): Weight of each reward in the sum.
        before (`dict[str, dict]`, *optional*): The same of the model before the training.

    Returns:
        `dict[str, Any]`: `datasets`: by label `rows`, `missing` (no completion), `cut_off` (by the token limit) and
        `rewards`: for each reward, and for their weighted `sum` if there are several, `scored` rows, `mean` and
        `interval`; with `before` also `before_mean`, `before_interval` and, over the rows that both scored,
        `difference`, `difference_interval` and `win_rate`.
    """
    labels = [*weights, *([SUM] if len(weights) > 1 else [])]
    results: dict[str, Any] = {}
    for dataset in dict.fromkeys(row.dataset for row in rows):
        members = [row.id for row in rows if row.dataset == dataset]
        given = [predictions[key] for key in members if key in predictions]
        entry: dict[str, Any] = {
            "rows": len(members),
            "missing": len(members) - sum(record.get("error") is None for record in given),
            "cut_off": sum(record.get("finish_reason") == "length" for record in given),
            "rewards": {},
        }
        for label in labels:
            after = [_score(scores[key], label, weights) for key in members]
            known = [value for value in after if value is not None]
            mean, interval = mean_and_interval(known)
            figures: dict[str, Any] = {"scored": len(known), "mean": mean, "interval": interval}
            if before is not None:
                first = [_score(before[key], label, weights) for key in members]
                pairs = [(a, b) for a, b in zip(after, first, strict=True) if a is not None and b is not None]
                figures["before_mean"], figures["before_interval"] = mean_and_interval(
                    [value for value in first if value is not None]
                )
                figures["difference"], figures["difference_interval"] = mean_and_interval([a - b for a, b in pairs])
                figures["win_rate"] = win_rate(pairs)
            entry["rewards"][label] = figures
        results[dataset] = entry
    return {"task": "rewards", "datasets": results}


def _score(score: dict[str, float | None], label: str, weights: dict[str, float]) -> float | None:
    if label != SUM:
        return score[label]
    # A reward of weight 0 is only watched: where it gave no score, the sum is none the worse.
    values = [(weight, score[name]) for name, weight in weights.items() if weight]
    scored = [weight * value for weight, value in values if value is not None]
    return math.fsum(scored) if len(scored) == len(values) else None


def print_results(results: dict[str, Any]) -> None:
    """Prints a table per data set: before, after, the difference with its interval, and how often the model wins."""
    for name, entry in results["datasets"].items():
        figures = entry["rewards"]
        compared = any("difference" in figure for figure in figures.values())
        lines = []
        for label, figure in figures.items():
            if not compared:
                lines.append([label, _numbers([figure["mean"]]), _numbers(figure["interval"])])
                continue
            wins = figure["win_rate"]
            lines.append(
                [
                    label,
                    _numbers([figure["before_mean"]]),
                    _numbers([figure["mean"]]),
                    _numbers([figure["difference"]], "+"),
                    _numbers(figure["difference_interval"], "+"),
                    "–" if wins["rate"] is None else f"{100 * wins['rate']:.0f} ({_percent(wins['interval'])})",
                ]
            )
        columns = ["reward", "before", "after", "change", "95 % interval", "better in % of prompts"]
        columns = columns if compared else ["reward", "mean", "95 % interval"]
        caption = "Better: a tie counts half, with its 95 % interval." if compared else ""
        print()
        print_table(f"{name}: {entry['rows']:,} prompts", columns, lines, caption)
        print(*_notes(entry), sep="\n", end="\n" * bool(_notes(entry)))


def _notes(entry: dict[str, Any]) -> list[str]:
    notes = []
    if entry["cut_off"]:
        notes.append(f"{entry['cut_off']} completions were cut off by --max-new-tokens.")
    if entry["missing"]:
        notes.append(f"{entry['missing']} prompts have no completion and are left out.")
    for label, figure in entry["rewards"].items():
        if label != SUM and (unscored := entry["rows"] - entry["missing"] - figure["scored"]):
            notes.append(f"{label} gave no score for {unscored} completions.")
    return notes


def _numbers(values: Sequence[float | None] | None, sign: str = "-") -> str:
    return " to ".join(number(value, sign) for value in values or () if value is not None) or "–"


def _percent(interval: list[float]) -> str:
    return " to ".join(f"{100 * bound:.0f}" for bound in interval)
