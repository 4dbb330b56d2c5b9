"""
The layout of packed rollouts: one flat row of tokens in which every prompt is run once.

    [ p_1 … p_(n-1) | p_n c¹_1 … c¹_a | p_n c²_1 … c²_b | … ]

The rollouts of a prompt share a *root*, its tokens but the last. The last prompt token is repeated at the head of
every *branch*, so that each position of a branch has one label, the next token of its rollout, and no position serves
two branches. The last token of a completion predicts nothing and is left out. A prompt with a single rollout is one
segment without a root. Segments lie end to end, without padding; attention gathers them into rectangles
([`Rectangle`]).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from .rows import RowTable


# A rectangle may be so much larger than the keys that it holds; a segment that would exceed it starts another one.
PADDING_LIMIT = 1.2


@dataclass(frozen=True)
class Segment:
    """A run of tokens in the flat row, and the root that it sees before itself (`None` for one that starts a row)."""

    length: int
    root: int | None = None


def group_segments(segments: Sequence[Segment]) -> list[list[int]]:
    """
    Numbers of the segments that share a rectangle: with a root or without, and of like length.

    Returns:
        List of groups, each a list of indices into `segments`.
    """
    groups: list[list[int]] = []
    for has_root in (False, True):
        chosen = [n for n, segment in enumerate(segments) if (segment.root is not None) == has_root]
        # By the root's length first: padding of a root costs every query of the segment.
        chosen.sort(key=lambda n: (_root_length(segments, n), segments[n].length), reverse=True)
        held = 0
        longest_root = longest = 0
        for n in chosen:
            root, length = _root_length(segments, n), segments[n].length
            size = max(longest_root, root) + max(longest, length)
            if held and (len(groups[-1]) + 1) * size <= PADDING_LIMIT * (held + root + length):
                groups[-1].append(n)
                held += root + length
                longest = max(longest, length)
            else:
                groups.append([n])
                held, longest_root, longest = root + length, root, length
    return groups


def gathered_keys(segments: Sequence[Segment]) -> int:
    """
    Keys (and values) that attention gathers per layer for the rollouts of `segments`, padding included: what a padded
    batch holds as rows times width.
    """
    roots = {segment.root for segment in segments}
    return sum(
        sum(n not in roots for n in group)
        * (max(_root_length(segments, n) for n in group) + max(segments[n].length for n in group))
        for group in group_segments(segments)
    )


def _root_length(segments: Sequence[Segment], n: int) -> int:
    root = segments[n].root
    return 0 if root is None else segments[root].length


def segments_of(table: RowTable) -> tuple[list[Segment], list[int]]:
    """
    The segments of the rollouts of `table` that are run, in the order of the flat row, and the rollout of each (for a
    root, the first of its rollouts).
    """
    prompts, prompt_lengths, lengths = (
        column.tolist() for column in (table.prompts, table.prompt_lengths, table.lengths)
    )
    rollouts: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            rollouts.setdefault(prompts[row], []).append(row)
    segments, rows = [], []
    for members in rollouts.values():
        shared = prompt_lengths[members[0]] - 1
        if len(members) == 1 or shared == 0:
            segments += [Segment(shared + lengths[row]) for row in members]
        else:
            root = len(segments)
            segments.append(Segment(shared))
            rows.append(members[0])
            segments += [Segment(lengths[row], root) for row in members]
        rows += members
    return segments, rows


@dataclass(frozen=True)
class Rectangle:
    """
    Segments of like length as attention computes them: `n` rows of `L` queries and `S` keys.

    Attention without a mask skips half of the work. So where roots are short, their queries are computed once more
    before those of each segment, and a query sees every earlier key.

    Args:
        queries (`torch.Tensor` of shape `(n, L)`, int64):
            Positions in the flat row; padding on the right points to position 0.
        keys (`torch.Tensor` of shape `(n, S)`, int64):
            The same for keys and values: the root, padded on the left where there is a mask, then the segment itself.
        mask (`torch.Tensor` of shape `(n, 1, L, S)`, bool, or `None`):
            Which keys a query sees; `None` where that is every earlier one.
        own (`torch.Tensor` of shape `(n, L)`, bool):
            Which queries are those of the segments: neither padding nor of a root.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor | None
    own: torch.Tensor


