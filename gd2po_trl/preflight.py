"""Mistakes that would only show after a model is loaded, or never: in a trainer's arguments, its data and packages."""

import copy
import difflib
import importlib.util
import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn

from .datasets.prompts import check_prompts_render
from .errors import UsageError, one_line
from .estimators import check_estimator, load_estimator
from .reward_gates import check_gates
from .reward_guard import name_of, refused_arguments, required_arguments, takes_no_kwargs
from .reward_parts import expand_parts
from .run_log import is_table_column
from .schedules import check_weight_schedules, read_weight_schedules


# What TRL passes to every reward function; anything else that a function asks for is a dataset column.
TRL_REWARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# What the trainer adds for functions that have such a parameter.
OUR_REWARD_ARGUMENTS = ("prefill",)
# Columns that TRL itself hands to reward functions under another name.
UNPASSED_COLUMNS = ("prompt", "completion", "completion_ids")

# The arguments of a trainer


def check_before_loading(arguments: dict[str, Any]) -> None:
    """
    Find mistakes in the arguments of `GRPOTrainer` that it would only notice after loading models.

    Args:
        arguments (`dict`):
            Keyword arguments of the trainer; those that are left out are not checked.

    Raises:
        `ValueError`: for the first mistake.
    """
    reward_funcs, args = arguments.get("reward_funcs"), arguments["args"]
    dataset, evaluation = arguments.get("train_dataset"), arguments.get("eval_dataset")
    adds_rewards = arguments.get("environment_factory") is not None
    adds_columns = adds_rewards or arguments.get("rollout_func") is not None
    if not isinstance(reward_funcs, list):
        reward_funcs = [] if reward_funcs is None else [reward_funcs]
    if not reward_funcs and not adds_rewards:
        raise ValueError("`reward_funcs` is empty: give at least one reward function, reward model or model id.")
    for index, func in enumerate(reward_funcs):
        if not isinstance(func, (str, nn.Module)) and not callable(func):
            raise ValueError(f"`reward_funcs[{index}]` is {func!r}; it must be a function, a reward model or its id.")
    functions = [func for func in reward_funcs if not isinstance(func, (str, nn.Module))]
    rewards = expand_parts(reward_funcs)
    names = [
        func.rstrip("/").split("/")[-1] if isinstance(func, str) else name_of(func)
        for func in rewards
        if not isinstance(func, nn.Module)
    ]
    check_reward_names(names)
    weights = args.reward_weights
    if weights is not None and not adds_rewards and len(weights) != len(rewards):
        raise ValueError(
            f"`reward_weights` has {len(weights)} entries for {len(rewards)} reward functions ({', '.join(names)}); "
            "give one for each, in their order."
        )
    if not adds_rewards and len(names) == len(rewards):  # TRL names a model that is given as an object
        check_weight_schedules(read_weight_schedules(args.reward_weight_schedules), names, weights)
        check_gates(args.reward_gates or {}, names)
    for name in {func.__name__ for func in rewards if hasattr(func, "shared_call")}:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} is a part of one reward function and the name of another reward; rename one.")
    estimator = load_estimator(args.estimator, args.estimator_kwargs)
    if estimator is not None:
        check_estimator(estimator, 2 if adds_rewards else len(rewards), args.num_generations)
    if isinstance(dataset, Dataset):
        needed = args.generation_batch_size // args.num_generations
        if len(dataset) < needed:  # TRL leaves out a generation batch that is not full
            raise ValueError(
                f"The training dataset has {len(dataset)} prompts, and one generation batch needs {needed} different "
                f"ones ({args.generation_batch_size} rollouts, {args.num_generations} of each). Add prompts, or lower "
                "`per_device_train_batch_size`, `gradient_accumulation_steps` or `steps_per_generation`."
            )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("`fp16` is true, and on a CPU it is ignored. Leave it out, or set `bf16`.")
    if args.eval_on_end and evaluation is None:
        raise ValueError("`eval_on_end` is true and there is no `eval_dataset`; give one, or leave it out.")
    datasets = {"training dataset": dataset}
    if isinstance(evaluation, dict):
        datasets |= {f"evaluation dataset {name!r}": data for name, data in evaluation.items()}
    else:
        datasets["evaluation dataset"] = evaluation
    for what, data in datasets.items():
        check_data(what, data, functions, adds_columns)
    tokenizer = arguments.get("processing_class")
    if tokenizer is not None and not adds_columns and not arguments.get("tools"):  # TRL may set a template for tools
        for data in datasets.values():
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


def shared_names(names: Sequence[str]) -> list[str]:
    """The warning about rewards that share a name, if any do."""
    if len(set(names)) == len(names):
        return []
    return [
        f"Several reward functions share a name ({', '.join(names)}): TRL mixes their columns in the log and in the "
        "completions table. Give each a `__name__` of its own."
    ]


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
            "Not one step was trained, so the model did not change: the data ended before one batch was full, or "
            "`num_train_epochs` is 0."
        )


