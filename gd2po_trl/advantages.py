"""Rewards in, advantages out: the estimator of GD²PO and of its relatives, as pure tensor math.

The formulas are those of GD²PO (arXiv 2606.16771) and GDPO (arXiv 2601.05242). Everything here is vectorized over the
whole generation batch, runs on the device of its input and never waits for it.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import one_line
from .user_input import is_number


CONFLICT_FILTERS = ("hard", "snr", None)
CONSENSUS_WEIGHTINGS = ("before_whitening", "after_whitening", None)
WHITENINGS = ("token", "sequence", None)
SCALE_REWARDS = ("group", "batch", "none")

# What an estimator is given by name, beside the two arguments by place.
ESTIMATOR_INPUTS = ("per_reward", "rewards", "reward_weights", "token_counts", "conflict", "agreement")

# An advantage within this distance of zero has no sign.
SIGN_EPS = 1e-8
# Added to a standard deviation before it divides.
STD_EPS = 1e-6
# A reward this close to its group's mean, relative to the group's largest reward, is equal to it: the rest is the
# rounding of float32 and must not vote in a conflict.
RESIDUE = 1e-6
# Added to the variance that whitens.
VARIANCE_EPS = 1e-8


@dataclass(frozen=True)
class AdvantageBreakdown:
    """
    The advantages of a generation batch of B rollouts under K rewards, with every step on the way to them.

    Floating tensors have the dtype of the rewards (float32 for integer rewards); all tensors are on their device.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            What the policy loss multiplies. Exactly 0 for dropped, unscored and empty rollouts.
        per_reward (`torch.Tensor` of shape `(B, K)`):
            Weighted, group-normalized advantage of each reward; 0 where the reward did not score the rollout.
        combined (`torch.Tensor` of shape `(B,)`):
            Sum of `per_reward` over the rewards, or what the `estimator` made of them, before filter, consensus weight
            and whitening.
        conflict (`torch.Tensor` of shape `(B,)`, bool):
            Whether one reward pushes the rollout up while another pushes it down.
        kept (`torch.Tensor` of shape `(B,)`, bool):
            Whether the rollout was scored and survived the filter.
        agreement (`torch.Tensor` of shape `(B,)`):
            Signed share of the push on which the rewards agree, `sum_k A / sum_k |A|`, in [-1, 1].
        consensus (`torch.Tensor` of shape `(B,)`):
            Kept share of the rollout's group, in [0, 1]; 0 for a group that no reward scored.
    """

    advantages: torch.Tensor
    per_reward: torch.Tensor
    combined: torch.Tensor
    conflict: torch.Tensor
    kept: torch.Tensor
    agreement: torch.Tensor
    consensus: torch.Tensor


def check_choice(field: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a `ValueError` that names `field`, `value` and what is `allowed`, unless `value` is one of them."""
    if value not in allowed:
        raise ValueError(f"`{field}` is {value!r}; it must be one of {', '.join(repr(choice) for choice in allowed)}.")


def check_snr_threshold(value: Any) -> None:
    """Raise a `ValueError` unless `value` is a number in [0, 1]."""
    if not is_number(value) or not 0.0 <= value <= 1.0:
        raise ValueError(f"`snr_threshold` is {value!r}; it must be a number in [0, 1] (the published runs use 0.8).")


def check_update_share(value: Any) -> None:
    """Raise a `ValueError` unless `value` is a number in (0, 1]."""
    if not is_number(value) or not 0.0 < value <= 1.0:
        raise ValueError(f"`update_share` is {value!r}; it must be a number above 0 and at most 1 (1 trains all).")


def survives_filter(
    conflict: torch.Tensor, agreement: torch.Tensor, conflict_filter: str | None, snr_threshold: float = 0.8
) -> torch.Tensor:
    """
    Which rollouts a conflict filter keeps: the one place where filters are defined.

    A new one is a name in `CONFLICT_FILTERS` and a case here. Training, metrics and recipes have it then; `METHODS`
    makes it a method, and `analysis/measures.py` chooses those that `gd2po analyze` reports.

    Args:
        conflict (`torch.Tensor`, bool): Whether the rewards disagree on a rollout.
        agreement (`torch.Tensor` of the same shape): Signed share of the push on which they agree.
        conflict_filter (`str` or `None`), snr_threshold (`float`): As in [`compute_advantages`].

    Returns:
        `torch.Tensor` of the same shape, bool.
    """
    if conflict_filter is None:
        return torch.ones_like(conflict)
    if conflict_filter == "snr":
        return ~(conflict & (agreement.abs() < snr_threshold))
    if conflict_filter == "hard":
        return ~conflict
    raise NotImplementedError(f"the conflict filter {conflict_filter!r} has no case in `survives_filter`")


