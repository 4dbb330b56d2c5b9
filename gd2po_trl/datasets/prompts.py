"""A recipe's own prompts, and prompts that are too long for the policy."""

import logging
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import lru_cache
from inspect import signature
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, one_line
from ..messages import text_of
from .sources import DatasetReport, Source, checked_prompt, drop_rows, iterate_rows, load_rows, require_columns


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPTS = Source("prompts", remedy="set `dataset_path` to a file with a `prompt` column")
# GRPOTrainer hands these names to every reward function itself, so a column of the same name would be passed twice.
RESERVED_COLUMNS = ("prompts", "completions")
_OPENED_THOUGHTS = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


def load_prompts(path: str | None, split: str | None, *, drop_duplicates: bool = False) -> "Dataset":
    """
    Loads any file that has a `prompt` column, and keeps all other columns for the reward functions.

    Args:
        path (`str`): Parquet, JSON, JSONL or CSV file, a folder with such files, or a Hub id.
        split (`str`, *optional*): Split, `"train"` if `None`.
        drop_duplicates (`bool`, *optional*, defaults to `False`): Whether to keep only the first row of each prompt.

    Returns:
        `Dataset`: `prompt`, plain or conversational as in the file, and the other columns. Rows with an empty prompt
        are left out.

    Raises:
        [`UsageError`]: No `prompt` column, a prompt that is neither text nor messages, or a column name that TRL uses.
    """
    dataset, origin = load_rows(PROMPTS, path, split)
    require_columns(dataset, ["prompt"], PROMPTS.name, origin, "rename the column that holds the prompts")
    clash = [column for column in RESERVED_COLUMNS if column in dataset.column_names]
    if clash:
        raise UsageError(
            f"prompts: {origin} has a column {clash[0]!r}, a name TRL passes to rewards itself; rename it"
        )
    kinds: dict[bool, int] = {}
    for index, row in enumerate(iterate_rows(dataset, ["prompt"])):
        try:
            checked_prompt(row["prompt"], "prompt", parts=True)
        except UsageError as error:
            raise UsageError(f"prompts: row {index} of {origin}: {error}") from None
        if row["prompt"] is not None:
            kinds.setdefault(isinstance(row["prompt"], str), index)
    if len(kinds) > 1:
        raise UsageError(
            f"prompts: row {kinds[True]} of {origin} is text and row {kinds[False]} a list of messages; make all "
            "prompts the one or the other"
        )
    report = DatasetReport(PROMPTS.name, origin, read=len(dataset))
    return drop_rows(dataset, report, drop_duplicates=drop_duplicates)


def render_conversations(
    conversations: Sequence[Any],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> list[str]:
    """
    Conversations as the text that the tokenizer's chat template makes of them. `rows` are their rows in the data, for
    messages; `options` go to `apply_chat_template`.

    Raises:
        [`UsageError`]: The template refuses a conversation; the message says which one, and what the template said.
    """
    for name in options.keys() - signature(tokenizer.apply_chat_template).parameters.keys():
        if name not in str(options.get("chat_template") or tokenizer.chat_template):
            _warn_of_variable(name)
    try:
        return tokenizer.apply_chat_template(list(conversations), tokenize=False, **options)
    except Exception as error:  # jinja2 has a hierarchy of its own, and templates raise what they like
        refusal = error
    for row, conversation in zip(rows or range(len(conversations)), conversations, strict=False):
        try:
            tokenizer.apply_chat_template(conversation, tokenize=False, **options)
        except Exception as error:
            reason = one_line(error).rstrip(".") or type(error).__name__
            raise UsageError(
                f"the chat template refuses row {row} of the data (roles: "
                f"{', '.join(str(message.get('role')) for message in conversation)}): {reason}. "
                f"{_remedy(conversation)}, leave the row out, or take a model whose template allows it"
            ) from error
    raise UsageError(f"the chat template cannot be applied: {refusal}") from refusal


@lru_cache
def _warn_of_variable(name: str) -> None:
    logger.warning(f"The chat template has no variable `{name}`, which `chat_template_kwargs` sets: it is ignored.")


def _remedy(conversation: list[dict[str, Any]]) -> str:
    if any(isinstance(message.get("content"), list) for message in conversation):
        return "Write `content` as one text instead of a list of parts"
    if conversation and conversation[0].get("role") == "system":
        return "Put the text of the system message in front of the first user message"
    return "Change the messages"


def opened_thoughts(
    prompts: Sequence[str | list[dict[str, Any]]], tokenizer: "PreTrainedTokenizerBase", **options: Any
) -> list[str]:
    """
    The start of the thoughts that each prompt holds already, because its end opens them.

    The chat templates of DeepSeek-R1's distilled models and of Qwen3.5 end a prompt with `<think>`, so that no
    completion can hold that tag; Qwen3's, told not to think, ends it with `<think>`, `</think>`.

    Returns:
        `list[str]`: Per prompt `"<think>"`, `"<think></think>"`, or an empty text.
    """
    template = options.get("chat_template") or getattr(tokenizer, "chat_template", None)
    opened: dict[str, str] = {}
    for prompt in prompts:
        if (key := repr(prompt)) in opened:
            continue
        if isinstance(prompt, str):
            # Text that ends with both tags rather asks for thoughts than gives them.
            opened[key] = "<think>" if prompt.rstrip().endswith("<think>") else ""
        elif template is not None and "<think>" in str(template):
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False, **options)
            opened[key] = thoughts_at_the_end(text)
        else:
            opened[key] = ""
    return [opened[repr(prompt)] for prompt in prompts]


