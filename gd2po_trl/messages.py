"""The text in messages, and what the policy wrote of a completion."""

import json
from typing import Any


Messages = list[dict[str, Any]]


def text_of(message: dict[str, Any]) -> str:
    """A message's text; of a list of parts, the text parts. A message without content is empty."""
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        return "".join(text for text in texts if isinstance(text, str))
    if isinstance(content, str):
        return content
    return str(content) if isinstance(content, (int, float)) else ""


def written_texts(completion: Any) -> list[str]:
    """
    The texts that the policy wrote in a completion as TRL hands it to a reward function.

    Args:
        completion (`str` or `list[dict]`):
            A text, or messages. Those of other roles than the assistant's are left out: what a tool or an environment
            said is not the policy's. So are structured `tool_calls`, which are no text. Never raises: anything else
            counts as no text.

    Returns:
        `list[str]`: One per assistant message, or the text itself.
    """
    if isinstance(completion, str):
        return [completion]
    if not isinstance(completion, (list, tuple)):
        return []
    return [
        text_of(message)
        for message in completion
        if isinstance(message, dict) and message.get("role", "assistant") == "assistant"
    ]


def written_text(completion: Any) -> str:
    """All that the policy wrote in `completion` as one text: see [`written_texts`]; a line break between messages."""
    return "\n".join(filter(None, written_texts(completion)))


def completion_text(completion: Any) -> str:
    """
    The answer in a completion as TRL hands it to a reward function: the last of the texts that the policy wrote (see
    [`written_texts`]), without white space around it. Empty if there is none.
    """
    texts = written_texts(completion)
    return texts[-1].strip() if texts else ""


def continued(prefill: str, text: str) -> str:
    """An assistant's turn of which the prompt holds the start, such as `<think>`: that start, and `text` after it."""
    return f"{prefill.strip()}\n{text}" if prefill.strip() else text


def conversation_text(value: Any) -> str:
    """
    A prompt or completion to be read by people: text as it is, several messages as `role: content` lines.

    Args:
        value (`Any`):
            Text, or messages as TRL or a table holds them. Never raises; anything else is shown as JSON.
    """
    value = value.tolist() if hasattr(value, "tolist") else value  # as pandas reads lists from parquet
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, dict) for message in value):
        return json.dumps(value, ensure_ascii=False, default=str)
    lines = []
    for message in value:
        content = message.get("content")
        content = content.tolist() if hasattr(content, "tolist") else content
        if isinstance(content, (list, tuple)):
            parts = (part.get("text") or f"[{part.get('type')}]" for part in content if isinstance(part, dict))
            content = " ".join(map(str, parts))
        calls = message.get("tool_calls")
        if calls is not None and len(calls):
            content = f"{content or ''} {json.dumps(list(calls), ensure_ascii=False, default=str)}".strip()
        text = "" if content is None else str(content)
        lines.append(text if len(value) == 1 else f"{message.get('role')}: {text}")
    return "\n".join(lines)
