"""The verdict on the rewards while they are trained on."""

import textwrap
from collections import deque
from collections.abc import Collection
from typing import Any

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging

from ..terminal import printable
from .analyzer import Report, analyze_rewards


logger = logging.get_logger(__name__)


class VerdictCallback(TrainerCallback):
    """
    Says during training what `gd2po analyze` would say of the latest rollouts. Works with any `GRPOTrainer`.

    At the chosen steps and at the end of training, the main process logs the verdict and the advice; `reports` keeps
    the whole of it.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer whose rewards to watch.
        steps (collection of `int`, *optional*):
            Optimizer steps after which to report.
        every (`int`, *optional*):
            Report after every so many steps. With neither, only at the end.
        batches (`int`, *optional*, defaults to `16`):
            How many of the latest generation batches to look at.

    Attributes:
        reports (`dict[int, Report]`): By step.

    Raises:
        `ValueError`: if `every` or `batches` is not positive.

    Example:

    ```python
    from gd2po_trl.analysis import VerdictCallback

    trainer.add_callback(VerdictCallback(trainer, steps=[50, 200]))
    trainer.train()
    ```
    """

    def __init__(
        self, trainer: Any, steps: Collection[int] = (), *, every: int | None = None, batches: int = 16
    ) -> None:
        if batches < 1 or (every is not None and every < 1):
            raise ValueError(f"`every` is {every} and `batches` is {batches}; both must be at least 1.")
        self.trainer = trainer
        self.steps, self.every = frozenset(steps), every
        self.reports: dict[int, Report] = {}
        self._batches: deque[tuple[int, np.ndarray, list[Any]]] = deque(maxlen=batches)

    def on_step_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._collect(state.global_step)
        if state.global_step in self.steps or (self.every and state.global_step % self.every == 0):
            self._report(state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step not in self.reports:
            self._report(state.global_step)

    def _collect(self, step: int) -> None:
        # TRL keeps the latest generation batch, of all processes, for its completions table.
        logs, names = self.trainer._logs, self.trainer.reward_func_names
        rewards = np.array([list(logs["rewards"][name]) for name in names], dtype=np.float64).T
        whole_groups = len(rewards) and len(rewards) % self.trainer.num_generations == 0
        if not whole_groups or (self._batches and np.array_equal(self._batches[-1][1], rewards, equal_nan=True)):
            return
        completions = list(logs["completion"])
        self._batches.append((step, rewards, completions if len(completions) == len(rewards) else [""] * len(rewards)))

    def _report(self, step: int) -> None:
        if not self._batches:
            return
        report = analyze_rewards(
            np.concatenate([rewards for _, rewards, _ in self._batches]),
            self.trainer.num_generations,
            self.trainer.reward_func_names,
            reward_weights=self.trainer.reward_weights.tolist(),
            scale_rewards=self.trainer.scale_rewards,
            steps=[step for step, rewards, _ in self._batches for _ in rewards],
            completions=[completion for _, _, completions in self._batches for completion in completions],
        )
        self.reports[step] = report
        sentences = [
            report.verdict.text,
            *(finding.text for finding in report.findings),
            *report.recommendation.advice,
        ]
        lines = [textwrap.fill(printable(text), 80, initial_indent="- ", subsequent_indent="  ") for text in sentences]
        logger.warning("\n".join([f"Rewards up to step {step}:", *lines]))
