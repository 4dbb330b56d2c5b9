"""
The attention of packed rollouts, as an attention implementation of transformers.

Without an [`AttentionLayout`] among the keyword arguments of the forward pass it is SDPA. The layout arrives as a
keyword argument, and not from a global, since gradient checkpointing computes a layer again during the backward pass.
Models that do not hand keyword arguments on would silently ignore it: a placeholder in the place of the mask, which
nothing else uses, makes that an error.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .layout import AttentionLayout


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None

PACKED_ATTENTION = "gd2po_packed"

# Keyword arguments that say nothing about which keys a query sees, or how.
HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "is_causal",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class PackingError(RuntimeError):
    """A model computes attention in a way that packed rollouts do not fit."""


def placeholder_mask(device: torch.device) -> torch.Tensor:
    """What stands in the place of the mask: empty, and 4-dimensional, which transformers hands on as it is."""
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: AttentionLayout | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention over a flat row of N tokens, in which each segment sees its root and itself.

    Args:
        module (`torch.nn.Module`):
            The attention layer.
        query (`torch.Tensor` of shape `(1, H, N, D)`):
            Queries of H heads.
        key, value (`torch.Tensor` of shape `(1, H_kv, N, D)`):
            Keys and values of H_kv heads.
        attention_mask (`torch.Tensor`):
            [`placeholder_mask`].
        dropout (`float`, *optional*, defaults to `0.0`):
            Dropout of the attention weights.
        scaling (`float`, *optional*):
            Scale of the scores.
        packed_layout ([`AttentionLayout`], *optional*):
            Of the flat row. Without it this is SDPA.

    Returns:
        `tuple` of the output, `(1, N, H, D)`, and `None`.

    Raises:
        [`PackingError`]: if the layout did not arrive, or with something that changes which keys a query sees.
    """
    if packed_layout is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise PackingError("the model does not hand keyword arguments on to its attention")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if attention_mask is None or attention_mask.numel() != 0:
        raise PackingError("the model makes an attention mask of its own")
    foreign = [name for name, given in kwargs.items() if given is not None and name not in HARMLESS_ARGUMENTS]
    if foreign or kwargs.get("is_causal") is False:
        raise PackingError(f"its attention uses {', '.join(foreign) or 'is_causal=False'}")
    packed_layout.calls += 1

    if varlen_attn is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and not dropout:
        if query.size(-1) == value.size(-1) <= 256:
            return _ragged_attention(query, key, value, scaling, packed_layout), None
    outputs = []
    for rectangle in packed_layout.rectangles:
        output, _ = sdpa_attention_forward(
            module,
            _gather(query, rectangle.queries),
            _gather(key, rectangle.keys),
            _gather(value, rectangle.keys),
            rectangle.mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=True,
        )
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs).index_select(0, packed_layout.order).unsqueeze(0), None


def _gather(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(1, H, N, D)` at `positions` `(n, L)`, as `(n, H, L, D)`."""
    taken = heads[0].transpose(0, 1).index_select(0, positions.flatten())
    return taken.unflatten(0, positions.shape).transpose(1, 2)


def _ragged_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, layout: AttentionLayout
) -> torch.Tensor:
    """The same without rectangles: every segment is a sequence of its own length, aligned to the end of its keys."""
    keys, query_ends, key_ends, longest_query, longest_key = layout.ragged
    return varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, keys),
        value[0].transpose(0, 1).index_select(0, keys),
        query_ends,
        key_ends,
        longest_query,
        longest_key,
        scale=scaling,
        window_size=(-1, 0),
        enable_gqa=query.size(1) != key.size(1),
    ).unsqueeze(0)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


@contextmanager
def use_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """
    Let `model` compute attention by [`packed_attention`] within the context, which has to last until the backward pass
    is over.

    Raises:
        [`PackingError`]: if the model does not take another attention implementation.
    """
    before = model.config._attn_implementation
    if before == PACKED_ATTENTION:
        yield
        return
    try:
        model.set_attn_implementation(PACKED_ATTENTION)
        if model.config._attn_implementation != PACKED_ATTENTION:
            raise PackingError("the model does not take another attention implementation")
        yield
    finally:
        model.set_attn_implementation(before)