def compute_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    *,
    reward_weights: torch.Tensor | Sequence[float] | None = None,
    token_counts: torch.Tensor | Sequence[int] | None = None,
    conflict_filter: str | None = "hard",
    snr_threshold: float = 0.8,
    consensus_weighting: str | None = "before_whitening",
    whitening: str | None = "token",
    whitening_shift_mean: bool = True,
    scale_rewards: str = "group",
    estimator: Callable[..., torch.Tensor] | None = None,
) -> AdvantageBreakdown:
    """
    Advantages of a generation batch under several rewards: GDPO, GD²PO-Hard or GD²PO-SNR, depending on the settings.

    Each reward is normalized within its group of `num_generations` rollouts; rollouts on which the rewards disagree
    are dropped; a group counts by the share of it that is kept; the sum over the rewards is whitened over the batch.
    The arithmetic is in float64 (float32 on devices without it) whatever the dtype of the rewards.

    Args:
        rewards (`torch.Tensor` of shape `(B, K)`):
            Reward of each rollout under each of the K reward functions; a prompt's rollouts are contiguous. NaN where
            a function did not score the rollout. Infinite values are the caller's to refuse: testing for them here
            would make the host wait for the device.
        num_generations (`int`):
            Rollouts per group, G. B must be a multiple of it.
        reward_weights (`torch.Tensor` or sequence of `float`, shape `(K,)`, *optional*):
            Weight of each reward; 1 where not given. A reward of weight 0 is a monitor: it is in no conflict. A
            negative weight turns its sign.
        token_counts (`torch.Tensor` or sequence of `int`, shape `(B,)`, *optional*):
            Trained tokens of each rollout; 1 each where not given. A rollout without tokens is kept, conflicts with
            nothing and has advantage 0.
        conflict_filter (`str` or `None`, *optional*, defaults to `"hard"`):
            Which conflicting rollouts to drop: `"hard"` all, `"snr"` those whose agreement is below `snr_threshold` in
            absolute value, `None` none (that is GDPO).
        snr_threshold (`float`, *optional*, defaults to `0.8`):
            Threshold of the SNR filter, in [0, 1]; 0 drops nothing.
        consensus_weighting (`str` or `None`, *optional*, defaults to `"before_whitening"`):
            Where the kept share of the group multiplies the advantage: `"before_whitening"` (the released code),
            `"after_whitening"` (the paper, where it weights the query's loss) or `None`.
        whitening (`str` or `None`, *optional*, defaults to `"token"`):
            Batch whitening over the kept rollouts, each counted by its tokens (`"token"`) or once (`"sequence"`, as in
            TRL's GDPO), or `None`.
        whitening_shift_mean (`bool`, *optional*, defaults to `True`):
            Whether whitening subtracts the mean. It gives a small advantage to rollouts of groups that carry no
            signal; `False` only scales, by the spread about 0.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            Divisor of each reward's deviation from its group mean: the standard deviation of its group, of the batch,
            or `"none"`.
        estimator (`Callable`, *optional*):
            Takes the place of the sum over the rewards: `(per_reward, num_generations, ...)` to a floating tensor
            `(B,)`. A first parameter called `rewards` gets the raw rewards, NaN where unscored, in the place of
            `per_reward`. Further parameters are given by name: `rewards`, `per_reward`, `reward_weights`,
            `token_counts`, `conflict` and `agreement`. Filter, consensus weight and whitening apply to what it
            returns; its value for a rollout that no reward scored is not used.

    Returns:
        [`AdvantageBreakdown`]

    Raises:
        `ValueError`: for a wrong shape or setting, naming it and what is allowed, and for an estimator that fails or
            returns anything but one finite number per rollout.

    Example:

    ```python
    >>> import torch
    >>> from gd2po_trl import compute_advantages
    >>> rewards = torch.tensor([[3.0, 0.0], [3.0, 1.0], [0.0, 0.0], [0.0, 1.0]])  # correctness, length
    >>> compute_advantages(rewards, num_generations=4).kept
    tensor([False,  True,  True, False])

    ```
    """
    check_choice("conflict_filter", conflict_filter, CONFLICT_FILTERS)
    check_choice("consensus_weighting", consensus_weighting, CONSENSUS_WEIGHTINGS)
    check_choice("whitening", whitening, WHITENINGS)
    check_choice("scale_rewards", scale_rewards, SCALE_REWARDS)
    check_snr_threshold(snr_threshold)
    if rewards.dim() != 2:
        raise ValueError(f"`rewards` has shape {tuple(rewards.shape)}; it must be (rollouts, reward functions).")
    batch_size, num_rewards = rewards.shape
    if num_generations < 1 or batch_size % num_generations != 0:
        raise ValueError(
            f"`num_generations` is {num_generations} and the batch holds {batch_size} rollouts; the batch must hold "
            "whole groups of at least one rollout."
        )
    device = rewards.device
    output_dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    dtype = torch.float32 if device.type == "mps" else torch.float64

    # Everything below is laid out as (rewards, generations, groups): sums over a group or over the rewards then run
    # along contiguous memory, which is several times faster.
    by_group = (batch_size // num_generations, num_generations)
    values = rewards.to(dtype).reshape(*by_group, num_rewards).permute(2, 1, 0).contiguous()
    per_reward, scored = _normalize(values, scale_rewards)
    weights = torch.ones(num_rewards, dtype=dtype, device=device)
    if reward_weights is not None:
        weights = torch.as_tensor(reward_weights, dtype=dtype, device=device)
        if weights.shape != (num_rewards,):
            raise ValueError(
                f"`reward_weights` has shape {tuple(weights.shape)}; there are {num_rewards} reward functions."
            )
        per_reward = per_reward * weights.view(-1, 1, 1)
    combined = per_reward.sum(0)
    agreement = combined / (per_reward.abs().sum(0) + SIGN_EPS)

    conflict = (per_reward.amax(0) > SIGN_EPS) & (per_reward.amin(0) < -SIGN_EPS)
    if token_counts is None:
        counts = scored.to(dtype)
    else:
        counts = torch.as_tensor(token_counts, device=device).to(dtype)
        if counts.shape != (batch_size,):
            raise ValueError(f"`token_counts` has shape {tuple(counts.shape)}; the batch holds {batch_size} rollouts.")
        counts = counts.view(by_group).t().contiguous()
        conflict = conflict & (counts > 0)
    kept = scored & survives_filter(conflict, agreement, conflict_filter, snr_threshold)
    if estimator is not None:
        by_rollout = {"conflict": conflict, "agreement": agreement, "scored": scored, "token_counts": counts}
        combined = _estimate(
            estimator,
            per_reward.permute(2, 1, 0).reshape(batch_size, num_rewards).clone(),
            num_generations,
            rewards=rewards.to(dtype).clone(),
            reward_weights=weights.clone(),
            **{name: value.t().reshape(batch_size).clone() for name, value in by_rollout.items()},
        )
        combined = combined.view(by_group).t()

    kept_per_group = kept.sum(0, dtype=dtype)
    scored_per_group = scored.sum(0, dtype=dtype)
    consensus = (kept_per_group / scored_per_group.clamp(min=1.0)).expand_as(combined)

    trained = kept & (counts > 0)
    advantages = torch.where(trained, combined, 0.0)
    if consensus_weighting == "before_whitening":
        advantages = advantages * consensus
    if whitening is not None:
        counts = torch.where(kept, counts, 0.0) if whitening == "token" else trained.to(dtype)
        advantages = _whiten(advantages, counts, shift_mean=whitening_shift_mean)
    if consensus_weighting == "after_whitening":
        advantages = advantages * consensus

    return AdvantageBreakdown(
        advantages=advantages.to(output_dtype).t().reshape(batch_size),
        per_reward=per_reward.to(output_dtype).permute(2, 1, 0).reshape(batch_size, num_rewards),
        combined=combined.to(output_dtype).t().reshape(batch_size),
        conflict=conflict.t().reshape(batch_size),
        kept=kept.t().reshape(batch_size),
        agreement=agreement.to(output_dtype).t().reshape(batch_size),
        consensus=consensus.to(output_dtype).t().reshape(batch_size),
    )


def _estimate(
    estimator: Callable[..., torch.Tensor],
    per_reward: torch.Tensor,
    num_generations: int,
    *,
    scored: torch.Tensor,
    **inputs: torch.Tensor,
) -> torch.Tensor:
    """What an estimator of the user's own makes of the rewards, `(B,)`, checked; 0 for rollouts that none scored."""
    unbound: Any = estimator
    while isinstance(unbound, functools.partial):
        unbound = unbound.func
    name = f"The estimator '{getattr(unbound, '__name__', type(unbound).__name__)}'"
    try:
        parameters = list(inspect.signature(estimator).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        parameters = []
    inputs["per_reward"] = per_reward
    first = "rewards" if parameters and parameters[0].name == "rewards" else "per_reward"
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters[2:]}
    further = {key: value for key, value in inputs.items() if key in named or (takes_all and key != first)}
    try:
        with torch.no_grad():
            combined = estimator(inputs[first], num_generations, **further)
    except Exception as error:
        raise ValueError(f"{name} raised {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(combined, torch.Tensor) or combined.shape != scored.shape or not combined.is_floating_point():
        what = f"{combined.dtype} of shape {tuple(combined.shape)}" if isinstance(combined, torch.Tensor) else combined
        raise ValueError(
            f"{name} returned {what!s:.80}; it must return a floating tensor of shape {tuple(scored.shape)}, one "
            "number per rollout."
        )
    combined = torch.where(scored, combined.to(per_reward), 0.0)
    if bad := int((~combined.isfinite()).sum()):
        raise ValueError(f"{name} returned {bad} numbers that are not finite, for {len(scored)} rollouts.")
    return combined


def _normalize(rewards: torch.Tensor, scale_rewards: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize `rewards` `(K, G, groups)` per group; also return which rollouts any reward scored, `(G, groups)`."""
    is_scored = ~torch.isnan(rewards)
    values = torch.where(is_scored, rewards, 0.0)
    count = is_scored.sum(1, keepdim=True, dtype=rewards.dtype)
    deviation = values - values.sum(1, keepdim=True) / count.clamp(min=1.0)
    residue = RESIDUE * values.abs().amax(1, keepdim=True)
    deviation = torch.where(is_scored & (deviation.abs() > residue), deviation, 0.0)
    if scale_rewards == "group":
        deviation = deviation / (_sample_std(deviation, count, dim=1) + STD_EPS)
    elif scale_rewards == "batch":
        total = is_scored.sum((1, 2), keepdim=True, dtype=rewards.dtype)
        mean = values.sum((1, 2), keepdim=True) / total.clamp(min=1.0)
        centered = torch.where(is_scored, values - mean, 0.0)
        deviation = deviation / (_sample_std(centered, total, dim=(1, 2)) + STD_EPS)
    return deviation, is_scored.any(0)


def _sample_std(deviation: torch.Tensor, count: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    return ((deviation * deviation).sum(dim, keepdim=True) / (count - 1).clamp(min=1.0)).sqrt()


def _whiten(values: torch.Tensor, counts: torch.Tensor, *, shift_mean: bool) -> torch.Tensor:
    """Whiten `values`, each occurring `counts` times; exactly 0 where it does not occur."""
    total = counts.sum()
    if shift_mean:
        mean = (counts * values).sum() / total.clamp(min=1.0)
        # A mean that is 0 but for the rounding of its sum must not give rollouts without signal an advantage.
        rounding = 64 * torch.finfo(values.dtype).eps * values.abs().amax() if values.numel() else 0.0
        values = values - mean
        values = torch.where(values.abs() > rounding, values, 0.0)
    # Without the shift this is the spread about 0: that about the mean is next to 0 where all values are alike.
    variance = (counts * values * values).sum() / (total - 1.0).clamp(min=1.0)
    scaled = values * torch.rsqrt(variance + VARIANCE_EPS)
    # A single occurrence has no variance to divide by.
    return torch.where((counts > 0) & (total > 1), scaled, 0.0)


def subsample_advantages(advantages: torch.Tensor, share: float, *, generator: torch.Generator) -> torch.Tensor:
    """
    Draw about `share` of the rollouts of a generation batch for the update, without bias.

    A rollout is drawn with a probability p proportional to the size of its advantage (at most 1) and then counts
    1 / p times as much, so that the mean over draws is `advantages` for every rollout. All decisions come from one
    random number (systematic sampling, Madow 1949), so that the number of rollouts drawn is within one of
    `min(share * B, rollouts with an advantage)`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            Final advantages of the whole generation batch, finite; 0 for a rollout that cannot be trained.
        share (`float`):
            Share of the B rollouts to train, in (0, 1]. 1 returns the advantages as they are.
        generator (`torch.Generator`):
            Source of the random number: one `float64`, drawn on the generator's device.

    Returns:
        `torch.Tensor` of shape `(B,)`, dtype and device of `advantages`: `advantages / p` for the rollouts drawn,
        exactly 0 for the others.

    Raises:
        `ValueError`: for another share (the message names `update_share`) or a wrong shape.

    Example:

    ```python
    >>> import torch
    >>> from gd2po_trl import subsample_advantages
    >>> advantages = torch.tensor([2.0, -1.0, 0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    >>> subsample_advantages(advantages, 0.25, generator=torch.Generator().manual_seed(0))
    tensor([ 2., -2.,  0.,  0.,  0.,  0.,  0.,  0.])

    ```
    """
    check_update_share(share)
    if advantages.dim() != 1:
        raise ValueError(f"`advantages` has shape {tuple(advantages.shape)}; it must be (rollouts,).")
    uniform = torch.rand((), dtype=torch.float64, generator=generator, device=generator.device)
    return subsample_at(advantages, share, uniform)


def subsample_at(advantages: torch.Tensor, share: float, uniform: torch.Tensor) -> torch.Tensor:
    """
    [`subsample_advantages`] at a given random number.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`):
            Final advantages.
        share (`float`):
            Share of the B rollouts to train, in (0, 1].
        uniform (`torch.Tensor` of shape `()`):
            A number in [0, 1).

    Returns:
        `torch.Tensor` of shape `(B,)`
    """
    # MPS has no float64, and this is a handful of numbers.
    device = torch.device("cpu") if advantages.device.type == "mps" else advantages.device
    values = advantages.to(device, torch.float64)
    probability = draw_probabilities(values, share)
    # A probability of 1 shifts the running sum by an integer, which decides nothing for the others: left out of it, it
    # cannot be lost to rounding either.
    certain = probability >= 1.0
    position = torch.where(certain, 0.0, probability).cumsum(0) + uniform.to(device, torch.float64)
    count = position.floor()
    before = torch.cat([torch.zeros_like(count[:1]), count[:-1]])
    # NaN stays NaN, so that it shows in the loss.
    drawn = certain | (count > before) | values.isnan()
    drawn_values = torch.where(drawn & (values != 0), values / probability, 0.0)
    return drawn_values.to(advantages.device, advantages.dtype)


def draw_probabilities(advantages: torch.Tensor, share: float) -> torch.Tensor:
    """
    The probability with which each rollout is drawn: `min(1, c |advantage|)`, c such that the sum is
    `min(share * B, rollouts with an advantage)`.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`, float64):
            Final advantages.
        share (`float`):
            Share of the B rollouts to train, in (0, 1].

    Returns:
        `torch.Tensor` of shape `(B,)`, float64, in [0, 1]; 0 exactly where the advantage is 0.
    """
    size = advantages.abs()
    nonzero = (size > 0).sum().to(size.dtype)
    target = torch.clamp(nonzero, max=share * len(size))
    # How many of the largest are drawn for certain: those whose part of what the larger ones leave would exceed 1.
    descending, order = size.sort(descending=True, stable=True)
    remaining = descending.flip(0).cumsum(0).flip(0)
    left = target - torch.arange(len(size), dtype=size.dtype, device=size.device)
    is_certain = ((left * descending >= remaining) & (descending > 0)) | ((target == nonzero) & (descending > 0))
    num_certain = is_certain.sum()
    rest = torch.where(is_certain, 0.0, descending).sum()
    certain = torch.zeros_like(is_certain).scatter(0, order, is_certain)
    proportional = size / torch.where(rest == 0, 1.0, rest) * (target - num_certain)
    return torch.where(certain, 1.0, proportional.clamp(max=1.0))
