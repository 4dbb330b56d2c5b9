"""Planning and layout of packed rollouts: every token once, every label its own, every query its own rollout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gd2po_trl.update import attention as attention_module
from gd2po_trl.update.attention import PackingError, packed_attention, placeholder_mask
from gd2po_trl.update.layout import AttentionLayout, gathered_keys, pack, segments_of
from gd2po_trl.update.plan import cost, cost_tables, cut, fill_forwards, join_tables
from gd2po_trl.update.rows import describe_rows


CPU = torch.device("cpu")


@st.composite
def batches(draw, max_rows=7):
    """Padded ids of rollouts, of which some share a prompt and some are empty."""
    rows = draw(st.integers(1, max_rows))
    prompts = draw(st.lists(st.lists(st.integers(2, 5), min_size=1, max_size=4), min_size=1, max_size=3))
    chosen = [prompts[draw(st.integers(0, len(prompts) - 1))] for _ in range(rows)]
    lengths = draw(st.lists(st.integers(0, 4), min_size=rows, max_size=rows))
    prompt_width, width = max(map(len, chosen)) + draw(st.integers(0, 2)), max(max(lengths), 1)
    prompt_ids = torch.zeros(rows, prompt_width, dtype=torch.long)
    for row, prompt in enumerate(chosen):
        prompt_ids[row, prompt_width - len(prompt) :] = torch.tensor(prompt)
    completion_mask = (torch.arange(width) < torch.tensor(lengths).unsqueeze(1)).long()
    completion_ids = (torch.arange(rows * width).view(rows, width) + 10) * completion_mask
    return prompt_ids, completion_ids, describe_rows(prompt_ids, (prompt_ids != 0).long(), completion_mask)


def packed(batch):
    prompt_ids, completion_ids, table = batch
    rows, width = completion_ids.shape
    row = pack(table, range(0, rows * width, width), prompt_ids.size(1), CPU)
    return torch.cat([prompt_ids, completion_ids], dim=1).flatten(), row


@given(batches())
@settings(deadline=None, max_examples=200)
def test_every_completion_token_is_scored_once_in_its_context(batch):
    prompt_ids, completion_ids, _ = batch
    ids, row = packed(batch)
    # Labels by their target: all tokens of the completions that are run, and nothing else.
    labels = torch.zeros(completion_ids.numel(), dtype=torch.long)
    labels[row.target] = ids[row.source[row.scored] + 1]
    assert torch.equal(labels.view_as(completion_ids), completion_ids)
    assert row.target.unique().numel() == row.target.numel() == (completion_ids != 0).sum()

    # What each scored position sees, in the order of positions: its prompt and the completion up to itself.
    visible = torch.zeros(len(row.source), len(row.source), dtype=torch.bool)
    for rectangle in row.attention.rectangles:
        queries, keys = rectangle.queries, rectangle.keys
        mask = rectangle.mask
        if mask is None:
            mask = torch.ones(queries.size(1), keys.size(1), dtype=torch.bool).tril().expand(len(queries), 1, -1, -1)
        for n in range(len(queries)):
            for step in range(queries.size(1)):
                if row.attention.order[queries[n, step]] == _place(row.attention, rectangle, n, step):
                    visible[queries[n, step], keys[n][mask[n, 0, step]]] = True
    for position, target in zip(row.scored.tolist(), row.target.tolist(), strict=True):
        rollout, column = divmod(target, completion_ids.size(1))
        seen = visible[position].nonzero().flatten()
        seen = seen[row.position_ids[seen].argsort()]
        prompt = prompt_ids[rollout][prompt_ids[rollout] != 0].tolist()
        assert ids[row.source[seen]].tolist() == prompt + completion_ids[rollout, :column].tolist()
        assert row.position_ids[seen].tolist() == list(range(len(seen)))


def _place(layout, rectangle, n, step) -> int:
    offset = 0
    for other in layout.rectangles:
        if other is rectangle:
            return offset + n * rectangle.queries.size(1) + step
        offset += other.queries.numel()
    raise AssertionError


@given(batches())
@settings(deadline=None, max_examples=100)
def test_costs_count_distinct_tokens_and_never_exceed_a_padded_batch(batch):
    prompt_ids, completion_ids, table = batch
    budget = prompt_ids.size(0) * (prompt_ids.size(1) + completion_ids.size(1))
    share, tokens = cost(table, budget)
    assert share <= 1 and tokens == len(packed(batch)[1].source)
    used = table.lengths > 0
    prefixes = {(int(p), int(n) - 1) for p, n in zip(table.prompts[used], table.prompt_lengths[used], strict=True)}
    assert tokens == sum(length for _, length in prefixes) + int(table.lengths.sum())
    assert gathered_keys(segments_of(table)[0]) <= budget


@given(st.lists(batches(max_rows=3), min_size=1, max_size=5), st.integers(4, 40))
@settings(deadline=None, max_examples=100)
def test_a_plan_covers_every_micro_batch_within_the_budget(parts, budget):
    tables = [table for _, _, table in parts]
    shares = cost_tables(tables, budget)[0]
    for share in (lambda i, j: float(shares[i, j]), lambda i, j: cost(join_tables(tables[i : j + 1]), budget)[0]):
        ends = cut(len(tables), share)
        assert ends == sorted(set(ends)) and ends[-1] == len(tables) - 1
        starts = [0, *(end + 1 for end in ends[:-1])]
        for start, end in zip(starts, ends, strict=True):
            assert start == end or cost(join_tables(tables[start : end + 1]), budget)[0] <= 1
        # Filled from the front: no forward could have taken the next micro-batch.
        for start, end in zip(starts[:-1], ends[:-1], strict=True):
            assert cost(join_tables(tables[start : end + 2]), budget)[0] > 1


@given(batches(), st.integers(4, 40))
@settings(deadline=None, max_examples=100)
def test_rollouts_in_any_order_fill_forwards(batch, budget):
    table = batch[2]
    forwards = fill_forwards(table, budget)
    taken = torch.cat(forwards).tolist() if forwards else []
    assert sorted(taken) == (table.lengths > 0).nonzero().flatten().tolist()
    assert all(len(rows) == 1 or cost(table.select(rows), budget)[0] <= 1 for rows in forwards)


class Layer(torch.nn.Module):
    """What transformers hands to an attention function: two heads of keys for four of queries."""

    num_key_value_groups = 2
    is_causal = True


def by_definition(query, key, value, layout):
    """Attention of every segment by itself, from explicit scores."""
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    outputs = []
    for start, segment in zip(layout.starts, layout.segments, strict=True):
        own = list(range(start, start + segment.length))
        root = [] if segment.root is None else layout.starts[segment.root]
        before = [] if segment.root is None else list(range(root, root + layout.segments[segment.root].length))
        scores = query[0, :, own] @ key[0, :, before + own].transpose(1, 2) / query.size(-1) ** 0.5
        sees = torch.ones(len(own), len(before) + len(own), dtype=torch.bool).tril(len(before))
        outputs.append(scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value[0, :, before + own])
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0)


def ragged_reference(query, key, value, query_ends, key_ends, longest_query, longest_key, **kwargs):
    """What `varlen_attn` promises, one sequence after the other: queries are aligned to the end of their keys."""
    assert kwargs["window_size"] == (-1, 0) and kwargs["enable_gqa"]
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    outputs = []
    for n in range(len(query_ends) - 1):
        q = query[query_ends[n] : query_ends[n + 1]].transpose(0, 1)
        k, v = (x[key_ends[n] : key_ends[n + 1]].transpose(0, 1) for x in (key, value))
        assert q.size(1) <= longest_query and k.size(1) <= longest_key
        sees = torch.ones(q.size(1), k.size(1), dtype=torch.bool).tril(k.size(1) - q.size(1))
        scores = (q @ k.transpose(1, 2) * (kwargs["scale"] or q.size(-1) ** -0.5)).masked_fill(~sees, -torch.inf)
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, dim=1).transpose(0, 1)


@given(batches())
@settings(deadline=None, max_examples=50)
def test_both_ways_to_attend_equal_the_definition(batch):
    _, row = packed(batch)
    layout: AttentionLayout = row.attention
    if not layout.num_tokens:
        return
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, layout.num_tokens, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    expected = by_definition(query, key, value, layout)
    output, _ = packed_attention(Layer(), query, key, value, placeholder_mask(CPU), packed_layout=layout)
    assert torch.allclose(output, expected) and layout.calls == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_module, "varlen_attn", ragged_reference)
        assert torch.allclose(attention_module._ragged_attention(query, key, value, None, layout), expected)


def test_a_layout_that_is_lost_or_not_enough_is_an_error():
    _, row = packed(
        (torch.tensor([[2, 3]]), torch.tensor([[4]]), describe_rows(*[torch.ones(1, 2).long()] * 2, torch.ones(1, 1)))
    )
    heads = torch.randn(1, 4, row.attention.num_tokens, 8)
    layer, mask = Layer(), placeholder_mask(CPU)
    layer.num_key_value_groups = 1
    with pytest.raises(PackingError, match="keyword"):
        packed_attention(layer, heads, heads, heads, mask)
    with pytest.raises(PackingError, match="mask"):
        packed_attention(layer, heads, heads, heads, None, packed_layout=row.attention)
    for changes in ({"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}):
        with pytest.raises(PackingError, match=next(iter(changes))):
            packed_attention(layer, heads, heads, heads, mask, packed_layout=row.attention, **changes)
    plain, _ = packed_attention(layer, heads, heads, heads, None)
    assert plain.shape == (1, row.attention.num_tokens, 4, 8)
