"""Where rollouts without advantage are trained all the same, and where rollouts are padded: the reasons, in words."""

import inspect
from typing import TYPE_CHECKING, Any

import torch
from trl.trainer import grpo_trainer as trl_module

from .rows import LOSS_DENOMINATORS


if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..gd2po_trainer import GD2POTrainer


# RoPE whose frequencies do not depend on the longest position of a forward pass.
STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn", "proportional"})

# What TRL's trainer must tell for the update to be exact. Where a version of TRL has renamed one, everything is
# trained, padded.
DECISIVE_ATTRIBUTES = ("beta", "entropy_coef", "top_entropy_quantile", "aux_loss_enabled", "loss_type")


def reason_to_train_all_rows(trainer: "GD2POTrainer") -> str | None:
    """Why leaving out rollouts without advantage would not give the same gradient, or `None` where it does."""
    args = trainer.args
    unknown = _unknown_trainer(trainer)
    if not args.skip_zero_advantage_rows:
        return "`skip_zero_advantage_rows` is off"
    if unknown is not None:
        return unknown
    if trainer.beta != 0.0:
        return "`beta` is not 0, so that the KL term trains every rollout"
    if trainer.entropy_coef != 0.0 or args.use_adaptive_entropy:
        return "the entropy bonus trains every rollout"
    if trainer.top_entropy_quantile < 1.0:
        return "`top_entropy_quantile` ranks the tokens of every rollout"
    if trainer.aux_loss_enabled:
        return "the load-balancing loss of a mixture-of-experts model covers every rollout"
    if args.use_liger_kernel and hasattr(trainer, "compute_liger_loss"):
        return "this version of TRL computes the Liger loss on another path"
    if trainer.loss_type not in LOSS_DENOMINATORS:
        return f"the loss type {trainer.loss_type!r} is unknown"
    return None


def reason_not_to_pack(trainer: "GD2POTrainer") -> str | None:
    """Why rollouts cannot be packed, as far as it shows before the first forward pass, or `None`."""
    args = trainer.args
    unknown = _unknown_trainer(trainer)
    if not args.packed_update:
        return "`packed_update` is off"
    if unknown is not None:
        return unknown
    if not hasattr(trl_module, "add_fused_lm_head"):
        return "this version of TRL has no fused head (1.16 has)"
    if args.use_adaptive_entropy:
        return "`use_adaptive_entropy` changes its coefficient within the loss"
    if trainer.aux_loss_enabled:
        return "the load-balancing loss of a mixture-of-experts model counts every token"
    if trainer.loss_type not in LOSS_DENOMINATORS:
        return f"the loss type {trainer.loss_type!r} is unknown"
    if args.torch_compile:
        return "`torch_compile` would compile the model anew for every forward pass"
    if args.n_gpu > 1 and not trainer.is_deepspeed_enabled and trainer.accelerator.num_processes == 1:
        return "the model is replicated by DataParallel; start one process per GPU"
    if args.parallelism_config is not None:
        return "sequences are split over devices"
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    return unsupported_adapter(unwrapped) or unsupported_config(base_model(unwrapped).config)


def _unknown_trainer(trainer: "GD2POTrainer") -> str | None:
    missing = [name for name in DECISIVE_ATTRIBUTES if not hasattr(trainer, name)]
    missing += [name for name in ("use_adaptive_entropy", "use_liger_kernel") if not hasattr(trainer.args, name)]
    if missing:
        return f"this version of TRL does not tell its `{missing[0]}`"
    # Unsloth puts a loss of its own in the place of the one that calls `_compute_loss`, where both act.
    code = getattr(inspect.unwrap(type(trainer).compute_loss), "__code__", None)
    if code is None or "_compute_loss" not in code.co_names:
        return "another package has replaced TRL's loss, and what it computes is not known here"
    return None


def unsupported_config(config: "PreTrainedConfig") -> str | None:
    """What in the configuration of a model rules packing out, or `None`. What it cannot tell, the self-check finds."""
    if config.get_text_config() is not config:
        return "the model is not a language model alone"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]:
        if parameters.get("rope_type") not in STATIC_ROPE:
            return f"its rotary embedding is of type {parameters.get('rope_type')!r}"
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        others = sorted(set(layer_types) - {"full_attention"})
        if others:
            return f"it has layers of type {', '.join(others)}"
    elif getattr(config, "sliding_window", None) is not None:
        return "its attention has a sliding window"
    return None


def unsupported_adapter(model: torch.nn.Module) -> str | None:
    """Which adapter of a PEFT model does more to a token than the token itself says, or `None`."""
    from peft import PeftModel, PeftType

    if not isinstance(model, PeftModel):
        return None
    for name, config in model.peft_config.items():
        if config.peft_type != PeftType.LORA:
            return f"the adapter {name!r} is of type {getattr(config.peft_type, 'value', config.peft_type)}"
        if "alora_invocation_tokens" not in config.__dataclass_fields__:
            return f"this version of PEFT does not tell whether the adapter {name!r} is an activated LoRA"
        if config.alora_invocation_tokens is not None:
            return f"the adapter {name!r} is an activated LoRA (aLoRA)"
    return None


def base_model(unwrapped: torch.nn.Module) -> Any:
    """The model under an adapter."""
    return unwrapped.get_base_model() if hasattr(unwrapped, "get_base_model") else unwrapped