# Data


def check_data(what: str, dataset: Any, functions: list[Any], adds_columns: bool) -> None:
    """
    Check that a dataset has the columns that reward functions need, and none that TRL needs for itself.

    Args:
        what (`str`):
            How messages call the dataset.
        dataset (`Dataset`, `IterableDataset` or `None`):
            The data; `None` passes.
        functions (`list`):
            The reward functions.
        adds_columns (`bool`):
            Whether rollouts bring columns of their own, so that a missing one is no mistake.

    Raises:
        `ValueError`: for the first column that is missing, or that has a reserved name.
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


# Packages, optimizer and schedule


def check_packages(training: Any) -> None:
    """
    Find a package that is missing, and options of optimizer, schedule or generation that do not exist.

    Args:
        training (`transformers.TrainingArguments`):
            Settings of the run.

    Raises:
        [`UsageError`]: which names the key, and the package or the option.
    """
    from transformers import GenerationConfig

    uses_vllm = getattr(training, "use_vllm", False)
    if uses_vllm and importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "`use_vllm` is true, and vLLM is not installed: `pip install -c constraints-vllm.txt '.[vllm]'` in a "
            "clone of gd2po_trl, or set `use_vllm` to false, which is much slower."
        )
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError(
            "`use_liger_kernel` is true, and it is not installed: `pip install liger-kernel`, or set it to false."
        )
    if not uses_vllm:  # which has other options
        known = [*vars(GenerationConfig()), "generation_config"]
        _check_keys("generation_kwargs", getattr(training, "generation_kwargs", None), known)
    known = [*inspect.signature(torch.utils.checkpoint.checkpoint).parameters, "preserve_rng_state"]
    _check_keys("gradient_checkpointing_kwargs", training.gradient_checkpointing_kwargs, known)
    _check_trackers(training.report_to)
    _check_schedule(training, _check_optimizer(training))


def _check_keys(name: str, options: dict[str, Any] | None, known: Collection[str]) -> None:
    for key in options or {}:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise UsageError(f"`{name}` holds `{key}`, which does not exist.{hint}")


def _check_trackers(trackers: list[str]) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    packages = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
    for tracker in trackers:
        if tracker not in INTEGRATION_TO_CALLBACK:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "all", "none"])
            raise UsageError(f"`report_to` names the tracker {tracker!r}; it may be {known}.")
        package = packages.get(tracker, tracker)
        module = package.replace("-", "_").partition("_core")[0]
        if tracker not in get_available_reporting_integrations() and importlib.util.find_spec(module) is None:
            raise UsageError(
                f"`report_to` names {tracker}, which is not installed: `pip install {package}`, or `report_to: none`."
            )


def _check_optimizer(training: Any) -> torch.optim.Optimizer:
    """The optimizer of a run over one parameter; plain SGD in the place of one that needs the policy's layers."""
    from transformers import Trainer
    from transformers.trainer_optimizer import is_optimizer_factory

    parameters = [nn.Parameter(torch.zeros(1))]
    keys = f"`optim: {getattr(training.optim, 'value', training.optim)}`"
    if training.optim_args:
        keys += f" with `optim_args: {training.optim_args}`"
    try:
        kind, kwargs = Trainer.get_optimizer_cls_and_kwargs(training)
        options = [option for option in (training.optim_args or "").replace(" ", "").split(",") if option]
        for option in options:
            others = copy.copy(training)
            others.optim_args = ",".join(other for other in options if other != option)
            if (kind, kwargs) == Trainer.get_optimizer_cls_and_kwargs(others):
                raise ValueError(f"{option} has no effect.")
        return torch.optim.SGD(parameters) if is_optimizer_factory(kind) else kind(parameters, **kwargs)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        reason = one_line(error)
        if "pass a" in reason and "model" in reason:  # it is installed, and looks for layers by their names
            return torch.optim.SGD(parameters)
        raise UsageError(f"{keys} cannot be used: {reason}") from error


def _check_schedule(training: Any, optimizer: torch.optim.Optimizer) -> None:
    from transformers import get_scheduler

    kind, kwargs = training.lr_scheduler_type, dict(training.lr_scheduler_kwargs or {})
    try:
        get_scheduler(kind, optimizer, 0, 100, scheduler_specific_kwargs=kwargs)
    except (ValueError, TypeError) as error:
        raise UsageError(
            f"`lr_scheduler_type: {getattr(kind, 'value', kind)}` with `lr_scheduler_kwargs: {kwargs or None}` cannot "
            f"be used: {one_line(error)}"
        ) from error
