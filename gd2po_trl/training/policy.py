"""The policy that a recipe names, a whole model or an adapter, and its tokenizer: checked, then loaded."""

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, one_line
from ..recipe import Recipe
from ..user_input import is_hub_id


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# Keys of a recipe -> fields of a LoRA adapter's configuration.
LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def check_model(recipe: Recipe) -> None:
    """
    Check that the policy can be loaded, from its configuration alone.

    If it is an adapter, its own rank and targets replace `lora_r` and the like in the recipe.

    Raises:
        [`UsageError`]: if it cannot, or if the model that an adapter belongs to cannot.
    """
    name = recipe.model.model_name_or_path
    folder = Path(name)
    if not folder.is_dir() and not is_hub_id(name, bare=True):  # bare is an id such as gpt2
        raise UsageError(f"`model_name_or_path` is '{name}', and there is no such folder.")
    adapter = read_adapter(recipe)
    if adapter is None:
        reason = _reason_not_to_load(name, recipe.model.model_revision, recipe)
        if reason is not None:
            raise UsageError(f"`model_name_or_path` is '{name}', which cannot be loaded: {reason}{_remedy(folder)}")
        return
    base = adapter.base_model_name_or_path
    if str(adapter.task_type or "CAUSAL_LM").rpartition(".")[2] != "CAUSAL_LM":
        raise UsageError(f"`model_name_or_path` is '{name}', an adapter for {adapter.task_type}, not for a policy.")
    reason = _reason_not_to_load(base, adapter.revision, recipe) if base else "It names none."
    if reason is not None:
        raise UsageError(
            f"`model_name_or_path` is '{name}', an adapter of the model '{base}', and that model cannot be loaded: "
            f"{reason} Put it there, or change `base_model_name_or_path` in the adapter's adapter_config.json."
        )
    _take_over(recipe, adapter)


def read_adapter(recipe: Recipe) -> "PeftConfig | None":
    """The configuration of the adapter that the policy is, or `None` for a whole model."""
    from peft import PeftConfig
    from transformers.utils import find_adapter_config_file

    name, revision = os.path.expanduser(recipe.model.model_name_or_path), recipe.model.model_revision
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        return PeftConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, TypeError, KeyError) as error:
        if not (Path(name) / "adapter_config.json").is_file():
            return None  # not an adapter; loading it as a model gives the error
        reason = one_line(error)
        raise UsageError(
            f"`model_name_or_path` is '{name}', an adapter whose adapter_config.json cannot be read: {reason}"
        ) from error


def whole_model(recipe: Recipe) -> tuple[str, str | None]:
    """Name and revision of the model whose weights are loaded: the policy itself, or the model of the adapter."""
    adapter = read_adapter(recipe)
    if adapter is not None:
        return adapter.base_model_name_or_path, adapter.revision
    return recipe.model.model_name_or_path, recipe.model.model_revision


def _reason_not_to_load(name: str, revision: str | None, recipe: Recipe) -> str | None:
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=recipe.training.trust_remote_code)
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


def _remedy(folder: Path) -> str:
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    return f" It holds checkpoints; name one of them, such as {checkpoints[-1]}." if checkpoints else ""


def _take_over(recipe: Recipe, adapter: "PeftConfig") -> None:
    """Replace the recipe's settings for a new adapter by those of `adapter`."""
    ignored = []
    for key, name in LORA_FIELDS.items():
        value = getattr(adapter, name, None)
        value = sorted(value) if isinstance(value, (set, list, tuple)) else value
        asked = recipe.settings.get(key)
        same = sorted(asked) if isinstance(asked, list) else asked
        if asked is not None and asked != ["all-linear"] and value not in (asked, same):
            ignored.append(f"{key}: {asked}")
        if key in recipe.settings:
            recipe.settings[key] = value
        setattr(recipe.model, key, value)
    recipe.model.use_peft = recipe.settings["use_peft"] = True
    logger.info(
        f"'{recipe.model.model_name_or_path}' is an adapter of '{adapter.base_model_name_or_path}': it trains on."
    )
    if ignored:
        logger.warning(
            f"The adapter trains on as it is: {', '.join(ignored)} of the recipe does not apply. For a new adapter, "
            "or for all weights, merge this one first: `gd2po merge`."
        )


def model_init_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the policy."""
    return {
        "revision": recipe.model.model_revision,
        "attn_implementation": recipe.model.attn_implementation,
        "dtype": recipe.model.dtype,
        **(recipe.training.model_init_kwargs or {}),
    }


def policy_arguments(recipe: Recipe) -> dict[str, Any]:
    """
    What a trainer of TRL gets about the policy: `model`, `peft_config` and `quantization_config`.

    A whole model is left to TRL, by its name. An adapter is loaded here, to train on.
    """
    from trl import get_peft_config, get_quantization_config

    init_kwargs, quantization = model_init_kwargs(recipe), get_quantization_config(recipe.model)
    adapter = read_adapter(recipe)
    if adapter is not None:
        model = _load_adapter(recipe, adapter, {**init_kwargs, "quantization_config": quantization})
        recipe.training.model_init_kwargs = None
        return {"model": model, "peft_config": None, "quantization_config": None}
    recipe.training.model_init_kwargs = init_kwargs
    return {
        "model": recipe.model.model_name_or_path,
        "peft_config": get_peft_config(recipe.model),
        "quantization_config": quantization,
    }


def _load_adapter(recipe: Recipe, adapter: "PeftConfig", init_kwargs: dict[str, Any]) -> "PeftModel":
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    training, quantization = recipe.training, init_kwargs["quantization_config"]
    init_kwargs |= {"revision": adapter.revision, "trust_remote_code": training.trust_remote_code}
    if quantization is None:
        del init_kwargs["quantization_config"]
    if training.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        init_kwargs["device_map"] = None  # as TRL loads a model that it is given by name
    base = create_model_from_path(adapter.base_model_name_or_path, **init_kwargs)
    return PeftModel.from_pretrained(
        base,
        recipe.model.model_name_or_path,
        revision=recipe.model.model_revision,
        is_trainable=True,
        autocast_adapter_dtype=quantization is None,
    )


def load_tokenizer(recipe: Recipe, dataset: "Dataset") -> "PreTrainedTokenizerBase":
    """
    The policy's tokenizer for `dataset`, set up as TRL does, except that completions stay text.

    TRL parses a completion into fields where the tokenizer has a response template, and what the rewards of a recipe
    read, such as `<think>` or `<tool_call>`, would then be gone from its content. An adapter without a tokenizer of
    its own has that of its model.
    """
    from transformers import AutoTokenizer

    name, revision = recipe.model.model_name_or_path, recipe.model.model_revision
    adapter = read_adapter(recipe)
    if adapter is not None and not _has_tokenizer(name, revision):
        name, revision = adapter.base_model_name_or_path, adapter.revision
    tokenizer = AutoTokenizer.from_pretrained(
        name,
        revision=revision,
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


def _has_tokenizer(name: str, revision: str | None) -> bool:
    from transformers.utils import cached_file

    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    return cached_file(name, "tokenizer_config.json", **options) is not None
