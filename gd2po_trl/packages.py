"""What a run needs beside the policy: packages, an optimizer and a learning-rate schedule that can be made."""

import copy
import difflib
import importlib.util
from collections.abc import Sequence
from typing import Any

from .errors import UsageError


# Trackers whose package has another name.
PACKAGES = {"azure_ml": "azureml-core", "comet_ml": "comet-ml", "flyte": "flytekit"}
# Of `torch.utils.checkpoint.checkpoint`.
CHECKPOINTING_OPTIONS = (
    "use_reentrant",
    "context_fn",
    "determinism_check",
    "debug",
    "early_stop",
    "preserve_rng_state",
)


def check_packages(training: Any) -> None:
    """
    Find out what would end a run after the policy is loaded: a missing package, or options that nothing takes.

    Args:
        training (`transformers.TrainingArguments`):
            Settings of the run.

    Raises:
        [`UsageError`]: which names the key, and the package or the option.
    """
    if getattr(training, "use_vllm", False) and importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "`use_vllm` is true, and vLLM is not installed: `pip install -c constraints-vllm.txt '.[vllm]'` in a "
            "clone of gd2po_trl, or set `use_vllm` to false, which is much slower."
        )
    if training.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UsageError(
            "`use_liger_kernel` is true, and it is not installed: `pip install liger-kernel`, or set it to false."
        )
    _check_options(training)
    _check_trackers(training)
    optimizer = _check_optimizer(training)
    _check_schedule(training, optimizer)


def _check_options(training: Any) -> None:
    """Refuse what transformers and torch would ignore, or refuse while training."""
    from transformers import GenerationConfig

    if not getattr(training, "use_vllm", False):  # vLLM has names of its own
        known = [*vars(GenerationConfig()), "generation_config"]
        _check_keys("generation_kwargs", getattr(training, "generation_kwargs", None), known)
    _check_keys("gradient_checkpointing_kwargs", training.gradient_checkpointing_kwargs, CHECKPOINTING_OPTIONS)


def _check_keys(name: str, options: dict[str, Any] | None, known: Sequence[str]) -> None:
    for key in options or {}:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else ""
            raise UsageError(f"`{name}` holds `{key}`, which nothing takes.{hint}")


def _check_trackers(training: Any) -> None:
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    installed = get_available_reporting_integrations()
    for tracker in training.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            known = ", ".join([*INTEGRATION_TO_CALLBACK, "all", "none"])
            raise UsageError(f"`report_to` names the tracker {tracker!r}; it may be {known}.")
        package = PACKAGES.get(tracker, tracker)
        module = package.replace("-", "_").partition("_core")[0]
        if tracker not in installed and importlib.util.find_spec(module) is None:
            raise UsageError(
                f"`report_to` names {tracker}, which is not installed: `pip install {package}`, or `report_to: none`."
            )


def _check_optimizer(training: Any) -> Any:
    """The optimizer over one parameter, `None` where it needs the policy's own."""
    import torch
    from transformers import Trainer
    from transformers.trainer_optimizer import is_optimizer_factory

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
                raise ValueError(f"it has no effect to say {option}.")
        if is_optimizer_factory(kind):
            return None
        return kind([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except (ImportError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        if "pass a" in reason and "model" in reason:  # it is installed, and looks for layers by their names
            return None
        raise UsageError(f"{keys} cannot be used: {reason}") from error


def _check_schedule(training: Any, optimizer: Any) -> None:
    import torch
    from transformers import get_scheduler

    if optimizer is None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=0,
            num_training_steps=100,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(
            f"`lr_scheduler_type: {name}` with `lr_scheduler_kwargs: {training.lr_scheduler_kwargs}` cannot be used: "
            f"{reason}"
        ) from error
