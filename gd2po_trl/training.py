"""A training run as a recipe describes it, from its files to the saved policy."""

import importlib.util
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
from .recipe import Recipe
from .recipe_files import dump_recipe
from .rewards import resolve_reward
from .rewards.guard import RewardError


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback

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
    arguments, training, model = recipe.arguments, recipe.training, recipe.model
    reward_funcs = [resolve_reward(label, arguments.reward_kwargs.get(label)) for label in arguments.reward_funcs]
    _check_reward_kwargs(arguments)
    if training.use_vllm and importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "`use_vllm` is true, and vLLM is not installed: `pip install 'gd2po-trl[vllm]'`, or set `use_vllm` to "
            "false, which is much slower."
        )
    checkpoint = prepare_output(recipe)
    check_model(recipe)
    train_dataset, eval_dataset = load_datasets(recipe)

    from trl import get_peft_config, get_quantization_config

    from .gd2po_trainer import GD2POTrainer
    from .progress import RewardProgress

    training.model_init_kwargs = model_init_kwargs(recipe)
    with one_clear_error():
        trainer = GD2POTrainer(
            model=model.model_name_or_path,
            reward_funcs=reward_funcs,
            args=training,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=load_tokenizer(recipe, train_dataset),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
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


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the policy."""
    return {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }


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


def check_model(recipe: Recipe) -> None:
    """
    Find out whether the policy can be loaded, from its configuration alone.

    Raises:
        [`UsageError`]: if it cannot.
    """
    from transformers import AutoConfig

    name = recipe.model.model_name_or_path
    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise UsageError(f"`model_name_or_path` is '{name}', and there is no such folder.")
    try:
        AutoConfig.from_pretrained(
            name, revision=recipe.model.model_revision, trust_remote_code=recipe.training.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"`model_name_or_path` is '{name}', which cannot be loaded: {reason}") from error


def load_tokenizer(recipe: Recipe, dataset: "Dataset") -> "PreTrainedTokenizerBase":
    """
    The policy's tokenizer for `dataset`, set up as TRL does, except that completions stay text.

    TRL parses a completion into fields where the tokenizer has a response template, and what the rewards of a recipe
    read, such as `<think>` or `<tool_call>`, would then be gone from its content.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        recipe.model.model_name_or_path,
        revision=recipe.model.model_revision,
        trust_remote_code=recipe.training.trust_remote_code,
        padding_side="left",
        truncation_side="left",
    )
    for attribute in ("response_template", "response_schema"):
        if getattr(tokenizer, attribute, None) is not None:
            logger.info(f"The {attribute} of the tokenizer is left out: rewards read completions as text.")
            setattr(tokenizer, attribute, None)
    if tokenizer.chat_template is None and not isinstance(dataset[0]["prompt"], str):
        raise UsageError(
            f"The prompts are lists of messages, and the tokenizer of '{recipe.model.model_name_or_path}' has no chat "
            "template. Take an instruction-tuned policy, or prompts that are text."
        )
    return tokenizer


def load_datasets(recipe: Recipe) -> tuple["Dataset", "Dataset | None"]:
    """The training set and, where the recipe evaluates, the evaluation set."""
    arguments, training = recipe.arguments, recipe.training
    wants_eval = training.eval_strategy != "no" or training.eval_on_start
    if wants_eval and arguments.eval_dataset is None:
        key = "eval_on_start" if training.eval_strategy == "no" else "eval_strategy"
        raise UsageError(f"`{key}` is {str(getattr(training, key))!r} and `eval_dataset` is not set.")
    with training.main_process_first(desc="loading the data"):
        train = load_dataset_by_name(
            arguments.dataset, arguments.dataset_path, arguments.dataset_split, **arguments.dataset_kwargs
        )
        evaluation = None
        if wants_eval:
            evaluation = load_dataset_by_name(
                arguments.eval_dataset,
                arguments.eval_dataset_path,
                arguments.eval_dataset_split,
                **arguments.eval_dataset_kwargs,
            )
        if arguments.max_prompt_tokens is not None:
            train = _limit_prompts(train, recipe)
            evaluation = None if evaluation is None else _limit_prompts(evaluation, recipe)
    if len(train) == 0:
        raise UsageError(f"The data set '{arguments.dataset}' has no rows left to train on.")
    return train, evaluation


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
