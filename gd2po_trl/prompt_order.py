"""The order of the prompts after resuming."""

from typing import Any

import torch
from transformers import TrainerCallback


class PromptOrder(TrainerCallback):
    """
    Brings a resumed run back into the order of the prompts.

    TRL's sampler draws a new order for each epoch from a generator of its own, which a resumed run would start anew:
    its second epoch would repeat the order of the first.

    Args:
        sampler (`torch.utils.data.Sampler` or `None`):
            The sampler of the training set, set whenever the trainer makes one.
    """

    sampler: Any = None

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        generator = getattr(self.sampler, "generator", None)
        if generator is None or state.global_step == 0:  # not shuffled, or from the beginning
            return
        batches, accumulation = len(train_dataloader), args.gradient_accumulation_steps
        steps_per_epoch = max(-(-batches // accumulation), 1)
        for _ in range(state.global_step // steps_per_epoch):
            torch.randperm(self.sampler.num_samples, generator=generator)