class AttentionLayout:
    """
    What the attention of every layer needs to know of a flat row of N tokens.

    Args:
        segments (sequence of [`Segment`]):
            In the order of the flat row.
        device (`torch.device`):
            Where the index tensors are made.

    Attributes:
        calls (`int`):
            How often attention was computed with this layout.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device):
        self.segments = list(segments)
        self.device = device
        self.calls = 0
        starts = [0]
        for segment in self.segments:
            starts.append(starts[-1] + segment.length)
        self.starts, self.num_tokens = starts[:-1], starts[-1]

    @cached_property
    def rectangles(self) -> list[Rectangle]:
        """The segments as rectangles."""
        return [self._rectangle(group) for group in self._groups]

    @cached_property
    def order(self) -> torch.Tensor:
        """Place of each token of the flat row in the concatenated, flattened queries of the rectangles, `(N,)`."""
        order = torch.empty(self.num_tokens, dtype=torch.long, device=self.device)
        offset = 0
        for rectangle in self.rectangles:
            places = torch.arange(rectangle.queries.numel(), device=self.device).view_as(rectangle.queries)
            order[rectangle.queries[rectangle.own]] = offset + places[rectangle.own]
            offset += rectangle.queries.numel()
        return order

    @cached_property
    def ragged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, int]:
        """
        The same for an attention that takes sequences of any length: positions of the keys of all segments end to end,
        cumulative lengths (int32, from 0) of queries and of keys, and the largest length of either.
        """
        key_starts: list[int] = []
        key_lengths: list[int] = []
        per_segment = []
        for n, segment in enumerate(self.segments):
            root = _root_length(self.segments, n)
            if segment.root is not None:
                key_starts.append(self.starts[segment.root])
                key_lengths.append(root)
            key_starts.append(self.starts[n])
            key_lengths.append(segment.length)
            per_segment.append(root + segment.length)
        query_lengths = [segment.length for segment in self.segments]
        return (
            ragged_ranges(key_starts, key_lengths, self.device),
            _cumulative(query_lengths, self.device),
            _cumulative(per_segment, self.device),
            max(query_lengths),
            max(per_segment),
        )

    @cached_property
    def _groups(self) -> list[list[int]]:
        return group_segments(self.segments)

    def _column(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, device=self.device).unsqueeze(1)

    def _rectangle(self, group: list[int]) -> Rectangle:
        lengths = [self.segments[n].length for n in group]
        roots = [_root_length(self.segments, n) for n in group]
        starts = self._column([self.starts[n] for n in group])
        root_starts = self._column([self.starts[self.segments[n].root or 0] for n in group])
        widest = max(root + length for root, length in zip(roots, lengths, strict=True))
        if widest**2 < 2 * max(lengths) * (max(roots) + max(lengths)):
            columns, size = torch.arange(widest, device=self.device), self._column(roots)
            is_own = (columns >= size) & (columns < size + self._column(lengths))
            rows = torch.where(columns < size, root_starts + columns, torch.where(is_own, starts + columns - size, 0))
            return Rectangle(rows, rows, None, is_own)
        steps = torch.arange(max(lengths), device=self.device)
        is_own = steps < self._column(lengths)
        own = torch.where(is_own, starts + steps, 0)
        padding = self._column([max(roots) - root for root in roots])
        columns = torch.arange(max(roots), device=self.device)
        is_root = columns >= padding
        keys = torch.cat([torch.where(is_root, root_starts + columns - padding, 0), own], dim=1)
        is_earlier = steps.unsqueeze(1) >= steps
        mask = torch.cat(
            [
                is_root.unsqueeze(1).expand(-1, len(steps), -1),
                is_earlier.expand(len(group), -1, -1),
            ],
            dim=2,
        )
        return Rectangle(own, keys, mask.unsqueeze(1), is_own)


@dataclass(frozen=True)
class PackedRow:
    """
    A flat row of N tokens of which M are scored, and where everything comes from and goes to.

    Args:
        source (`torch.Tensor` of shape `(N,)`, int64):
            Where in the flattened `[prompt | completion]` ids of the batches each token stands.
        position_ids (`torch.Tensor` of shape `(N,)`, int64):
            Its position in its rollout, from 0.
        scored (`torch.Tensor` of shape `(M,)`, int64):
            Positions in the flat row that have a label; the label is the token that follows in `source`.
        target (`torch.Tensor` of shape `(M,)`, int64):
            Where in the flattened completions of the batches the log-probability of that label goes.
        attention ([`AttentionLayout`]):
            For the attention of every layer.
    """

    source: torch.Tensor
    position_ids: torch.Tensor
    scored: torch.Tensor
    target: torch.Tensor
    attention: AttentionLayout


def pack(table: RowTable, offsets: Sequence[int], prompt_width: int, device: torch.device) -> PackedRow:
    """
    Lay out the rollouts of a batch, or of several batches end to end.

    Args:
        table ([`RowTable`]):
            Of all R rollouts; those of length 0 are left out.
        offsets (sequence of `int`):
            Where the completion of each rollout begins in the flattened completions `(B, T)` of its batch and those
            before it, R values.
        prompt_width (`int`):
            P, the padded width of the prompts of all batches.
        device (`torch.device`):
            Where the index tensors are made.
    """
    segments, rows = segments_of(table)
    prompt_lengths, lengths = table.prompt_lengths.tolist(), table.lengths.tolist()
    sources, positions, first_scored, targets = [], [], [], []
    for segment, row in zip(segments, rows, strict=True):
        shared = prompt_lengths[row] - 1
        position = 0 if segment.root is None else shared
        is_root = segment.root is None and segment.length != shared + lengths[row]
        # Its first token: a padded prompt stands before its completion and before each of the earlier ones.
        begin = offsets[row] + (row + 1) * prompt_width - prompt_lengths[row]
        sources.append(begin + position)
        positions.append(position)
        first_scored.append(segment.length if is_root else shared - position)
        targets.append(offsets[row])
    attention = AttentionLayout(segments, device)
    sizes = [segment.length for segment in segments]
    scored_sizes = [size - first for size, first in zip(sizes, first_scored, strict=True)]
    scored_starts = [start + first for start, first in zip(attention.starts, first_scored, strict=True)]
    return PackedRow(
        ragged_ranges(sources, sizes, device),
        ragged_ranges(positions, sizes, device),
        ragged_ranges(scored_starts, scored_sizes, device),
        ragged_ranges(targets, scored_sizes, device),
        attention,
    )


def ragged_ranges(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """`start, start + 1, …` for each of `lengths`, end to end, int64."""
    sizes = torch.tensor(lengths, dtype=torch.long, device=device)
    shifts = torch.tensor(starts, dtype=torch.long, device=device) - (sizes.cumsum(0) - sizes)
    total = sum(lengths)
    return torch.arange(total, device=device) + shifts.repeat_interleave(sizes, output_size=total)


def _cumulative(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
