"""Estimators beside the sum: two examples, and how a recipe's `estimator` becomes a function."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .advantages import ESTIMATOR_INPUTS, compute_advantages
from .errors import UsageError
from .rewards.user_code import as_dotted_path, build_object, import_object


def rvpo(
    per_reward: torch.Tensor,
    num_generations: int,
    rewards: torch.Tensor,
    reward_weights: torch.Tensor,
    k: float = 1.0,
) -> torch.Tensor:
    """
    RVPO (arXiv 2605.05750): `-(1/k) ln((1/K) sum_j exp(-k A_j))`, a soft minimum over the rewards.

    Args:
        per_reward (`torch.Tensor` of shape `(B, K)`): Weighted, normalized advantages A.
        num_generations (`int`): Rollouts per group.
        rewards (`torch.Tensor` of shape `(B, K)`), reward_weights (`torch.Tensor` of shape `(K,)`):
            A reward that did not score the rollout, or of weight 0, is left out of the mean.
        k (`float`, *optional*, defaults to 1.0): Positive. Near 0 it is the mean, large it is the minimum.

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    if not k > 0:
        raise ValueError(f"`k` is {k!r}; it must be positive.")
    counts = ~rewards.isnan() & (reward_weights != 0)
    exponents = torch.where(counts, -k * per_reward, -torch.inf)
    soft_minimum = -(exponents.logsumexp(1) - counts.sum(1, dtype=per_reward.dtype).log()) / k
    return torch.where(counts.any(1), soft_minimum, 0.0)


def soft_conflicts(
    per_reward: torch.Tensor, num_generations: int, conflict: torch.Tensor, agreement: torch.Tensor
) -> torch.Tensor:
    """
    A conflicting rollout counts by how far the rewards agree on it, in place of being dropped: its sum times
    `|agreement|`. Meant for `conflict_filter=None`.

    Args:
        per_reward (`torch.Tensor` of shape `(B, K)`): Weighted, normalized advantages.
        num_generations (`int`): Rollouts per group.
        conflict (`torch.Tensor` of shape `(B,)`, bool): Whether the rewards disagree.
        agreement (`torch.Tensor` of shape `(B,)`): Signed share of the push on which they agree.

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    combined = per_reward.sum(1)
    return torch.where(conflict, combined * agreement.abs(), combined)


def load_estimator(
    estimator: Any, kwargs: Any = None, *, beside: Path | None = None
) -> Callable[..., torch.Tensor] | None:
    """
    The function that the setting `estimator` stands for, with its keyword arguments.

    Args:
        estimator (`Callable`, `str` or `None`):
            A function, a class to be built with `kwargs`, the dotted path of either, or `module.py:function`.
        kwargs (mapping, *optional*):
            Keyword arguments.
        beside (`Path`, *optional*):
            Folder of the recipe, for the message about a module that is not found.

    Raises:
        [`UsageError`]: if there is no such function, or it does not take these keyword arguments.
    """
    if isinstance(estimator, str):
        path = as_dotted_path(estimator)
        if path is None:
            raise UsageError(f"`estimator` is {estimator!r}; it must be a dotted path such as my_estimators.minimum.")
        estimator = import_object(path, "`estimator`", beside)
    if estimator is None or not (kwargs or inspect.isclass(estimator)):
        return estimator
    return build_object(estimator, "`estimator`", dict(kwargs or {}), ("num_generations", *ESTIMATOR_INPUTS))


def check_estimator(estimator: Callable[..., torch.Tensor], num_rewards: int, num_generations: int) -> None:
    """
    Try an estimator on two groups of rewards of 0 and 1, so that its mistakes show before a model loads.

    Raises:
        `ValueError`: as [`compute_advantages`].
    """
    rollouts, rewards = torch.arange(2 * num_generations), torch.arange(num_rewards)
    with torch.random.fork_rng(devices=[]):
        compute_advantages((rollouts.unsqueeze(1) % (rewards + 2) == 0).double(), num_generations, estimator=estimator)
