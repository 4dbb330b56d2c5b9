"""A training run as a recipe describes it, from its files to the saved policy."""

import logging
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoints import checkpoint_to_resume
from .datasets import load_dataset_by_name
from .errors import UsageError
from .packages import check_packages
from .policy import check_model, load_tokenizer, policy_arguments
from .recipe import Recipe
from .recipe_files import dump_recipe
from .rewards import resolve_reward
from .rewards.guard import RewardError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer, TrainerCallback

    from .gd2po_trainer import GD2POTrainer


logger = logging.getLogger(__name__)

RESOLVED_RECIPE = "recipe.yaml"


def run_recipe(recipe: Recipe, *, callbacks: Sequence["TrainerCallback"] = ()) -> "GD2POTrainer":
    """
    Train as `recipe` says. Everything that can be found wrong without a model is found before one is loaded.

    Writes to `output_dir`: the policy (or its adapter) with tokenizer and model card, `trainer_state.json` with the
    log history, and `recipe.yaml`, which repeats the run.

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
    arguments, training = recipe.arguments, recipe.training
    reward_funcs = [resolve_reward(label, arguments.reward_kwargs.get(label)) for label in arguments.reward_funcs]
    _check_reward_kwargs(arguments)
    check_packages(training)
    checkpoint = prepare_output(recipe)
    check_model(recipe)
    train_dataset, eval_dataset = load_datasets(recipe)

    from .gd2po_trainer import GD2POTrainer
    from .progress import RewardProgress

    with one_clear_error():
        trainer = GD2POTrainer(
            **policy_arguments(recipe),
            reward_funcs=reward_funcs,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(recipe, train_dataset),
        )
        for reward_func in reward_funcs:
            # Dead weights, an unreachable server or an inverted direction show before the first generation.
            if hasattr(reward_func, "load"):
                reward_func.load()
    for callback in callbacks:
        if isinstance(callback, RewardProgress):
            callback.attach(trainer)
        else:
            trainer.add_callback(callback)
    train_and_save(trainer, recipe, checkpoint)
    return trainer


def prepare_output(recipe: Recipe) -> str | None:
    """
    Make `output_dir`, and find the checkpoint to resume from there, or `None`.

    Raises:
        [`UsageError`]: if it cannot be written to, or as [`checkpoint_to_resume`].
    """
    folder = recipe.training.output_dir
    checkpoint = checkpoint_to_resume(recipe.training.resume_from_checkpoint, folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"`output_dir` '{folder}' cannot be written to: {error.strerror}.") from error
    return checkpoint


@contextmanager
def one_clear_error() -> Iterator[None]:
    """Say in one line what does not fit, or cannot be read, while a trainer is built."""
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, OSError, ImportError, SafetensorError, RewardError) as error:
        raise UsageError(" ".join(str(error).split())) from error


def train_and_save(trainer: "Trainer", recipe: Recipe, checkpoint: str | None) -> None:
    """Write the resolved recipe, train, from `checkpoint` on if there is one, and write the policy and its log."""
    from .preflight import check_progress

    if trainer.is_world_process_zero():
        write_resolved_recipe(recipe)
    trainer.train(resume_from_checkpoint=checkpoint)
    check_progress(trainer.state.global_step)
    trainer.save_state()
    trainer.save_model(recipe.training.output_dir)
    if recipe.training.push_to_hub:
        trainer.push_to_hub()


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
        raise UsageError(f"`{key}` is {str(getattr(training, key))!r} and `eval_dataset` is not set.")
    with training.main_process_first(desc="loading the data"):
        train = load_dataset_by_name(
            arguments.dataset, arguments.dataset_path, arguments.dataset_split, **arguments.dataset_kwargs
        )
        evaluations = {}
        if wants_eval:
            evaluations = {
                name: load_dataset_by_name(**options) for name, options in arguments.eval_datasets().items()
            }
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
    from .datasets import drop_long_prompts, truncate_prompts_left

    limit = recipe.arguments.max_prompt_tokens
    tokenizer = load_tokenizer(recipe, dataset)
    limiter = drop_long_prompts if recipe.arguments.long_prompts == "drop" else truncate_prompts_left
    limited, count = limiter(dataset, tokenizer, limit, recipe.training.chat_template_kwargs)
    if count:
        done = "dropped" if recipe.arguments.long_prompts == "drop" else "truncated from the left"
        logger.warning(f"{count} of {len(dataset)} prompts are longer than {limit} tokens and were {done}.")
    return limited


def _check_reward_kwargs(arguments: Any) -> None:
    from .rewards import BUILT_IN

    for label, kwargs in arguments.reward_kwargs.items():
        # A recipe may define more rewards than a run uses; a label that defines nothing is a slip.
        if label not in arguments.reward_funcs and label not in BUILT_IN and "type" not in kwargs:
            raise UsageError(
                f"`reward_kwargs` has settings for '{label}', which is not in `reward_funcs` "
                f"({', '.join(arguments.reward_funcs)})."
            )


def write_resolved_recipe(recipe: Recipe) -> Path:
    """Write every key that was set, with its final value, as a recipe that repeats the run."""
    import torch
    import transformers
    import trl

    from ._version import __version__

    path = Path(recipe.training.output_dir) / RESOLVED_RECIPE
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    header = (
        f"# Written {now} by gd2po_trl {__version__}: the recipe as it ran.\n"
        f"# trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}\n"
    )
    # What repeats the run neither resumes it nor lets code in unasked.
    left_out = {"resume_from_checkpoint", "trust_remote_code"} & recipe.settings.keys()
    if recipe.settings.get("trust_remote_code"):
        header += "# It ran with --trust_remote_code, which only a command line can say.\n"
    plain = {key: _plain(value) for key, value in recipe.settings.items() if key not in left_out}
    path.write_text(header + dump_recipe(plain), encoding="utf-8")
    return path


def _plain(value: Any) -> Any:
    """`value` in the types that YAML knows; enumerations become their values."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return _plain(value.value) if hasattr(value, "value") else str(value)
