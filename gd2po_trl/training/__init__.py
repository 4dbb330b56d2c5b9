"""A training run as a recipe describes it, from its files to the saved policy."""

import errno
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..datasets import load_dataset_by_name
from ..errors import RewardError, UsageError, one_line
from ..estimators import load_estimator
from ..preflight import check_packages, check_progress
from ..recipe import Recipe
from ..reward_parts import part_names
from ..rewards import load_reward, resolve_reward
from ..run_log import checkpoint_to_resume, checkpoints_of
from .policy import check_model, load_tokenizer, policy_arguments
from .resuming import RESOLVED_RECIPE, RunRecord, only_run_in


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback

    from ..gd2po_trainer import GD2POTrainer


logger = logging.getLogger(__name__)


def run_recipe(recipe: Recipe, *, callbacks: Sequence["TrainerCallback"] = ()) -> "GD2POTrainer":
    """
    Train as `recipe` says. Mistakes that can be found without a model are found before one is loaded.

    Writes to `output_dir`: the policy (or its adapter) with tokenizer and model card, `trainer_state.json` with the
    log history, and `recipe.yaml`, which reproduces the run.

    Args:
        recipe ([`Recipe`]):
            From [`load_recipe`].
        callbacks (sequence of `TrainerCallback`, *optional*):
            Callbacks of the trainer beside its own. A [`RewardProgress`] among them takes the place of its own bar.

    Returns:
        The [`GD2POTrainer`], after training.

    Raises:
        [`UsageError`]: for a model, a reward, a data set, a column, a checkpoint or vLLM that is not there.
    """
    reward_funcs = resolve_rewards(recipe)
    check_packages(recipe.training)
    with prepared_output(recipe) as checkpoint:
        check_model(recipe)
        record = RunRecord(recipe, checkpoint)
        train_dataset, eval_dataset = load_datasets(recipe)

        from ..gd2po_trainer import GD2POTrainer
        from ..progress import RewardProgress

        with one_clear_error():
            trainer = GD2POTrainer(
                **policy_arguments(recipe),
                reward_funcs=reward_funcs,
                args=recipe.training,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=load_tokenizer(recipe, train_dataset),
            )
            for reward_func in reward_funcs:
                # Unusable weights, an unreachable server or an inverted sign show before the first generation.
                load_reward(reward_func)
        if recipe.arguments.verdict_steps is not None:
            from ..analysis import VerdictCallback

            trainer.add_callback(VerdictCallback(trainer, every=recipe.arguments.verdict_steps))
        for callback in callbacks:
            if isinstance(callback, RewardProgress):
                callback.attach(trainer)
            else:
                trainer.add_callback(callback)
        train_and_save(trainer, record, "gd2po train")
        return trainer


def resolve_rewards(recipe: Recipe) -> list[Any]:
    """
    The rewards of a recipe, as [`resolve_reward`] gives them; its estimator has to be there, too.

    Parts that a function declares are added to the recipe's settings, so that its record names every reward, and a run
    cannot be resumed with other ones.

    Raises:
        [`UsageError`]: if one is not there, or `reward_kwargs` has settings for a label that nothing defines.
    """
    from ..rewards import BUILT_IN

    labels, kwargs = recipe.arguments.reward_funcs, recipe.arguments.reward_kwargs
    beside = None if recipe.path is None else recipe.path.parent
    load_estimator(recipe.training.estimator, recipe.training.estimator_kwargs, beside=beside)
    for label, settings in kwargs.items():
        # A recipe may define more rewards than a run uses, but settings for an undefined label are a typo.
        if label not in labels and label not in BUILT_IN and "type" not in settings:
            raise UsageError(
                f"`reward_kwargs` has settings for '{label}', which is not in `reward_funcs` ({', '.join(labels)})."
            )
    rewards = [resolve_reward(label, kwargs.get(label), beside=beside) for label in labels]
    for label, reward in zip(labels, rewards, strict=True):
        if (names := part_names(reward)) is not None:
            kwargs[label] = {**kwargs.get(label, {}), "reward_names": names}
            recipe.settings["reward_kwargs"] = kwargs
    return rewards


@contextmanager
def prepared_output(recipe: Recipe) -> Iterator[str | None]:
    """
    Make `output_dir`, keep other runs out of it, and give the checkpoint to resume from there, or `None`.

    Raises:
        [`UsageError`]: if it cannot be written to or another run is in it, or as [`checkpoint_to_resume`].
    """
    folder = recipe.training.output_dir
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UsageError(f"`output_dir` '{folder}' cannot be written to: {error.strerror}.") from error
    with only_run_in(folder):
        yield checkpoint_to_resume(recipe.training.resume_from_checkpoint, folder)


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Say in one line what does not fit, or cannot be read, while a trainer is built."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, RewardError) as error:
        raise UsageError(one_line(error)) from error
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UsageError(f"An option that nothing takes, perhaps of `model_init_kwargs`: {error}.") from error


