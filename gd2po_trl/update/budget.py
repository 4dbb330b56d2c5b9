"""
The update budget in training: which rollouts of each generation batch are drawn, the same on every process and after
resuming, and with which settings it cannot be combined.
"""

from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..advantages import subsample_advantages
from .rows import LOSS_DENOMINATORS, tokens_with_gradient


def refuse_update_share(args: Any, *, has_auxiliary_loss: bool = False) -> None:
    """
    Raise a `ValueError` if `update_share` below 1 is combined with a term of the loss that trains every rollout.

    Args:
        args ([`GD2POConfig`]): The configuration.
        has_auxiliary_loss (`bool`): Whether the model adds the load-balancing loss of a mixture of experts.
    """
    if args.update_share == 1:
        return
    culprit = None
    if args.beta != 0:
        culprit = f"`beta={args.beta}`: the KL term trains every rollout. Set it to 0"
    elif getattr(args, "use_adaptive_entropy", False):
        culprit = "`use_adaptive_entropy`: the entropy bonus trains every rollout. Switch it off"
    elif getattr(args, "entropy_coef", 0.0) != 0:
        culprit = (
            f"`entropy_coef={args.entropy_coef}`: the entropy bonus trains every rollout. Set `entropy_coef` to 0"
        )
    elif args.top_entropy_quantile < 1:
        culprit = (
            f"`top_entropy_quantile={args.top_entropy_quantile}`, which ranks the tokens of every rollout. Set it to 1"
        )
    elif has_auxiliary_loss:
        culprit = (
            "the auxiliary loss of a mixture of experts (`router_aux_loss_coef`), which trains every rollout. Set "
            "`router_aux_loss_coef` to 0"
        )
    elif args.loss_type not in LOSS_DENOMINATORS:
        culprit = (
            f"`loss_type={args.loss_type!r}`, which is not known to be linear in the advantage. Use one of "
            f"{', '.join(LOSS_DENOMINATORS)}"
        )
    if culprit is not None:
        raise ValueError(
            f"`update_share={args.update_share}` cannot be combined with {culprit}, or `update_share` to 1."
        )


def trainable_advantages(batch: dict[str, Any], loss_type: str) -> torch.Tensor:
    """
    The advantages `(B,)` of a batch of TRL's, 0 for rollouts without a gradient.
    """
    return torch.where(tokens_with_gradient(batch, loss_type).any(1), batch["advantages"], 0.0)


def budget_metrics(advantages: torch.Tensor, drawn: torch.Tensor) -> dict[str, float]:
    """
    What the budget did to a generation batch: `drawn_ratio`, the share of rollouts drawn, and, where a rollout has an
    advantage, `budget_noise`, by how much the mean squared advantage grew.

    Args:
        advantages (`torch.Tensor` of shape `(B,)`): Advantages before the draw.
        drawn (`torch.Tensor` of shape `(B,)`): Advantages after it.
    """
    drawn_ratio, before, after = torch.stack(
        [(drawn != 0).float().mean(), advantages.float().square().sum(), drawn.float().square().sum()]
    ).tolist()
    return {"drawn_ratio": drawn_ratio, **({"budget_noise": after / before} if before > 0 else {})}


class UpdateBudget(TrainerCallback, ExportableState):
    """
    Draws the rollouts of one generation batch after another.

    The draw depends on the seed and on the number of the batch alone, and that number is saved with a checkpoint: a
    resumed run draws what the uninterrupted one would have drawn.

    Args:
        batches (`int`, *optional*, defaults to `0`):
            Generation batches drawn from so far.
    """

    def __init__(self, batches: int = 0):
        self.batches = batches

    def state(self) -> dict[str, Any]:
        """What transformers saves in a checkpoint."""
        return {"args": {"batches": self.batches}, "attributes": {}}

    def on_train_begin(self, args, state, control, **kwargs):
        name = type(self).__name__
        # A checkpoint of a run without a budget has no entry. transformers expects one when it saves the next.
        saved = state.stateful_callbacks.setdefault(name, self.state())
        self.batches = saved["args"]["batches"] if state.global_step > 0 else 0

    def draw(self, advantages: torch.Tensor, share: float, seed: int) -> torch.Tensor:
        """
        [`subsample_advantages`] for the next generation batch. Every process must call it; the main one draws.

        Args:
            advantages (`torch.Tensor` of shape `(B,)`):
                Advantages of the whole generation batch, over all processes.
            share (`float`):
                Share of the rollouts to train.
            seed (`int`):
                Seed of the run.

        Returns:
            `torch.Tensor` of shape `(B,)`, the same on every process.
        """
        (state,) = np.random.SeedSequence([seed, self.batches]).generate_state(1, np.uint64)
        self.batches += 1
        generator = torch.Generator().manual_seed(int(state))
        return broadcast(subsample_advantages(advantages, share, generator=generator))
