"""Mistakes in the arguments of a trainer that TRL would only notice after loading models, or not at all."""

import inspect
from typing import Any

from torch import nn

from .rewards.guard import required_arguments


# What TRL passes to every reward function; anything else that a function asks for is a dataset column.
TRL_REWARD_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"}
)


def check_before_loading(call: inspect.BoundArguments) -> None:
    """Find mistakes in the arguments of `GRPOTrainer` that it would only notice after loading models."""
    arguments = call.arguments
    reward_funcs, args = arguments.get("reward_funcs"), arguments["args"]
    dataset = arguments.get("train_dataset")
    adds_rewards = arguments.get("environment_factory") is not None
    adds_columns = adds_rewards or arguments.get("rollout_func") is not None
    if reward_funcs is None:
        reward_funcs = []
    elif not isinstance(reward_funcs, list):
        reward_funcs = [reward_funcs]
    if not reward_funcs and not adds_rewards:
        raise ValueError("`reward_funcs` is empty; give at least one reward function, reward model or model id.")
    for index, func in enumerate(reward_funcs):
        if not isinstance(func, (str, nn.Module)) and not callable(func):
            raise ValueError(f"`reward_funcs[{index}]` is {func!r}; it must be a function, a reward model or its id.")
    weights = args.reward_weights
    if weights is not None and not adds_rewards and len(weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(weights)} entries and there are {len(reward_funcs)} reward functions; give "
            "one weight for each, in their order."
        )
    if adds_columns:
        return
    evaluation = arguments.get("eval_dataset")
    named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    _check_columns("training dataset", dataset, reward_funcs)
    for name, eval_dataset in named.items():
        _check_columns(f"evaluation dataset {name!r}" if name else "evaluation dataset", eval_dataset, reward_funcs)


def _check_columns(what: str, dataset: Any, reward_funcs: list[Any]) -> None:
    columns = getattr(dataset, "column_names", None)
    if not isinstance(columns, list) or not columns:  # unknown before it is read, or a dictionary of splits
        return
    if "prompt" not in columns:
        raise ValueError(
            f"The {what} has no column `prompt` (it has: {', '.join(columns)}). Rename the column that holds the "
            "prompts, or map the dataset."
        )
    for func in reward_funcs:
        is_function = not isinstance(func, (str, nn.Module))
        for column in required_arguments(func, TRL_REWARD_ARGUMENTS) if is_function else []:
            if column not in columns:
                name = getattr(func, "__name__", type(func).__name__)
                raise ValueError(
                    f"The reward function '{name}' needs the dataset column `{column}`, which is missing in the "
                    f"{what} (columns: {', '.join(columns)}). Add it, or give the parameter a default."
                )
