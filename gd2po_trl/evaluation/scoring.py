"""Scores of completions under reward functions, which get what they get in training."""

import gc
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UsageError
from ..reward_guard import RewardError, RewardGuard, refused_arguments, required_arguments, takes_no_kwargs
from ..reward_parts import part_names
from ..rewards import resolve_reward
from .predictions import EvalRow, prefill_of


SUM = "sum"
# Completions per call of a reward function: enough for it to batch by length, few enough for the progress bar to move.
_CHUNK = 512


def resolve_rewards(rewards: dict[str, dict[str, Any]], *, columns: bool = False) -> dict[str, Callable]:
    """
    The reward functions that a recipe's `reward_funcs` and `reward_kwargs` describe, by label.

    Args:
        rewards (`dict[str, dict]`): Keyword arguments by label.
        columns (`bool`, *optional*, defaults to `False`): Whether they may read columns of the data.

    Raises:
        [`UsageError`]: if there is none, or one cannot be found or reads a column of the data and must not.
    """
    if not rewards:
        raise UsageError("No reward to score with; give at least one --reward.")
    resolved = {}
    for label, kwargs in rewards.items():
        reward = resolve_reward(label, kwargs)
        if isinstance(reward, str):
            # A sequence classifier, which the trainer would load itself.
            from ..reward_models.in_process import RewardModel

            reward = RewardModel(reward, label)
        given = ("prompts", "completions", "completion_ids")
        if refused := refused_arguments(reward, given):
            raise UsageError(takes_no_kwargs(label, refused))
        if not columns and (needed := required_arguments(reward, (*given, "prefill"))):
            raise UsageError(
                f"The reward {label!r} needs {', '.join(f'`{name}`' for name in needed)}, and this evaluation gives "
                "rewards the prompts and completions alone; leave it out."
            )
        resolved[label] = reward
    score_labels(resolved)
    return resolved


def score_labels(rewards: dict[str, Callable]) -> list[str]:
    """
    The names of the scores: the labels of `rewards`, and in place of a function with parts these.

    Raises:
        [`UsageError`]: if two have the same name, or one that of the sum.
    """
    labels = [name for label, reward in rewards.items() for name in part_names(reward) or [label]]
    for name in labels:
        if name == SUM:
            raise UsageError(f"A reward cannot be called {SUM!r}; that is the name of their sum.")
        if labels.count(name) > 1:
            raise UsageError(f"Two rewards, or parts of them, are called {name!r}.")
    return labels


def compute_scores(
    rows: Sequence[EvalRow],
    predictions: dict[str, dict[str, dict[str, Any]]],
    rewards: dict[str, Callable],
    **arguments: Any,
) -> dict[str, dict[str, dict[str, float | None]]]:
    """
    Scores completions with every reward, one reward after the other so that one reward model is in memory at a time.

    Args:
        rows (`Sequence[EvalRow]`): Prompts, which the rewards read in full, and their `columns`, if they have any.
        predictions (`dict[str, dict]`): Sets of completions by name (`"model"`, `"baseline"`), each by row id; where
            one has `completion_ids`, the rewards get these too.
        rewards (`dict[str, Callable]`): From [`resolve_rewards`].
        arguments: Further arguments of every reward.

    Returns:
        `dict[str, dict]`: By name of the set and row id: the score per label and `"sum"`, each `None` where a
        completion is missing or a reward gave none (or NaN).

    Raises:
        [`UsageError`]: if a reward fails.
    """
    from tqdm import tqdm

    labels = score_labels(rewards)
    scores: dict[str, dict[str, dict[str, float | None]]] = {
        name: {row.id: dict.fromkeys(labels) for row in rows} for name in predictions
    }
    todo = [
        (name, row, given[row.id])
        for name, given in predictions.items()
        for row in rows
        if row.id in given and given[row.id].get("error") is None
    ]
    prefills: list[str] = []  # of the completions that are scored now
    guard = RewardGuard(prefill=lambda _: prefills)
    for label, function in rewards.items():
        with tqdm(total=len(todo), desc=f"Scoring: {label}", unit="row") as bar:
            for start in range(0, len(todo), _CHUNK):
                names, chunk, given = zip(*todo[start : start + _CHUNK], strict=True)
                prefills = [prefill_of(record) for record in given]
                try:
                    columns = guard.score(function, label, **_data_arguments(chunk, given), **arguments)
                except RewardError as error:
                    raise UsageError(f"{error} The completions are kept.") from error
                for part, column in columns.items():
                    for name, row, value in zip(names, chunk, column, strict=True):
                        if value is not None and math.isfinite(value):
                            scores[name][row.id][part] = value
                bar.update(len(chunk))
        _unload(function)
    for by_row in scores.values():
        for score in by_row.values():
            given = [value for value in score.values() if value is not None]
            score[SUM] = math.fsum(given) if len(given) == len(score) else None
    return scores


def _data_arguments(rows: Sequence[EvalRow], records: Sequence[dict[str, Any]]) -> dict[str, list[Any] | None]:
    """What a reward function is given about rows and their completions, in the form that it has in training."""
    texts = [record["completion"] for record in records]
    ids = [record.get("completion_ids") for record in records]
    columns = [getattr(row, "columns", {}) for row in rows]
    names = dict.fromkeys(name for of_row in columns for name in of_row)
    return {
        "prompts": [row.prompt for row in rows],
        "completions": [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ],
        "completion_ids": None if None in ids else ids,
        **{name: [of_row.get(name) for of_row in columns] for name in names},
    }


def _unload(reward: Callable) -> None:
    """Has a reward model give its memory back before the next one is loaded; other functions keep what they hold."""
    unload = getattr(inspect.unwrap(reward), "unload", None)
    if callable(unload):
        unload()
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
