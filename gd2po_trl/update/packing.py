"""Running a model over packed rollouts, and the comparison that shows whether it gives the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention import PackingError, placeholder_mask
from .layout import pack
from .plan import join_tables
from .rows import RowTable


# Log-probabilities may differ by rounding only: by this much, or by so many times what padding the same rollouts
# differently changes. A leak between rollouts, or wrong positions, changes them by 0.1 to 4.
MEAN_TOLERANCE, LARGEST_TOLERANCE, PADDING_FACTOR = 1e-4, 2e-3, 4.0


@dataclass(frozen=True)
class Rollouts:
    """
    Padded rollouts to run: B rows.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Prompts, padded on the left.
        completion_ids (`torch.Tensor` of shape `(B, T)`):
            Completions, padded on the right.
        table ([`RowTable`]):
            Their lengths and prompts.
    """

    prompt_ids: torch.Tensor
    completion_ids: torch.Tensor
    table: RowTable


def run_packed(
    model: torch.nn.Module, base_model: PreTrainedModel, batches: Sequence[Rollouts]
) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """
    Run the rollouts of `batches` in one packed forward pass.

    Args:
        model (`torch.nn.Module`):
            The policy as it is trained, with TRL's fused head; [`use_packed_attention`] is in force.
        base_model ([`~transformers.PreTrainedModel`]):
            The model under all wrappers and adapters.
        batches (sequence of [`Rollouts`]):
            With equal widths P of the prompts.

    Returns:
        For each batch, log-probabilities and entropies (`None` where the head does not compute them) of its completion
        tokens, `(B, T)`; 0 where nothing was run.

    Raises:
        [`PackingError`]: if not every layer computed its attention by the layout.
    """
    device = batches[0].prompt_ids.device
    ids = torch.cat([torch.cat([b.prompt_ids, b.completion_ids], dim=1).flatten() for b in batches])
    offsets: list[int] = []
    end = 0
    for batch in batches:
        rows, width = batch.completion_ids.shape
        offsets += range(end, end + rows * width, width) if width else [end] * rows
        end += rows * width
    row = pack(join_tables([batch.table for batch in batches]), offsets, batches[0].prompt_ids.size(1), device)
    labels = torch.full_like(row.source, -100)
    labels[row.scored] = ids[row.source[row.scored] + 1]
    output = model(
        input_ids=ids[row.source].unsqueeze(0),
        attention_mask=placeholder_mask(device),
        position_ids=row.position_ids.unsqueeze(0),
        shift_labels=labels.unsqueeze(0),
        fused_lm_head=True,
        packed_layout=row.attention,
    )
    layers = base_model.config.get_text_config().num_hidden_layers
    if row.attention.calls != layers:
        raise PackingError(f"{row.attention.calls} of its {layers} layers computed packed attention")

    def scatter(values: torch.Tensor | None) -> list[torch.Tensor | None]:
        if values is None:
            return [None] * len(batches)
        values = values[0].to(device)[row.scored]
        flat = values.new_zeros(end).index_put((row.target,), values)
        sizes = [batch.completion_ids.numel() for batch in batches]
        return [part.view_as(batch.completion_ids) for part, batch in zip(flat.split(sizes), batches, strict=True)]

    return list(zip(scatter(output.log_probs), scatter(output.entropy), strict=True))


def is_rounding(packed: torch.Tensor, padded: torch.Tensor, repadded: torch.Tensor) -> tuple[bool, dict[str, float]]:
    """
    Whether packed log-probabilities differ from padded ones by rounding only, and by how much.

    Args:
        packed, padded, repadded (`torch.Tensor` of shape `(M,)`):
            Log-probabilities of the same tokens; `repadded` with other padding than `padded`.
    """
    difference, rounding = (packed - padded).abs().float(), (repadded - padded).abs().float()
    values: dict[str, Any] = {
        "mean": difference.mean(),
        "largest": difference.max(),
        "padding_mean": rounding.mean(),
        "padding_largest": rounding.max(),
    }
    values = {name: float(value) for name, value in values.items()}
    # Comparisons with NaN are false: not a number is not rounding.
    same = values["mean"] <= max(MEAN_TOLERANCE, PADDING_FACTOR * values["padding_mean"]) and values["largest"] <= max(
        LARGEST_TOLERANCE, PADDING_FACTOR * values["padding_largest"]
    )
    return same, values
