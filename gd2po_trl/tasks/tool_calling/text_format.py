"""
Reading tool calls out of text: the rewards and the API-Bank evaluation share it.

The text is model output and may be hostile, so nothing here raises on it (except [`parse_gold`], which reads the
ground truth), nothing evaluates it, and every function takes time linear in its length.

The format is ToolRL's (https://huggingface.co/papers/2504.13958): `<think>…</think>`, then `<tool_call>` with one JSON
object `{"name": …, "parameters": {…}}` per line `</tool_call>`, then or instead `<response>…</response>`.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any


# JSON nested deeper than this counts as no JSON. A fixed limit, far below Python's own, keeps a score from depending
# on how deep in the call stack it is computed.
MAX_NESTING = 100

# Python's default limit; set here because an interpreter may run without one, and then int() takes quadratic time.
MAX_DIGITS = 4300

_STRUCTURAL = re.compile(r'[\[\]{}"\\]')


def _parse_int(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of more than {MAX_DIGITS} digits")
    return int(digits)


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _too_deep(text: str) -> bool:
    """Whether the arrays and objects of a JSON text nest deeper than `MAX_NESTING`."""
    if text.count("[") + text.count("{") <= MAX_NESTING:
        return False
    depth, in_string, escaped = 0, False, -1
    for match in _STRUCTURAL.finditer(text):
        char, position = match.group(), match.start()
        if position == escaped:
            continue
        if in_string:
            if char == '"':
                in_string = False
            elif char == "\\":
                escaped = position + 1
        elif char == '"':
            in_string = True
        elif char in "[{":
            depth += 1
            if depth > MAX_NESTING:
                return True
        elif char in "]}":
            depth -= 1
    return False


def parse_json(text: str) -> Any:
    """
    The value of a JSON text, read as `json.loads` does. Raises `ValueError` whatever is wrong with it, also nesting
    deeper than `MAX_NESTING` and integers of more than `MAX_DIGITS` digits.
    """
    if _too_deep(text):
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    try:
        return _DECODER.decode(text)
    except (RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"too large to parse: {error}") from None


def values_equal(first: Any, second: Any) -> bool:
    """Whether two JSON values are equal as Python values, as published: `2.0` equals `2`, `true` equals `1`."""
    try:
        return bool(first == second)
    except RecursionError:
        return False


def think_text(text: str) -> str | None:
    """
    What follows the last `<think>`, up to the next `</think>`; `None` unless both tags occur in the text (ToolRL's
    definition of the thoughts whose words count).
    """
    if "<think>" not in text or "</think>" not in text:
        return None
    return text.rpartition("<think>")[2].partition("</think>")[0].strip()


def answer_text(text: str) -> str:
    """
    The part of a text that can be the answer: what follows the last `</think>` (a model may mention the tag while it
    thinks, or think several times), or the whole text if there is none.
    """
    return text.rpartition("</think>")[2]


def _between(text: str, start: str, end: str) -> tuple[str, str] | None:
    """What lies between the first `start` and the first `end` after it, and what follows; `None` if one is absent."""
    _, found, rest = text.partition(start)
    inside, closed, after = rest.partition(end)
    return (inside, after) if found and closed else None


@dataclass(frozen=True)
class CompletionParts:
    """The parts of a completion; `None` for those that it does not have."""

    think: str | None  # see `think_text`
    answer: str  # see `answer_text`
    tool_call: str | None  # text of the first `<tool_call>…</tool_call>` in the answer
    response: str | None  # text of the first `<response>…</response>` in the answer, after the tool calls


def split_completion(text: str) -> CompletionParts:
    """The parts of a completion; never raises."""
    answer = answer_text(text)
    calls = _between(answer, "<tool_call>", "</tool_call>")
    response = _between(calls[1] if calls else answer, "<response>", "</response>")
    return CompletionParts(
        think=think_text(text),
        answer=answer,
        tool_call=calls[0].strip() if calls else None,
        response=response[0].strip() if response else None,
    )


def reference_tool_call(text: str) -> str | None:
    """
    The text that the published rewards read calls from, thoughts or not: between the first `<tool_call>` of the whole
    text and the next tag of either kind; `None` unless both tags occur somewhere. Their scores for a completion that
    mentions a tag while it thinks are wrong for this reason.
    """
    if "<tool_call>" not in text or "</tool_call>" not in text:
        return None
    inside = text.partition("<tool_call>")[2].partition("<tool_call>")[0]
    return inside.partition("</tool_call>")[0].strip()


def parse_calls(block: str | None) -> list[Any] | None:
    """
    The JSON values in the text of a `<tool_call>` block, one per line and not further checked (a value may be no
    object, a call may lack its name); `None` if there is no block, or a line, also a blank one, is not JSON.
    """
    if block is None:
        return None
    try:
        return [parse_json(line) for line in block.strip().split("\n")]
    except ValueError:
        return None


@dataclass(frozen=True)
class Gold:
    """A parsed ground truth: its calls, each with the text `name` and the dict `parameters`; whether it responds."""

    calls: list[dict[str, Any]] = field(default_factory=list)
    has_response: bool = False


def parse_gold(text: Any) -> Gold:
    """
    Parse the ground truth of one row: thoughts (optional), then `<tool_call>…</tool_call>`, `<response>…</response>`,
    both in this order, or text without tags. Blank lines between calls are allowed.

    Raises:
        `ValueError`: if the text has another structure, or a line in the call block is not a call.
    """
    if not isinstance(text, str):
        raise ValueError(f"the ground truth must be a text, got {type(text).__name__}")
    rest = answer_text(text).strip()
    calls: list[dict[str, Any]] = []
    if rest.startswith("<tool_call>"):
        block, closed, rest = rest[len("<tool_call>") :].partition("</tool_call>")
        if not closed:
            raise ValueError("`<tool_call>` is not closed by `</tool_call>`")
        calls = [_gold_call(line) for line in block.split("\n") if line.strip()]
        if not calls:
            raise ValueError("there is no call between `<tool_call>` and `</tool_call>`")
        rest = rest.strip()
    if rest.startswith("<response>"):
        if not rest.endswith("</response>"):
            raise ValueError("`<response>` is not closed by `</response>` at the end of the text")
        return Gold(calls, has_response=True)
    if rest and (calls or re.search("</?(?:think|tool_call|response)>", rest)):
        raise ValueError(
            f"unexpected text {rest[:60]!r}: after the thoughts there must be `<tool_call>…</tool_call>`, "
            "`<response>…</response>`, or both in this order"
        )
    if rest and not calls and _holds_call(rest):
        raise ValueError(f"the call {rest[:60]!r} must stand between `<tool_call>` and `</tool_call>`, one per line")
    return Gold(calls)


def _holds_call(text: str) -> bool:
    """Whether a text without our tags is a call in another format: JSON alone, between other tags or in a fence."""
    if re.search(r'"name"\s*:', text) and re.search(r'"(arguments|parameters)"\s*:', text):
        return True
    try:
        return text[0] in "[{" and isinstance(parse_json(text), (dict, list))
    except ValueError:
        return False


def _gold_call(line: str) -> dict[str, Any]:
    try:
        call = parse_json(line.strip())
    except ValueError as error:
        raise ValueError(f"the line {line.strip()[:60]!r} in `<tool_call>` is not JSON: {error}") from None
    fields = call if isinstance(call, dict) else {}
    if not isinstance(fields.get("name"), str) or not isinstance(fields.get("parameters"), dict):
        renamed = "parameters" not in fields and "arguments" in fields
        raise ValueError(
            f'the line {line.strip()[:60]!r} in `<tool_call>` must be an object {{"name": text, "parameters": object}}'
            + ("; rename `arguments` to `parameters`" if renamed else "")
        )
    return call