def train_and_save(trainer: "Trainer", record: RunRecord, command: str) -> None:
    """
    Train, from the checkpoint on if there is one, and write the policy and its log.

    The recipe is written after the checkpoint is loaded, so that a checkpoint that does not load changes nothing.

    Args:
        trainer (`transformers.Trainer`):
            The trainer.
        record ([`RunRecord`]):
            The run's settings, and the checkpoint that it resumes from.
        command (`str`):
            The command that resumes after an error, such as `"gd2po train"`.
    """
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                record.announce()
                record.write()
            trainer.changes_on_the_way = record.history()  # the model card names them

    folder = record.recipe.training.output_dir
    trainer.changes_on_the_way = record.history()
    trainer.add_callback(Recorder)
    with telling_how_to_go_on(trainer, f"{command} --config {folder}/{RESOLVED_RECIPE}"):
        trainer.train(resume_from_checkpoint=record.checkpoint)
        check_progress(trainer.state.global_step)
        trainer.save_state()
        trainer.save_model(folder)
    if record.recipe.training.push_to_hub:
        trainer.push_to_hub()


@contextmanager
def telling_how_to_go_on(trainer: "Trainer", command: str) -> Iterator[None]:
    """Add to any error that ends a training the step in which it ended, and the command that resumes it."""
    import torch

    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted {_where_it_ended(trainer, command)}") from error
    except Exception as error:
        where = _where_it_ended(trainer, command)
        if _is_full_disk(error):
            raise UsageError(
                f"The disk of `output_dir` '{trainer.args.output_dir}' is full: the training ended {where} Free some "
                "space first; `save_total_limit` keeps fewer checkpoints."
            ) from error
        if isinstance(error, torch.OutOfMemoryError):
            where += (
                "\nTo use less memory, halve `per_device_train_batch_size` and double `gradient_accumulation_steps`, "
                "lower `max_completion_length` or `vllm_gpu_memory_utilization`, or set `gradient_checkpointing`."
            )
        if not isinstance(error, UsageError):
            error.add_note(f"The training ended {where}")
        raise


def _where_it_ended(trainer: "Trainer", command: str) -> str:
    where = f"in step {trainer.state.global_step + 1} of {trainer.state.max_steps}."
    if checkpoints_of(trainer.args.output_dir):
        return f"{where} Go on from the last checkpoint: {command} --resume_from_checkpoint latest"
    return f"{where} There is no checkpoint yet to go on from (`save_steps` is {trainer.args.save_steps:g})."


def _is_full_disk(error: BaseException | None) -> bool:
    """Whether a full disk caused `error`; torch and safetensors do not report it as an `OSError`."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        try:
            text = str(error)
        except Exception:  # the exception of a reward may be anything
            text = ""
        if "No space left on device" in text or "PytorchStreamWriter failed writing" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def load_datasets(recipe: Recipe) -> tuple["Dataset", "Dataset | dict[str, Dataset] | None"]:
    """The training set and, where the recipe evaluates, the evaluation set, or a dictionary of several."""
    arguments, training = recipe.arguments, recipe.training
    wanted = {
        "eval_strategy": training.eval_strategy != "no",
        "eval_on_start": training.eval_on_start,
        "eval_on_end": training.eval_on_end,
    }
    wants_eval = any(wanted.values())
    if wants_eval and not arguments.eval_datasets():
        key = next(key for key in wanted if wanted[key])
        value = getattr(getattr(training, key), "value", getattr(training, key))
        raise UsageError(
            f"`{key}` is {value!r} and `eval_dataset` is not set: it names the loader, such as "
            f"`eval_dataset: {arguments.dataset}`."
        )
    given = [key for key in ("eval_dataset", "eval_dataset_path") if getattr(arguments, key) is not None]
    if given and not wants_eval:
        logger.warning(
            f"`{given[-1]}` is set and nothing is evaluated: `eval_strategy: steps` with `eval_steps`, "
            "`eval_on_start` and `eval_on_end` say when."
        )
    with training.main_process_first(desc="loading the data"):
        train = load_dataset_by_name(
            arguments.dataset, arguments.dataset_path, arguments.dataset_split, **arguments.dataset_kwargs
        )
        wanted_sets = arguments.eval_datasets() if wants_eval else {}
        evaluations = {name: load_dataset_by_name(**options) for name, options in wanted_sets.items()}
        if arguments.max_prompt_tokens is not None:
            train = _limit_prompts(train, recipe)
            evaluations = {name: _limit_prompts(dataset, recipe) for name, dataset in evaluations.items()}
    if len(train) == 0:
        raise UsageError(f"The data set '{arguments.dataset}' has no rows left to train on.")
    for name, evaluation in evaluations.items():
        if len(evaluation) == 0:
            raise UsageError(f"The evaluation set '{name or arguments.eval_dataset}' has no rows left.")
    return train, evaluations.get("", evaluations or None)


def _limit_prompts(dataset: "Dataset", recipe: Recipe) -> "Dataset":
    from ..datasets import drop_long_prompts, truncate_prompts_left

    limit = recipe.arguments.max_prompt_tokens
    tokenizer = load_tokenizer(recipe, dataset)
    limiter = drop_long_prompts if recipe.arguments.long_prompts == "drop" else truncate_prompts_left
    limited, count = limiter(dataset, tokenizer, limit, recipe.training.chat_template_kwargs)
    if count:
        done = "dropped" if recipe.arguments.long_prompts == "drop" else "truncated from the left"
        logger.warning(f"{count} of {len(dataset)} prompts are longer than {limit} tokens and were {done}.")
    return limited
