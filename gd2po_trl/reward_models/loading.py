"""Loading a reward model's weights: SafeRLHF-type score heads and single-label sequence classifiers."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from ..errors import UsageError
from ..user_input import is_hub_id


# What a safe-rlhf checkpoint says of itself: how raw scores are normalized, by `score_type`
# (safe_rlhf/models/normalizer.py).
_NORMALIZE = {
    "reward": lambda scores, mean, std: (scores - mean) / (std + 1e-8),
    # Costs are scaled but not shifted: their sign separates safe from unsafe.
    "cost": lambda scores, mean, std: scores / (std + 1e-8),
    "critic": lambda scores, mean, std: scores,
}


class _Normalizer(nn.Module):
    """The running statistics that safe-rlhf stores with a score head, under its names."""

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("var", torch.ones(1))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.normalize = _NORMALIZE[getattr(config, "score_type", "reward")]

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        return self.normalize(scores, self.mean.float(), self.var.float().sqrt())


class ScoreModel(PreTrainedModel):
    """
    A backbone without a language-model head, and a linear score head read at the last attended token.

    Parameter names are those of the published checkpoints: `model.*` for the backbone and `score_head.weight`
    (`score_head.bias` if the config's `score_bias`, or `bias`, is true). Sources: `LlamaForScore` of
    PKU-Alignment/safe-rlhf (beaver-7b-*) and `AccustomedQwen2RewardModel` of align-anything
    (Qwen2.5-7B-SafeRLHF-*). Scores are normalized with the stored `normalizer.mean` and `normalizer.var` if the
    config's `do_normalize` is true, as safe-rlhf does; the published beaver checkpoints have it off.
    """

    base_model_prefix = "model"
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        bias = getattr(config, "score_bias", getattr(config, "bias", False))
        self.score_head = nn.Linear(config.hidden_size, 1, bias=bool(bias))
        if getattr(config, "do_normalize", False):
            self.normalizer = _Normalizer(config)
        self.post_init()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SequenceClassifierOutput:
        """Float32 `logits` (batch, 1) of ids and mask (batch, length), which may be padded on either side."""
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        scores = self.score_head(hidden[torch.arange(len(hidden), device=hidden.device), last]).float()
        if hasattr(self, "normalizer"):
            scores = self.normalizer(scores)
        return SequenceClassifierOutput(logits=scores)


def read_config(model: str, revision: str | None = None) -> PreTrainedConfig:
    """
    The config of a reward model, checked without reading its weights.

    Raises:
        [`UsageError`]: if there is no such model, if it needs remote code, or if it has not exactly one score.
    """
    folder = Path(model)
    if not folder.is_dir() and not is_hub_id(model, bare=True):
        raise UsageError(f"reward model {model!r}: there is no such folder.")
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise UsageError(f"reward model {model!r}: the folder has no weights (*.safetensors or pytorch_model*.bin).")
    try:
        config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # each kind of config validates itself in its own way
        raise UsageError(
            f"reward model {model!r} cannot be read: {_first_line(error)} Give a folder with config.json, weights and "
            "tokenizer, or a Hub id; code from the Hub is never run."
        ) from error
    outputs = config.num_labels if is_classifier(config) else getattr(config, "score_dim", 1)
    if outputs != 1:
        raise UsageError(f"reward model {model!r} has {outputs} outputs; a reward model must have exactly one.")
    if getattr(config, "score_type", "reward") not in _NORMALIZE:
        raise UsageError(
            f"reward model {model!r} has score_type={config.score_type!r} in its config; known are "
            f"{', '.join(_NORMALIZE)}."
        )
    return config


def is_classifier(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint is an `AutoModelForSequenceClassification`; all others are read as score heads."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def scores_last_token(config: PreTrainedConfig) -> bool:
    """Whether a checkpoint is a classifier that scores the last token which is not its config's padding token."""
    name = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(config.model_type, "")
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    reads_last = model_class is not None and issubclass(model_class, GenericForSequenceClassification)
    return is_classifier(config) and reads_last


def padding_token(config: PreTrainedConfig) -> int | None:
    """The id that the model itself takes for padding; `None` if its config has none, or one that no token has."""
    text_config = config.get_text_config()
    token = getattr(text_config, "pad_token_id", None)
    is_token = token is not None and 0 <= token < getattr(text_config, "vocab_size", token + 1)
    return token if is_token else None


def load_scoring_module(
    model: str,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
) -> PreTrainedModel:
    """
    Loads the weights straight onto `device`, without a second copy in CPU memory.

    Args:
        model (`str`): Folder or Hub id; safetensors or `pytorch_model.bin` (`weights_only`), sharded or not.
        config (`PreTrainedConfig`): From [`read_config`].
        quantization (`dict[str, Any]`, *optional*): Arguments of `BitsAndBytesConfig`.

    Returns:
        `PreTrainedModel`: In eval mode, without gradients; its output has `logits` of shape `(batch, 1)`.

    Raises:
        [`UsageError`]: if the checkpoint lacks weights, most often because it is no reward model.
    """
    options: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization is not None:
        from transformers import BitsAndBytesConfig

        # The head is tiny, and its precision is the reward's.
        options["quantization_config"] = BitsAndBytesConfig(
            **quantization, bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=["score_head", "score", "classifier"]
        )
    auto_class = AutoModelForSequenceClassification if is_classifier(config) else ScoreModel
    try:
        with _outside_zero3():
            module, report = auto_class.from_pretrained(
                model,
                config=config,
                revision=revision,
                dtype=dtype,
                device_map={"": device},
                output_loading_info=True,
                trust_remote_code=False,
                **options,
            )
    except UnpicklingError as error:
        raise UsageError(
            f"the weights of reward model {model!r} cannot be read: the file holds more than tensors, and "
            "code in it is never run."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, ImportError, AssertionError, SafetensorError) as error:
        reason = _first_line(error)
        if "ignore_mismatched_sizes" in reason:
            reason = "they have other sizes than its config.json says."
        raise UsageError(f"the weights of reward model {model!r} cannot be read: {reason}") from error
    missing = sorted(report["missing_keys"])
    unused = sorted(key for key in report["unexpected_keys"] if key.startswith("score_head."))
    if missing or unused:
        problem = f"lacks {', '.join(missing[:3])}" if missing else f"has {', '.join(unused)} that its config denies"
        raise UsageError(
            f"reward model {model!r} (architectures: {config.architectures}) {problem}. Supported are backbones "
            "with a `score_head` and sequence classifiers with one label."
        )
    return module.eval().requires_grad_(False)


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[Callable[..., Any]]:
    """
    Gives a function that runs `module` on `device`, where its weights are inside the block only.

    The module itself stays untouched where it is: its weights never change, so nothing has to be copied back.
    """
    tensors = itertools.chain(module.named_parameters(), module.named_buffers())
    weights = {name: tensor.detach().to(device) for name, tensor in tensors}
    try:
        yield lambda **inputs: functional_call(module, weights, (), inputs)
    finally:
        weights.clear()
        if device.type == "cuda":
            # For users of the same GPU outside torch's allocator, vLLM among them.
            torch.cuda.empty_cache()


@contextmanager
def _outside_zero3() -> Iterator[None]:
    """Under DeepSpeed ZeRO-3 `from_pretrained` would shard the frozen model for an engine that it never gets."""
    from transformers.integrations import deepspeed

    active = deepspeed.is_deepspeed_zero3_enabled() and deepspeed._hf_deepspeed_config_weak_ref()
    if active:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if active:
            deepspeed.set_hf_deepspeed_config(active)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
