"""What users type: mappings, also as JSON, names that are not folders, and numbers that are possible."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError


# A namespace is required: a bare word in a recipe is far more often a folder that is missing than a Hub id.
HUB_ID = re.compile(r"\w[\w-]*(\.[\w-]+)*/\w[\w.-]*")
FILE_SUFFIXES = (".parquet", ".json", ".jsonl", ".csv", ".gz", ".bz2", ".xz", ".zst")

# Ranges of numbers that TRL and transformers check only after the model is loaded, or not.
_RULES: tuple[tuple[Callable[[float], bool], str, str], ...] = (
    (
        lambda value: value >= 0,
        "must not be negative",
        "learning_rate weight_decay adam_epsilon warmup_steps dataloader_num_workers beta epsilon epsilon_high",
    ),
    (
        lambda value: value >= 1,
        "must be at least 1",
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps generation_batch_size "
        "steps_per_generation num_generations_eval num_iterations max_completion_length max_length max_prompt_tokens "
        "verdict_steps lora_r vllm_tensor_parallel_size vllm_max_model_length",
    ),
    (
        lambda value: value > 0,
        "must be positive",
        "num_train_epochs logging_steps save_steps eval_steps temperature repetition_penalty lora_alpha",
    ),
    (lambda value: 0 <= value <= 1, "must be between 0 and 1", "min_p top_entropy_quantile"),
    (lambda value: 0 < value <= 1, "must be above 0 and at most 1", "top_p vllm_gpu_memory_utilization"),
    (lambda value: 0 <= value < 1, "must be at least 0 and below 1", "adam_beta1 adam_beta2 lora_dropout"),
    (lambda value: 0 <= value < 2**32, "must be between 0 and 2**32 - 1", "seed data_seed"),
    (lambda value: value >= 0, "must be at least 1, or 0 (or -1) for off", "top_k"),
    (
        lambda value: value == -1 or value >= 1,
        "must be at least 1, or -1 for as many as `num_train_epochs` asks",
        "max_steps",
    ),
)
RANGES = {key: (is_possible, what) for is_possible, what, keys in _RULES for key in keys.split()}
# Text of which anything but these would be ignored, or would train something else than a policy.
CHOICES = {"vllm_mode": ("colocate", "server"), "lora_task_type": ("CAUSAL_LM",)}
# Keys of `generation_kwargs` that are keys of a recipe too.
GENERATION = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def is_hub_id(name: str, *, bare: bool = False) -> bool:
    """
    Whether a name that no folder has can be a Hub id `owner/name`, or, if `bare`, one without an owner such as gpt2.

    It cannot when it ends like a data file, or when its first part is a folder here: then it is a mistyped path.
    """
    if bare and re.fullmatch(r"\w[\w.-]*", name):
        return True
    is_path = name.lower().endswith(FILE_SUFFIXES) or Path(name.split("/")[0]).is_dir()
    return HUB_ID.fullmatch(name) is not None and not is_path


def as_mapping(name: str, value: Any) -> dict[str, Any]:
    """The mapping that `value` is, or that its JSON text describes; empty for `None`, else [`UsageError`]."""
    quoted = name if name.startswith("-") else f"`{name}`"
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{quoted} is not valid JSON: {error}.") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{quoted} is {value!r}; it must be a mapping, not {type(value).__name__}.")
    return dict(value)


def check_ranges(values: Mapping[str, Any]) -> None:
    """
    Refuse numbers and words with which no run works, or with which one would do something else than asked.

    Raises:
        [`UsageError`]: which names the key and what it may be.
    """
    for key, value in values.items():
        if is_number(value):
            if math.isnan(value):
                raise UsageError(f"`{key}` is nan; it must be a number.")
            _check_range(key, value, *RANGES.get(key, (lambda _: True, "")))
        elif value not in (choices := CHOICES.get(key, (value,))):
            raise UsageError(f"`{key}` is {value!r}; it must be {' or '.join(choices)}.")
    for key, value in (values.get("generation_kwargs") or {}).items():
        if key in GENERATION and value is not None:
            name = f"generation_kwargs.{key}"
            if not is_number(value):
                raise UsageError(f"`{name}` is {value!r} ({type(value).__name__}); it must be a number.")
            _check_range(name, value, *RANGES[key])


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float; `True` and `False` are neither here."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_range(name: str, value: float, is_possible: Callable[[float], bool], what: str) -> None:
    if what and not (is_possible(value) and math.isfinite(value)):
        raise UsageError(f"`{name}` is {value!r}; it {what}.")
