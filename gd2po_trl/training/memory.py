"""
Expected peak memory of a training run, from shapes alone: the arithmetic of `recipes/README.md`.

Models are built on torch's `meta` device, where a parameter has a shape and takes no memory. GB are 10⁹ bytes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

GB = 1e9
# NF4 weights in blocks of 64 with one float32 scale each; double quantization stores the scales in 8 bit.
NF4_BITS, NF4_DOUBLE_BITS = 4.5, 4.127
CUDA_CONTEXT_GB = 1.0
REST_OF_TRAINING_GB = 2.0


@dataclass(frozen=True)
class PolicySize:
    """
    A policy as the trainer holds it.

    Args:
        parameters, trained (`int`): All parameters without the adapter, and those that the optimizer updates.
        weights_gb (`float`): The frozen or full weights; without the adapter.
        optimizer_gb, gradients_gb (`float`): Of the trained parameters; with an adapter its weights are part of
            `optimizer_gb`.
        hidden_size, intermediate_size, layers (`int`): Of the language model.
        cache_bytes_per_token (`int`): Keys and values of one token in bfloat16.
    """

    parameters: int
    trained: int
    weights_gb: float
    optimizer_gb: float
    gradients_gb: float
    hidden_size: int
    intermediate_size: int
    layers: int
    cache_bytes_per_token: int


@dataclass(frozen=True)
class Peak:
    """
    Expected peak of one GPU, in GB.

    Args:
        generating (`float`): While completions are sampled, without vLLM's share of the GPU.
        vllm_share (`float`): Share of the GPU that vLLM takes meanwhile; 0 without colocated vLLM.
        training (`float`): While the policy is updated.
    """

    generating: float
    vllm_share: float
    training: float

    def on(self, gpu_gb: float) -> float:
        """The larger of the two on a GPU of `gpu_gb`."""
        return max(self.generating + self.vllm_share * gpu_gb, self.training)

    def smallest_gpu(self) -> float:
        """What a GPU must have at least, in GB."""
        return max(self.generating / (1 - self.vllm_share), self.training)


def meta_model(config: "PreTrainedConfig", auto_class: Any) -> "nn.Module":
    """A model of `config`'s shape without memory for its weights."""
    import torch

    with torch.device("meta"):
        return auto_class.from_config(config)


def weight_bytes(module: "nn.Module", bytes_per_weight: int, quantization: dict[str, Any] | None = None) -> float:
    """
    Bytes of the weights of `module`, shared ones once.

    Args:
        module (`nn.Module`): On any device.
        bytes_per_weight (`int`): Of a weight that is not quantized.
        quantization (`dict`, *optional*): Arguments of `BitsAndBytesConfig`: linear layers but the output layer are
            stored in 4 or 8 bit.
    """
    from torch import nn

    total = sum(parameter.numel() for parameter in module.parameters())
    if not quantization:
        return total * bytes_per_weight
    head = getattr(module, "get_output_embeddings", lambda: None)()
    layers = [part for part in module.modules() if isinstance(part, nn.Linear) and part is not head]
    quantized = sum(part.weight.numel() for part in layers)
    bits = 8.0
    if quantization.get("load_in_4bit"):
        bits = NF4_DOUBLE_BITS if quantization.get("bnb_4bit_use_double_quant") else NF4_BITS
    return (total - quantized) * bytes_per_weight + quantized * bits / 8


def policy_size(
    config: "PreTrainedConfig",
    *,
    bytes_per_weight: int,
    peft_config: Any = None,
    quantization: dict[str, Any] | None = None,
    optimizer_bytes_per_value: float = 8.0,
) -> PolicySize:
    """
    Size of a policy and of what its training keeps.

    Args:
        config (`PreTrainedConfig`): Of the policy.
        bytes_per_weight (`int`): 4 for float32, 2 for bfloat16.
        peft_config (`PeftConfig`, *optional*): Of the adapter, which is trained in float32.
        quantization (`dict`, *optional*): As in [`weight_bytes`].
        optimizer_bytes_per_value (`float`): State per trained parameter in float32; 8 for Adam.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model: Any = meta_model(config, auto_class)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = weight_bytes(model, bytes_per_weight, quantization)
    if peft_config is None:
        trained = parameters
        optimizer = trained * optimizer_bytes_per_value * bytes_per_weight / 4
        gradients = trained * bytes_per_weight
    else:
        from peft import inject_adapter_in_model

        adapted = inject_adapter_in_model(peft_config, model, low_cpu_mem_usage=True)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        optimizer, gradients = trained * (4 + optimizer_bytes_per_value), trained * 4
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return PolicySize(
        parameters=parameters,
        trained=trained,
        weights_gb=weights / GB,
        optimizer_gb=optimizer / GB,
        gradients_gb=gradients / GB,
        hidden_size=text.hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        layers=text.num_hidden_layers,
        cache_bytes_per_token=4 * text.num_hidden_layers * getattr(text, "num_key_value_heads", heads) * head_size,
    )


def activations_gb(size: PolicySize, tokens: int, *, checkpointing: bool, bytes_per_value: int = 2) -> float:
    """
    What a forward pass over `tokens` keeps for the backward pass.

    With gradient checkpointing the input of every layer and the inside of one; without, the inside of all.
    """
    inside = tokens * (8 * size.hidden_size + 4 * size.intermediate_size) * bytes_per_value
    between = tokens * size.hidden_size * size.layers * bytes_per_value
    return (between + (inside if checkpointing else inside * size.layers)) / GB


def peak(
    size: PolicySize,
    *,
    activations: float,
    reward_models_gb: float = 0.0,
    vllm_share: float = 0.0,
    cached_tokens: int = 0,
    weights_split_over: int = 1,
    optimizer_split_over: int = 1,
) -> Peak:
    """
    Expected peak of one GPU.

    Args:
        size ([`PolicySize`]): From [`policy_size`].
        activations (`float`): From [`activations_gb`].
        reward_models_gb (`float`): Weights of the reward models on this GPU.
        vllm_share (`float`): `vllm_gpu_memory_utilization` of a colocated vLLM; 0 without one.
        cached_tokens (`int`): Tokens whose keys and values transformers' `generate` holds at once.
        weights_split_over, optimizer_split_over (`int`): GPUs that share the weights, and the rest (FSDP, ZeRO).
    """
    kept = size.weights_gb / weights_split_over + size.optimizer_gb / optimizer_split_over
    cache = cached_tokens * size.cache_bytes_per_token / GB
    gradients = size.gradients_gb / optimizer_split_over
    return Peak(
        generating=kept + cache + reward_models_gb + CUDA_CONTEXT_GB,
        vllm_share=vllm_share,
        training=kept + gradients + activations + reward_models_gb + REST_OF_TRAINING_GB,
    )
