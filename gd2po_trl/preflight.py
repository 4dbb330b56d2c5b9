"""Mistakes in the arguments of a trainer that TRL would only notice after loading models, or not at all."""

from collections.abc import Iterable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from torch import nn

from .completions_table import is_table_column
from .datasets.prompts import check_prompts_render
from .errors import UsageError
from .estimators import check_estimator, load_estimator
from .reward_guard import name_of, refused_arguments, required_arguments, takes_no_kwargs
from .schedules import check_weight_schedules, read_weight_schedules


# What TRL passes to every reward function; anything else that a function asks for is a dataset column.
TRL_REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# What the trainer adds for functions that have such a parameter.
OUR_REWARD_ARGUMENTS = ("prefill",)
# Columns that TRL itself hands to reward functions under another name.
UNPASSED_COLUMNS = ("prompt", "completion", "completion_ids")


def check_before_loading(arguments: dict[str, Any]) -> None:
    """Find mistakes in the arguments of `GRPOTrainer`, by name, that it would only notice after loading models."""
    reward_funcs, args = arguments.get("reward_funcs"), arguments["args"]
    dataset = arguments.get("train_dataset")
    adds_rewards = arguments.get("environment_factory") is not None
    adds_columns = adds_rewards or arguments.get("rollout_func") is not None
    if reward_funcs is None:
        reward_funcs = []
    elif not isinstance(reward_funcs, list):
        reward_funcs = [reward_funcs]
    if not reward_funcs and not adds_rewards:
        raise ValueError(
            "No reward source provided: `reward_funcs` is empty. Give at least one reward function, reward model or "
            "model id."
        )
    for index, func in enumerate(reward_funcs):
        if not isinstance(func, (str, nn.Module)) and not callable(func):
            raise ValueError(f"`reward_funcs[{index}]` is {func!r}; it must be a function, a reward model or its id.")
    check_reward_names(_names(reward_funcs))
    weights = args.reward_weights
    if weights is not None and not adds_rewards and len(weights) != len(reward_funcs):
        raise ValueError(
            f"`reward_weights` has {len(weights)} entries and there are {len(reward_funcs)} reward functions; the "
            "numbers must match. Give one weight for each, in their order."
        )
    if not adds_rewards:
        check_weight_schedules(
            read_weight_schedules(args.reward_weight_schedules), list(_names(reward_funcs)), weights
        )
    estimator = load_estimator(args.estimator, args.estimator_kwargs)
    if estimator is not None:
        num_rewards = 2 if adds_rewards else len(list(_names(reward_funcs)))
        check_estimator(estimator, num_rewards, args.num_generations)
    functions = [func for func in reward_funcs if not isinstance(func, (str, nn.Module))]
    _check_size(dataset, args)
    evaluation = arguments.get("eval_dataset")
    if args.eval_on_end and evaluation is None:
        raise ValueError("`eval_on_end` is true and there is no `eval_dataset`; give one, or leave it out.")
    named = evaluation if isinstance(evaluation, dict) else {"": evaluation}
    check_data("training dataset", dataset, functions, adds_columns)
    for name, eval_dataset in named.items():
        what = f"evaluation dataset {name!r}" if name else "evaluation dataset"
        check_data(what, eval_dataset, functions, adds_columns)
    tokenizer = arguments.get("processing_class")
    if tokenizer is not None and not adds_columns and not arguments.get("tools"):  # TRL may set a template for tools
        for data in (dataset, *named.values()):
            if isinstance(data, Dataset):
                check_prompts_render(data, tokenizer, args.chat_template_kwargs)


def check_reward_names(names: Iterable[str]) -> None:
    """
    Refuse names under which a reward would replace a column of the completions table.

    Raises:
        `ValueError`: for the first such name.
    """
    for name in names:
        if not name.strip():
            raise ValueError("A reward has an empty name, under which nothing can be logged. Give it a `__name__`.")
        if is_table_column(name):
            raise ValueError(
                f"A reward is called {name!r}, which is a column of the completions table that it would replace. "
                "Give it another `__name__` (in a recipe: another label, with its `type` in `reward_kwargs`)."
            )


