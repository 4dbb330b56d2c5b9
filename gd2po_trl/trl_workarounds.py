"""
Behavior of TRL and transformers that [`GD2POTrainer`] mends, each with its reason and its end.

- Order of prompts. After resuming, TRL's second epoch repeats the order of the first (1.12 to 1.16). May go when its
  sampler resumes.
- Finished runs. Resuming at `max_steps` trains one step more (transformers 5.2 to 5.23). May go when it checks first.
- Tables per mode. Rollouts of an evaluation replace those of training in the log (TRL 1.12 to 1.16). May go when TRL
  keeps them apart.
- Tables of an earlier run. They stay in `output_dir` beside those of a new one, and would be read as its own (TRL 1.12
  to 1.16). May go when TRL refuses or clears a used folder.
- Model card. It has no settings of the trainer, and none lies beside the final policy (TRL 1.12 to 1.16). May go when
  TRL has a hook for it.
"""

import copy
import math
from collections import deque
from collections.abc import MutableMapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from trl import GRPOTrainer

from .model_card import training_section, with_use_of
from .preflight import check_progress
from .run_log import TABLE_PREFIX


logger = get_logger(__name__)


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


class OldTables(TrainerCallback):
    """
    Moves tables of later steps than the one that training begins at into a folder beside the others.

    They are of an earlier run in the same `output_dir`, or of what followed the checkpoint that this run resumes from.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / "completions"
        steps = {file: file.stem.rpartition("_")[2] for file in folder.glob("*.parquet")}
        old = [file for file, step in steps.items() if step.isdigit() and int(step) > state.global_step]
        if not old or not state.is_world_process_zero:
            return
        place = next(place for n in count(1) if not (place := folder.with_name(f"completions_old_{n}")).exists())
        place.mkdir()
        for file in old:
            file.rename(place / file.name)
        logger.warning(f"{len(old)} completions tables of an earlier run were moved from '{folder}' to '{place}'.")


class PatchedGRPOTrainer(GRPOTrainer):
    """TRL's `GRPOTrainer` with the behavior that this module lists mended; its arguments are unchanged."""

    _logs: Any

    def __init__(self, *args, **kwargs):
        self._prompt_order = PromptOrder()
        super().__init__(*args, **kwargs)
        self.add_callback(self._prompt_order)
        self.add_callback(OldTables())
        self._empty_logs = copy.deepcopy(self._logs)
        self._logs_of_mode = {"train": self._logs, "eval": copy.deepcopy(self._logs)}

    # Order of prompts

    def _get_train_sampler(self, *args, **kwargs):
        self._prompt_order.sampler = super()._get_train_sampler(*args, **kwargs)
        return self._prompt_order.sampler

    # Finished runs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        state = Path(checkpoint or "") / TRAINER_STATE_NAME
        if checkpoint and state.is_file() and not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            reached = TrainerState.load_from_json(str(state))
            if 0 < self.args.max_steps <= reached.global_step:
                self._load_from_checkpoint(checkpoint)
                self.state = reached
                return TrainOutput(reached.global_step, math.nan, {})
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        check_progress(self.state.global_step)
        return output

    # Tables per mode

    def _generate_and_score_completions(self, inputs):
        self._use_table_of_mode()
        return super()._generate_and_score_completions(inputs)

    def evaluation_loop(self, *args, **kwargs):
        self._logs_of_mode["eval"] = copy.deepcopy(self._empty_logs)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, *args, **kwargs):
        self._use_table_of_mode()
        make_writable(self._logs)
        super().log(*args, **kwargs)

    def _replace_logged_advantages(self, advantages: torch.Tensor) -> None:
        logged = self._logs["advantages"]
        for _ in range(min(len(logged), len(advantages))):
            logged.pop()
        logged.extend(advantages.tolist())

    def _use_table_of_mode(self) -> None:
        self._logs = self._logs_of_mode["train" if self.model.training else "eval"]

    # Model card

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        card = Path(self.args.output_dir) / "README.md"
        if self.is_world_process_zero() and card.is_file():
            changes = getattr(self, "changes_on_the_way", ())
            section = training_section(self.args, self.reward_func_names, self.reward_weights.tolist(), changes)
            text = with_use_of(card.read_text(encoding="utf-8"), self).rstrip()
            card.write_text(f"{text}\n\n{section}", encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self.create_model_card(model_name=Path(self.args.output_dir).name)


# Columns that rewards log beside those of the completions table


def fill_missing_columns(pending: MutableMapping[str, list], logged: MutableMapping[str, deque], rows: int) -> None:
    """
    Give each column that rewards log at times (`log_extra`) a value for each rollout of this batch.

    Args:
        pending (mapping of `str` to `list`): What was logged for this batch, by column; completed in place.
        logged (mapping of `str` to `deque`): The columns of earlier batches.
        rows (`int`): Rollouts of this batch on this process.
    """
    for column in logged:
        if not column.startswith(TABLE_PREFIX) and column not in pending:
            pending[column] = [None] * rows
    for column, values in pending.items():
        if len(values) != rows:
            logger.warning_once(f"The column {column!r} was logged more than once for a batch; the last values count.")
            pending[column] = values[-rows:]


def make_writable(logs: dict[str, Any]) -> None:
    """Make the extra columns as long as the others, and text where their values are of several types."""
    rows = len(logs["prompt"])
    for column, values in logs["extra"].items():
        if len(values) < rows:  # its first value came after the first rollout of the table
            values.extendleft([None] * (rows - len(values)))
        if not column.startswith(TABLE_PREFIX) and not _has_one_type(values):
            logger.warning_once(
                f"The column {column!r} holds values of several types, or of one that a table cannot hold; it is "
                "written as text."
            )
            logs["extra"][column] = deque(
                (None if value is None else str(value) for value in values), maxlen=values.maxlen
            )


def _has_one_type(values: Any) -> bool:
    import pyarrow

    try:
        pyarrow.array(list(values), from_pandas=True)
    except Exception:  # pyarrow's own, and what a foreign type raises while it is read
        return False
    return True
