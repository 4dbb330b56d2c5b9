"""A recipe's own prompts, and prompts that are too long for the policy."""

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ._sources import DatasetReport, Source, checked_prompt, drop_rows, iterate_rows, load_rows, require_columns


if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PROMPTS = Source("prompts", remedy="set `dataset_path` to a file with a `prompt` column")
# GRPOTrainer hands these names to every reward function itself, so a column of the same name would be passed twice.
RESERVED_COLUMNS = ("prompts", "completions")


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
    for index, row in enumerate(iterate_rows(dataset, ["prompt"])):
        try:
            checked_prompt(row["prompt"], "prompt", parts=True)
        except UsageError as error:
            raise UsageError(f"prompts: row {index} of {origin}: {error}") from None
    report = DatasetReport(PROMPTS.name, origin, read=len(dataset))
    return drop_rows(dataset, report, drop_duplicates=drop_duplicates)


def count_prompt_tokens(
    prompts: list[str] | list[list[dict[str, Any]]],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """
    Number of tokens that each prompt has when TRL gives it to the policy: through the chat template, with the
    generation prompt and the template's variables `chat_template_kwargs`, where it is conversational.

    Raises:
        [`UsageError`]: Conversational prompts for a tokenizer without a chat template.
    """
    if not prompts:
        return []
    if isinstance(prompts[0], str):
        return [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            "the prompts are conversations, but the tokenizer has no chat template; use an instruct model or set one"
        )
    texts = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
    )
    # The template writes the special tokens itself.
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def _all_token_counts(
    dataset: "Dataset",
    tokenizer: "PreTrainedTokenizerBase",
    chat_template_kwargs: dict[str, Any] | None,
    batch_size: int = 256,
) -> list[int]:
    counts: list[int] = []
    for batch in dataset.select_columns(["prompt"]).iter(batch_size):
        counts += count_prompt_tokens(batch["prompt"], tokenizer, chat_template_kwargs)
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
    message, which loses its own beginning only when nothing else is left to drop. So the prompt stays a well-formed
    conversation, where cutting its tokens would cut into the template. A new column `full_prompt` keeps the prompt as
    it was, for rewards that judge the completion in its full context.

    Args:
        dataset (`Dataset`): Rows with a `prompt` column, plain or conversational.
        tokenizer (`PreTrainedTokenizerBase`): The policy's tokenizer.
        max_prompt_tokens (`int`): Largest number of tokens, chat template and generation prompt included.
        chat_template_kwargs (`dict[str, Any]`, *optional*): Variables of the chat template, as the trainer sets them.

    Returns:
        `tuple[Dataset, int]`: All rows, with `full_prompt`, and how many prompts were shortened.

    Raises:
        [`UsageError`]: `max_prompt_tokens` leaves no room beside the template or the system message.
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
        head, text, tail = None, prompt, []
    else:
        head = prompt[:1] if prompt[0]["role"] == "system" else []
        turns = prompt[len(head) :]
        # Chat templates want a user turn first.
        starts = [start for start, message in enumerate(turns) if message["role"] == "user"] or [0]
        for start in starts:
            if fits(head + turns[start:]):
                return head + turns[start:]
        # A system message alone has nothing to lose.
        text = turns[starts[-1]]["content"] or "" if turns else ""
        tail = turns[starts[-1] + 1 :]

    def cut(start: int) -> Any:
        return text[start:] if head is None else head + [{**turns[starts[-1]], "content": text[start:]}] + tail

    start = bisect_left(range(len(text)), True, key=lambda position: fits(cut(position)))
    if start >= len(text):
        raise UsageError(
            f"prompt {index} cannot be shortened to {max_tokens} tokens: its system message and the chat template"
            " alone fill them; raise max_prompt_tokens"
        )
    return cut(start)