def check_trainable(model: nn.Module) -> None:
    """
    Refuse a model that training cannot change.

    Raises:
        `ValueError`: if no parameter requires a gradient.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = "Unfreeze some parameters (`requires_grad_(True)`), or give `peft_config`."
    if hasattr(model, "peft_config"):
        remedy = "Load the adapter with `PeftModel.from_pretrained(..., is_trainable=True)`."
    raise ValueError(f"No parameter of the model requires a gradient, so that training cannot change it. {remedy}")


def check_progress(steps: int) -> None:
    """
    Refuse to call a training finished that never took a step.

    Raises:
        [`UsageError`]: if `steps` is 0.
    """
    if steps == 0:
        raise UsageError(
            "Not one step was trained, so the model is what it was: the data ended before one batch was full, or "
            "`num_train_epochs` is 0."
        )


def _names(reward_funcs: list[Any]) -> Iterator[str]:
    for func in reward_funcs:
        if isinstance(func, str):
            yield func.rstrip("/").split("/")[-1]
        elif not isinstance(func, nn.Module):
            yield name_of(func)


def _check_size(dataset: Any, args: Any) -> None:
    """TRL leaves out a generation batch that is not full, and so all data where there is not enough for one."""
    if not isinstance(dataset, Dataset):
        return
    needed = args.generation_batch_size // args.num_generations
    if len(dataset) < needed:
        raise ValueError(
            f"The training dataset has {len(dataset)} prompts and one generation batch needs {needed} different ones "
            f"({args.generation_batch_size} rollouts, {args.num_generations} of each), so that nothing would be "
            "trained. Add prompts, or lower `per_device_train_batch_size`, `gradient_accumulation_steps` or "
            "`steps_per_generation`."
        )


def check_data(what: str, dataset: Any, functions: list[Any], adds_columns: bool) -> None:
    """
    Find out whether a dataset has the columns that reward functions need, and none that TRL needs for itself.

    Raises:
        `ValueError`: if not.
    """
    columns = _columns(what, dataset)
    if not columns:
        return
    if "prompt" not in columns and not adds_columns:
        raise ValueError(
            f"The {what} has no column `prompt` (it has: {', '.join(columns)}). Rename the column that holds the "
            "prompts, or map the dataset."
        )
    pictures = {"image", "images"} & set(columns)
    if pictures and isinstance(dataset, Dataset) and len(dataset) and isinstance(dataset[0].get("prompt"), str):
        raise ValueError(
            f"The {what} has a column `{pictures.pop()}`, in which TRL looks for pictures, and its prompts are text. "
            "Rename the column, or write the prompts as lists of messages."
        )
    for column in columns:
        if column in TRL_REWARD_ARGUMENTS and column not in UNPASSED_COLUMNS:
            raise ValueError(
                f"The {what} has a column `{column}`, which is the name of an argument that TRL itself passes to "
                "reward functions. Rename the column, or remove it."
            )
    passed = [*TRL_REWARD_ARGUMENTS, *(column for column in columns if column not in UNPASSED_COLUMNS)]
    for func in functions:
        name = name_of(func)
        if refused := refused_arguments(func, passed):
            raise ValueError(takes_no_kwargs(name, refused))
        if adds_columns:
            continue
        for column in required_arguments(func, (*TRL_REWARD_ARGUMENTS, *OUR_REWARD_ARGUMENTS)):
            if column not in columns:
                raise ValueError(
                    f"The reward function '{name}' needs the dataset column `{column}`, which is missing in the "
                    f"{what} (columns: {', '.join(columns)}). Add it, or give the parameter a default."
                )
        if hasattr(func, "check_data") and isinstance(dataset, Dataset):
            func.check_data(dataset, what)


def _columns(what: str, dataset: Any) -> list[str]:
    """The columns of a dataset, where it is one; those of the first row of a stream that does not say them."""
    if isinstance(dataset, IterableDataset) and dataset.column_names is None:
        row = next(iter(dataset.take(1)), None)
        if row is None:
            raise ValueError(f"The {what} has no rows.")
        return list(row)
    return dataset.column_names if isinstance(dataset, (Dataset, IterableDataset)) else []
