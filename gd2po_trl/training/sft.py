"""A supervised warm-up as a recipe describes it: RL can only reinforce what the policy already does at times."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trl import ModelConfig, SFTConfig, SFTTrainer

from ..datasets import load_dataset_by_name
from ..datasets.prompts import render_conversations
from ..datasets.sources import checked_prompt, is_empty, iterate_rows
from ..errors import UsageError
from ..preflight import check_packages
from ..progress import RewardProgress
from ..recipe import DatasetArguments, Recipe, parse_recipe
from . import one_clear_error, prepared_output, train_and_save
from .policy import check_model, load_tokenizer, policy_arguments
from .resuming import RunRecord


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)


@dataclass
class WarmupConfig(SFTConfig):
    """TRL's `SFTConfig` without its `dataset_kwargs`: in a recipe they are the loader's."""

    dataset_kwargs: dict | None = field(default=None, init=False)


KINDS = (DatasetArguments, WarmupConfig, ModelConfig)


def load_sft_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe of `gd2po sft` with its bases and apply command-line overrides.

    Its keys are the fields of [`DatasetArguments`] and of TRL's `SFTConfig` and `ModelConfig`. Arguments and errors
    are those of [`load_recipe`].
    """
    (arguments, training, model), settings = parse_recipe(path, overrides, KINDS, "gd2po sft")
    return Recipe(arguments, training, model, settings)


def run_sft(recipe: Recipe, *, progress: RewardProgress | None = None) -> SFTTrainer:
    """
    Train on prompts and completions with TRL's `SFTTrainer`. The loss covers the completions alone.

    Examples of more than `max_length` tokens are left out, since cut completions would teach the policy not to end.
    Writes to `output_dir` what [`run_recipe`] writes.

    Args:
        recipe ([`Recipe`]):
            From [`load_sft_recipe`].
        progress ([`RewardProgress`], *optional*):
            Takes the place of the trainer's own bar.

    Returns:
        The `SFTTrainer`, after training.

    Raises:
        [`UsageError`]: for a model, a data set or a checkpoint that is not there, and for data without completions.
    """
    arguments, training = recipe.arguments, recipe.training
    check_packages(training)
    with prepared_output(recipe) as checkpoint:
        check_model(recipe)
        record = RunRecord(recipe, checkpoint)
        with training.main_process_first(desc="loading the data"):
            dataset = load_dataset_by_name(
                arguments.dataset, arguments.dataset_path, arguments.dataset_split, **arguments.dataset_kwargs
            )
            if not {"prompt", "completion"} <= set(dataset.column_names):
                raise UsageError(
                    f"The data set '{arguments.dataset}' has the columns {', '.join(dataset.column_names)}; a warm-up "
                    "needs `prompt` and `completion`, as rlla_sft has them."
                )
            check_examples(dataset)
            with one_clear_error():
                tokenizer = load_tokenizer(recipe, dataset)
            dataset = _drop_long_examples(dataset, tokenizer, training.max_length)
        batch = training.train_batch_size * training.world_size
        if training.dataloader_drop_last and len(dataset) < batch:
            raise UsageError(
                f"The data set has {len(dataset)} examples, fewer than a batch of {batch}, which "
                "`dataloader_drop_last` leaves out, so nothing would be trained. Lower `per_device_train_batch_size`."
            )
        with one_clear_error():
            trainer = SFTTrainer(
                **policy_arguments(recipe), args=training, train_dataset=dataset, processing_class=tokenizer
            )
        if progress is not None:
            progress.attach(trainer)
        train_and_save(trainer, record, "gd2po sft")
        return trainer


def check_examples(dataset: "Dataset") -> None:
    """
    Refuse rows that TRL's `SFTTrainer` could not read, or that would teach the policy to write nothing.

    Raises:
        [`UsageError`]: for the first row without a completion, or in which one of `prompt` and `completion` is text
            and the other a list of messages.
    """
    for index, row in enumerate(iterate_rows(dataset, ["prompt", "completion"])):
        try:
            prompt, completion = (checked_prompt(row[column], column, parts=True) for column in row)
            calls = any(isinstance(turn, dict) and turn.get("tool_calls") for turn in completion or ())
            if is_empty(completion) and not calls:
                raise UsageError(f"the column `completion` is empty: {completion!r}; fix the row or leave it out")
            if isinstance(prompt, str) != isinstance(completion, str):
                kinds = ("text", "a list of messages")
                first, second = kinds if isinstance(prompt, str) else reversed(kinds)
                raise UsageError(f"`prompt` is {first} and `completion` {second}; make both one or the other")
            if not isinstance(completion, str) and completion[-1]["role"] != "assistant":
                raise UsageError(
                    f"`completion` ends with a message of the role {completion[-1]['role']!r}; it must be 'assistant'"
                )
        except UsageError as error:
            raise UsageError(f"row {index} of the data: {error}.") from None


def _drop_long_examples(dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", max_length: int | None) -> "Dataset":
    def length(index: int, row: dict) -> int:
        if isinstance(row["prompt"], str):
            # TRL adds the end of the sequence where it is missing, and then cuts at `max_length`.
            end = tokenizer.eos_token or ""
            completion = row["completion"] if row["completion"].endswith(end) else row["completion"] + end
            return len(tokenizer(row["prompt"] + completion)["input_ids"])
        conversation = row["prompt"] + row["completion"]
        (text,) = render_conversations([conversation], tokenizer, rows=[index])
        # The template writes the special tokens itself.
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    lengths = [length(index, row) for index, row in enumerate(iterate_rows(dataset, ["prompt", "completion"]))]
    if max_length is None:
        return dataset
    keep = [index for index, count in enumerate(lengths) if count <= max_length]
    if not keep:
        raise UsageError(
            f"None of the {len(lengths)} examples has at most {max_length} tokens (the shortest has {min(lengths)}); "
            "raise `max_length`."
        )
    if len(keep) < len(lengths):
        logger.warning(
            f"{len(lengths) - len(keep)} of {len(lengths)} examples are longer than {max_length} tokens and were "
            "left out."
        )
    return dataset.select(keep)
