"""Extraction of think, tool call and response parts, calls and ground truths."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gd2po_trl.messages import completion_text
from gd2po_trl.tasks.tool_calling.text_format import (
    MAX_DIGITS,
    MAX_NESTING,
    answer_text,
    parse_calls,
    parse_gold,
    parse_json,
    reference_tool_call,
    split_completion,
    think_text,
    values_equal,
)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)
tags = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>"]
tagged_text = st.lists(st.sampled_from([*tags, "\n", "a", '{"name": "f", "parameters": {}}'])).map("".join)


@given(json_values)
def test_parse_json_reads_what_json_writes(value):
    assert parse_json(json.dumps(value)) == value


@given(st.text())
def test_parse_json_raises_nothing_but_value_error(text):
    try:
        parse_json(text)
    except ValueError:
        pass


@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a": ', "}")])
def test_nesting_limit(opening, closing):
    parse_json(opening * MAX_NESTING + "1" + closing * MAX_NESTING)
    for depth in (MAX_NESTING + 1, 10_000):
        with pytest.raises(ValueError, match="nested deeper"):
            parse_json(opening * depth + "1" + closing * depth)
        with pytest.raises(ValueError, match="nested deeper"):
            parse_json(opening * depth)


def test_nesting_counts_depth_and_not_brackets():
    flat = [[]] * 500
    quoted = {"a": "[{" * 500, "b": '\\"[' * 500, "c": "\\"}
    assert parse_json(json.dumps(flat)) == flat
    assert parse_json(json.dumps(quoted)) == quoted


def test_numbers():
    assert parse_json("9" * MAX_DIGITS) == 10**MAX_DIGITS - 1
    with pytest.raises(ValueError, match="digits"):
        parse_json("9" * (MAX_DIGITS + 1))
    assert parse_json("1e999") == math.inf
    assert parse_json("-Infinity") == -math.inf
    assert math.isnan(parse_json("NaN"))


def test_last_of_duplicate_keys_counts():
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}


def test_values_equal():
    assert values_equal(2, 2.0) and values_equal({"a": 1, "b": 2}, {"b": 2, "a": 1}) and values_equal(True, 1)
    assert not values_equal("2", 2) and not values_equal([1, 2], [2, 1]) and not values_equal(None, 0)


@pytest.mark.parametrize(
    "completion, text",
    [
        (" a \n", "a"),
        ([{"role": "assistant", "content": " a\n"}], "a"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], "b"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": [None, {"type": "image"}, {"text": 3}]}], ""),
        ([{"role": "user", "content": "a"}], ""),
        ([], ""),
        ([None], ""),
        (None, ""),
        (3, ""),
    ],
)
def test_completion_text(completion, text):
    assert completion_text(completion) == text


def test_split_completion():
    parts = split_completion("<think> why </think>\n<tool_call>\n{}\n</tool_call>\n<response> done </response>")
    assert (parts.think, parts.tool_call, parts.response) == ("why", "{}", "done")

    parts = split_completion("plain")
    assert (parts.think, parts.answer, parts.tool_call, parts.response) == (None, "plain", None, None)

    parts = split_completion("<response> a <tool_call>b</tool_call> c </response>")
    assert (parts.tool_call, parts.response) == ("b", None), "a response is looked for after the calls"


def test_the_answer_follows_the_last_closing_think_tag():
    assert answer_text("<think> a </think> b") == " b"
    assert answer_text("<think> then </think> comes <tool_call> </think> b") == " b"
    assert answer_text("b") == "b"
    assert answer_text("<think> b") == "<think> b"


def test_think_text():
    assert think_text("<think> a </think> <think> b c </think> d") == "b c"
    assert think_text("<think> a") is None
    assert think_text("a </think>") is None


def test_parse_calls():
    line = '{"name": "f", "parameters": {}}'
    call = {"name": "f", "parameters": {}}
    assert parse_calls(f"\n{line}\n{line}\r\n") == [call, call]
    assert parse_calls(f"[{line}]\n1") == [[call], 1]
    assert parse_calls(None) is None
    for block in ("", "\n", f"{line}\n\n{line}", f"{line} {line}", line[:-1], "f()", '{\n"name": "f"\n}', "\ufeff1"):
        assert parse_calls(block) is None, block


@given(tagged_text)
def test_splitting_never_raises(text):
    parts = split_completion(text)
    for block in (parts.tool_call, reference_tool_call(text)):
        parse_calls(block)
    if "</think>" not in text:
        assert parts.answer == text


def test_parse_gold():
    f, g = {"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {}}
    block = f"<tool_call>\n{json.dumps(f)}\n\n{json.dumps(g)}\n</tool_call>"
    for think in ("", "<think> use <tool_call> </think>\n"):
        gold = parse_gold(think + block)
        assert (gold.calls, gold.has_response) == ([f, g], False), "a blank line between calls is harmless"
        gold = parse_gold(f"{think}{block}\n<response> done </response>\n")
        assert (gold.calls, gold.has_response) == ([f, g], True)
        gold = parse_gold(f"{think}<response> the <tool_call> tag </response>")
        assert (gold.calls, gold.has_response) == ([], True), "a tag that a response mentions is no call"
        gold = parse_gold(f"{think}")
        assert (gold.calls, gold.has_response) == ([], False)


@pytest.mark.parametrize(
    "text, complaint",
    [
        (None, "NoneType"),
        ({"name": "f"}, "dict"),
        ("<tool_call>\n{}", "not closed"),
        ("<tool_call>\n\n</tool_call>", "no call"),
        ("<tool_call>\nf(1)\n</tool_call>", r"'f\(1\)'.*not JSON"),
        ("<tool_call>\n" + "[" * 10_000 + "\n</tool_call>", "nested deeper"),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "must be an object"),
        ('<tool_call>\n{"name": 1, "parameters": {}}\n</tool_call>', "must be an object"),
        ('<tool_call>\n{"name": "f", "parameters": "a"}\n</tool_call>', "must be an object"),
        ('<tool_call>\n[{"name": "f", "parameters": {}}]\n</tool_call>', "must be an object"),
        ("<response> a", "not closed"),
        ("<response> a </response> b", "not closed"),
        ('hello <tool_call>\n{"name": "f", "parameters": {}}\n</tool_call>', "unexpected text 'hello"),
        ('<tool_call>\n{"name": "f", "parameters": {}}\n</tool_call> bye', "unexpected text 'bye'"),
        ("<response> mentions </think> </response>", "unexpected text"),
    ],
)
def test_parse_gold_says_what_is_wrong(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_gold(text)


def test_parse_gold_reads_the_real_ground_truths(shared_dir):
    rows = json.loads((shared_dir / "data/rlla_4k/rlla_sft.json").read_text(encoding="utf-8"))
    golds = [parse_gold(row["output"]) for row in rows]
    assert len(golds) == 400
    assert sum(bool(gold.calls) for gold in golds) == 346
    assert sum(gold.has_response for gold in golds) == 54