def thoughts_at_the_end(rendered: str) -> str:
    """What the end of a prompt, after its chat template, holds of the thoughts; see [`opened_thoughts`]."""
    match = _OPENED_THOUGHTS.search(rendered)
    return "" if match is None else "".join(match.group().split())


def check_prompts_render(
    dataset: "Dataset", tokenizer: "PreTrainedTokenizerBase", chat_template_kwargs: dict[str, Any] | None = None
) -> None:
    """
    Finds out whether the chat template takes the prompts, from the first row of each sequence of roles and contents.

    Raises:
        [`UsageError`]: As [`render_conversations`].
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return
    first_rows: dict[tuple, tuple[int, list[dict[str, Any]]]] = {}
    for index, row in enumerate(iterate_rows(dataset, ["prompt"])):
        prompt = row["prompt"]
        if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
            contents = [(message.get("role"), message.get("content")) for message in prompt]
            shape = tuple((role, type(content), bool(content)) for role, content in contents)
            first_rows.setdefault(shape, (index, prompt))
    if first_rows:
        rows, prompts = zip(*first_rows.values(), strict=True)
        render_conversations(prompts, tokenizer, rows=rows, add_generation_prompt=True, **(chat_template_kwargs or {}))


def count_prompt_tokens(
    prompts: list[str] | list[list[dict[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
    first_row: int = 0,
) -> list[int]:
    """
    Number of tokens that each prompt has when TRL gives it to the policy: through the chat template, with the
    generation prompt, where it is conversational. `first_row` is the row of the first one, for messages.

    Raises:
        [`UsageError`]: Conversational prompts for a tokenizer without a chat template, or one that refuses them.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "the prompts are conversations, but the tokenizer has no chat template; use an instruct model or set one"
        )
    rows = range(first_row, first_row + len(prompts))
    texts = render_conversations(
        prompts, tokenizer, rows=rows, add_generation_prompt=True, **(chat_template_kwargs or {})
    )
    # The template writes the special tokens itself.
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _all_token_counts(dataset: "Dataset", tokenizer: Any, chat_template_kwargs: dict[str, Any] | None) -> list[int]:
    counts: list[int] = []
    for batch in dataset.select_columns(["prompt"]).iter(256):
        counts += count_prompt_tokens(batch["prompt"], tokenizer, chat_template_kwargs, first_row=len(counts))
    return counts


def drop_long_prompts(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple["Dataset", int]:
    """
    Leaves out rows whose prompt has more than `max_prompt_tokens` tokens (TRL itself no longer limits prompts).

    Args:
        dataset (`Dataset`): Rows with a `prompt` column, plain or conversational.
        tokenizer (`PreTrainedTokenizerBase`): The policy's tokenizer.
        max_prompt_tokens (`int`): Largest number of tokens, chat template and generation prompt included.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Variables of the chat template, as the trainer sets them.

    Returns:
        `tuple[Dataset, int]`: The rows that fit, and how many were left out.

    Raises:
        [`UsageError`]: No prompt fits.
    """
    counts = _all_token_counts(dataset, tokenizer, chat_template_kwargs)
    keep = [index for index, count in enumerate(counts) if count <= max_prompt_tokens]
    if not keep:
        raise UsageError(
            f"none of the {len(counts)} prompts has at most {max_prompt_tokens} tokens (the shortest has"
            f" {min(counts, default=0)}); raise max_prompt_tokens"
        )
    dropped = len(dataset) - len(keep)
    return (dataset.select(keep) if dropped else dataset), dropped


def truncate_prompts_left(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    max_prompt_tokens: int,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple["Dataset", int]:
    """
    Shortens prompts from the left until they have at most `max_prompt_tokens` tokens.

    Of a conversation, whole turns go first, from the oldest on; the system message stays, and so does the last user
    message, which loses the beginning of its text only when nothing else is left to drop. A new column `full_prompt`
    keeps the prompt as it was, for rewards that judge the completion in its full context.

    Args:
        dataset, tokenizer, max_prompt_tokens, chat_template_kwargs: As of [`drop_long_prompts`].

    Returns:
        `tuple[Dataset, int]`: All rows, with `full_prompt`, and how many prompts were shortened.

    Raises:
        [`UsageError`]: `max_prompt_tokens` leaves no room beside what has to stay.
    """
    counts = _all_token_counts(dataset, tokenizer, chat_template_kwargs)
    too_long = {index for index, count in enumerate(counts) if count > max_prompt_tokens}

    def fits(prompt: Any) -> bool:
        return count_prompt_tokens([prompt], tokenizer, chat_template_kwargs)[0] <= max_prompt_tokens

    def shorten(row: dict[str, Any], index: int) -> dict[str, Any]:
        prompt = row["prompt"]
        return {
            "full_prompt": prompt,
            "prompt": _truncate_left(prompt, fits, max_prompt_tokens, index) if index in too_long else prompt,
        }

    from datasets import Features

    features = Features({**dataset.features, "full_prompt": dataset.features["prompt"]})
    shortened = dataset.map(
        shorten, with_indices=True, features=features, load_from_cache_file=False, desc="Shortening prompts"
    )
    return shortened, len(too_long)


def _truncate_left(prompt: Any, fits: Callable[[Any], bool], max_tokens: int, index: int) -> Any:
    if isinstance(prompt, str):
        length, fixed = len(prompt), ["the tokens that the tokenizer adds"]

        def cut(start: int) -> Any:
            return prompt[start:]
    else:
        head = prompt[:1] if prompt[0]["role"] == "system" else []
        turns = prompt[len(head) :]
        # Chat templates want a user turn first.
        starts = [start for start, message in enumerate(turns) if message["role"] == "user"] or [0]
        for start in starts:
            if fits(head + turns[start:]):
                return head + turns[start:]
        # A system message alone has nothing to lose.
        last = turns[starts[-1]] if turns else {}
        tail = turns[starts[-1] + 1 :]
        length = len(text_of(last))
        fixed = ["its system message"] * bool(head)
        fixed += ["the messages after the last user message"] * bool(tail)
        fixed += ["its parts that are no text"] * any(not _is_text(part) for part in _parts(last))
        fixed += ["the chat template"]

        def cut(start: int) -> Any:
            return [*head, {**last, "content": _without_start(last["content"], start)}, *tail]

    start = bisect_left(range(length), True, key=lambda position: fits(cut(position)))
    if start >= length:
        raise UsageError(
            f"prompt {index} cannot be shortened to {max_tokens} tokens: {' and '.join(fixed)} alone"
            f" fill{'s' * (len(fixed) == 1)} them; raise max_prompt_tokens"
        )
    return cut(start)


def _parts(message: dict[str, Any]) -> list[Any]:
    content = message.get("content")
    return content if isinstance(content, list) else []


def _is_text(part: Any) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str))


def _without_start(content: str | list[Any], count: int) -> str | list[Any]:
    """Content of a message without the first `count` characters of its text; parts that are no text stay."""
    if isinstance(content, str):
        return content[count:]
    kept = []
    for part in content:
        if _is_text(part) and count > 0:
            text = part if isinstance(part, str) else part["text"]
            rest, count = text[count:], count - min(count, len(text))
            if not rest:
                continue
            part = rest if isinstance(part, str) else {**part, "text": rest}
        kept.append(part)
    return kept
