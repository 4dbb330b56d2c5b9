"""
Helpfulness and safety: prompts of Alpaca, BeaverTails, PKU-SafeRLHF and HH-RLHF, preference pairs of the last two.

Every loader reads the Hub's schema, and processed files with a conversational `prompt` as the published runs use them.
"""

import difflib
import hashlib
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...datasets.sources import (
    DatasetReport,
    Source,
    checked_prompt,
    checked_text,
    conversation_feature,
    convert_rows,
    drop_rows,
    iterate_rows,
    load_rows,
    require_columns,
)
from ...errors import UsageError


if TYPE_CHECKING:
    from datasets import Dataset

ALPACA = Source("alpaca", default_path="tatsu-lab/alpaca", file_hints=("alpaca",))
BEAVERTAILS = Source(
    "beavertails",
    default_path="PKU-Alignment/BeaverTails",
    default_split="330k_train",
    file_hints=("beavertails",),
)
BEAVERTAILS_EVALUATION = Source(
    "beavertails_evaluation",
    default_path="PKU-Alignment/BeaverTails-Evaluation",
    default_split="test",
    file_hints=("beavertails_evaluation",),
)
PKU_SAFERLHF = Source("pku_saferlhf", default_path="PKU-Alignment/PKU-SafeRLHF", file_hints=("pku_saferlhf",))
HH_RLHF = Source("hh_rlhf", default_path="Anthropic/hh-rlhf", file_hints=("hh_rlhf",))

# The 14 harm categories of BeaverTails (https://huggingface.co/datasets/PKU-Alignment/BeaverTails).
HARM_CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
DIMENSIONS = ("helpful", "harmless")
TURN = re.compile(r"(?:\A|\r?\n\r?\n)(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}

Message = dict[str, str]


def load_alpaca(
    path: str | None,
    split: str | None,
    *,
    drop_test_prompts: bool = True,
    drop_duplicates: bool | str = True,
) -> "Dataset":
    """
    Loads Alpaca's instructions as prompts; a row's input follows its instruction after a blank line.

    The published runs train on 51,490 of Alpaca's 52,002 prompts and test on the other 512. The Hub holds all in one
    split; the test prompts are known by their hashes: `"train"` leaves them out, `"test"` of the Hub's copy is them.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"tatsu-lab/alpaca"` if `None`.
        split (`str`, *optional*): `"train"` (also if `None`) or `"test"`.
        drop_test_prompts (`bool`, *optional*, defaults to `True`): Whether to leave out the 512 test prompts; a split
            called `"test"` keeps them.
        drop_duplicates (`bool` or `"all"`, *optional*, defaults to `True`): Whether to keep only the first row of each
            prompt; `"all"` keeps none of a prompt that occurs more than once.

    Returns:
        `Dataset`: `prompt` (one user message) and all other columns.
    """
    if drop_test_prompts not in (True, False):
        raise UsageError(f"{ALPACA.name}: drop_test_prompts must be true or false, got {drop_test_prompts!r}")
    is_test = (split or "").split("[")[0] == "test"
    selects_test = is_test and path in (None, ALPACA.default_path)
    if selects_test and split != "test":
        raise UsageError(f"{ALPACA.name}: split {split!r} cannot be sliced on the Hub; give 'test' and `limit`")
    dataset, origin = load_rows(ALPACA, path, "train" if selects_test else split)
    if "prompt" in dataset.column_names:
        prompts, report = _to_prompts(dataset, ALPACA, origin)
    else:
        require_columns(
            dataset, ["instruction"], ALPACA.name, origin, "give rows with `instruction` and `input`, or `prompt`"
        )

        def prompt_of(row: dict[str, Any]) -> list[Message]:
            texts = [checked_text(row.get(column), column) for column in ("instruction", "input")]
            return _user_message("\n\n".join(text for text in texts if text and text.strip()))

        prompts, report = _to_prompts(dataset, ALPACA, origin, prompt_of, inputs=("instruction", "input"))
    if selects_test or (drop_test_prompts and not is_test):
        tested = _alpaca_test_hashes()
        is_tested = [
            prompt_hash(row["prompt"][-1]["content"]) in tested if row["prompt"] else None
            for row in iterate_rows(prompts, ("prompt",))
        ]
        keep = [index for index, value in enumerate(is_tested) if value in (None, selects_test)]
        reason = "of the training split" if selects_test else "of the published test split"
        report.dropped[reason] = len(prompts) - len(keep)
        prompts = prompts.select(keep) if len(keep) < len(prompts) else prompts
    return drop_rows(prompts, report, drop_duplicates=drop_duplicates)


def prompt_hash(text: str) -> str:
    """The first 10 hex digits of the SHA-256 of a prompt's words, each separated by one space."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:10]


def _alpaca_test_hashes() -> frozenset[str]:
    """[`prompt_hash`] of the 512 test prompts in `safe-alignment/dataset` of the authors' repository."""
    return frozenset(Path(__file__).with_name("alpaca_test.txt").read_text(encoding="ascii").split())


def load_beavertails(
    path: str | None,
    split: str | None,
    *,
    is_safe: bool | None = None,
    categories: Sequence[str] | None = None,
    drop_duplicates: bool | str = True,
) -> "Dataset":
    """
    Loads BeaverTails' prompts.

    A row is a prompt with one judged response, so a prompt occurs many times: the filters pick rows, and then one row
    per prompt is kept.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"PKU-Alignment/BeaverTails"` if `None`.
        split (`str`, *optional*): `"330k_train"` (also if `None`), `"330k_test"`, `"30k_train"` or `"30k_test"`.
        is_safe (`bool`, *optional*): `False` keeps prompts that drew a response judged unsafe, `True` those that drew
            a safe one; `None` keeps all.
        categories (`Sequence[str]`, *optional*): Keeps rows judged harmful in at least one of these of the 14
            categories ([`HARM_CATEGORIES`]).
        drop_duplicates (`bool` or `"all"`, *optional*, defaults to `True`): As for `alpaca`.

    Returns:
        `Dataset`: `prompt` (one user message) and all other columns.
    """
    return _load_beavertails(BEAVERTAILS, path, split, is_safe, categories, drop_duplicates)


def load_beavertails_evaluation(
    path: str | None, split: str | None, *, categories: Sequence[str] | None = None
) -> "Dataset":
    """
    Loads BeaverTails-Evaluation: 700 prompts, 50 in each of the 14 harm categories.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"PKU-Alignment/BeaverTails-Evaluation"` if `None`.
        split (`str`, *optional*): Split, `"test"` if `None` (the only one on the Hub).
        categories (`Sequence[str]`, *optional*): Keeps only the prompts of these categories ([`HARM_CATEGORIES`]).

    Returns:
        `Dataset`: `prompt` (one user message), `category`, `category_id`.
    """
    return _load_beavertails(BEAVERTAILS_EVALUATION, path, split, None, categories, drop_duplicates=False)


def _load_beavertails(
    source: Source,
    path: str | None,
    split: str | None,
    is_safe: bool | None,
    categories: Sequence[str] | None,
    drop_duplicates: bool | str,
) -> "Dataset":
    wanted = _checked_categories(source, categories)
    if is_safe not in (None, True, False):
        raise UsageError(f"{source.name}: is_safe must be true, false or null, got {is_safe!r}")
    dataset, origin = load_rows(source, path, split)
    needed = ["prompt"] + ["is_safe"] * (is_safe is not None) + ["category"] * (categories is not None)
    require_columns(dataset, needed, source.name, origin, "filter only files that have BeaverTails' own columns")

    def passes(row: dict[str, Any]) -> bool:
        if is_safe is not None and row["is_safe"] is not is_safe:
            return False
        if wanted is None:
            return True
        category = row["category"]
        return any(category.get(name) for name in wanted) if isinstance(category, dict) else category in wanted

    prompts, report = _to_prompts(dataset, source, origin)
    if len(needed) > 1:
        keep = [index for index, row in enumerate(iterate_rows(prompts, needed[1:])) if passes(row)]
        report.dropped["filtered out"] = len(prompts) - len(keep)
        prompts = prompts.select(keep)
    return drop_rows(prompts, report, drop_duplicates=drop_duplicates)


def load_pku_saferlhf(path: str | None, split: str | None, *, drop_duplicates: bool | str = True) -> "Dataset":
    """
    Loads PKU-SafeRLHF's prompts.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"PKU-Alignment/PKU-SafeRLHF"` if `None`.
        split (`str`, *optional*): `"train"` (also if `None`) or `"test"`.
        drop_duplicates (`bool` or `"all"`, *optional*, defaults to `True`): As for `alpaca`. The published `mean@1`
            is that of `"all"`: 6,982 of the test split's 8,211 rows.

    Returns:
        `Dataset`: `prompt` (one user message) and all other columns.
    """
    dataset, origin = load_rows(PKU_SAFERLHF, path, split)
    require_columns(dataset, ["prompt"], PKU_SAFERLHF.name, origin, "give PKU-SafeRLHF's rows")
    return drop_rows(*_to_prompts(dataset, PKU_SAFERLHF, origin), drop_duplicates=drop_duplicates)


def load_hh_rlhf(
    path: str | None, split: str | None, *, dimension: str | None = None, drop_duplicates: bool | str = True
) -> "Dataset":
    """
    Loads HH-RLHF's conversations up to the last user message that the chosen and the rejected transcript share.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"Anthropic/hh-rlhf"` if `None`.
        split (`str`, *optional*): `"train"` (also if `None`) or `"test"`.
        dimension (`str`, *optional*): `"helpful"` or `"harmless"`: only this part; `None` for all.
        drop_duplicates (`bool` or `"all"`, *optional*, defaults to `True`): As for `alpaca`.

    Returns:
        `Dataset`: `prompt` (user and assistant messages in turn, user last) and all other columns but the transcripts.
        Neighboring messages of one role are merged, as some chat templates refuse them.
    """
    dataset, origin = _load_hh_rows(path, split, dimension)
    if "prompt" in dataset.column_names:
        return drop_rows(*_to_prompts(dataset, HH_RLHF, origin), drop_duplicates=drop_duplicates)
    require_columns(dataset, ["chosen"], HH_RLHF.name, origin, "give HH-RLHF's `chosen` and `rejected`, or `prompt`")

    # The transcripts go, as TRL may tell by `chosen`, rather than by `prompt`, whether a row is conversational.
    transcripts = ("chosen", "rejected")

    def prompt_of(row: dict[str, Any]) -> list[Message]:
        chosen, rejected = (as_messages(checked_prompt(row.get(column), column)) for column in transcripts)
        return shared_prompt(chosen, rejected if row.get("rejected") else chosen)

    prompts = _to_prompts(dataset, HH_RLHF, origin, prompt_of, inputs=transcripts, remove=transcripts)
    return drop_rows(*prompts, drop_duplicates=drop_duplicates)


def load_hh_rlhf_pairs(path: str | None, split: str | None, *, dimension: str | None = None) -> "Dataset":
    """
    Loads HH-RLHF's preference pairs, for fitting a scorer.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"Anthropic/hh-rlhf"` if `None`. Rows have `chosen` and
            `rejected` transcripts, or `prompt`, `response_0`, `response_1` and `better_response_id`.
        split (`str`, *optional*): `"train"` (also if `None`) or `"test"`.
        dimension (`str`, *optional*): `"helpful"` or `"harmless"`: the part to read from a folder or the Hub.

    Returns:
        `Dataset`: `prompt` (text of the last user message), `chosen` and `rejected` (text of the responses), and
        `chosen_side` (0 or 1): the side on which to show the chosen response, from a hash of the two texts, as the
        sources put it on the same side in every row. Ties, repeated pairs and rows without two answers are left out.
    """
    dataset, origin = _load_hh_rows(path, split, dimension)
    if {"chosen", "rejected"} <= set(dataset.column_names):
        return _to_pairs(dataset, "hh_rlhf_pairs", origin, _pair_of_transcripts, inputs=("chosen", "rejected"))
    return _response_pairs(dataset, "hh_rlhf_pairs", origin, "better_response_id")


def load_pku_saferlhf_pairs(path: str | None, split: str | None, *, dimension: str = "helpful") -> "Dataset":
    """
    Loads PKU-SafeRLHF's preference pairs, for fitting a scorer.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"PKU-Alignment/PKU-SafeRLHF"` if `None`.
        split (`str`, *optional*): `"train"` (also if `None`) or `"test"`.
        dimension (`str`, *optional*, defaults to `"helpful"`): `"helpful"` prefers the better response
            (`better_response_id`), `"harmless"` the safer one (`safer_response_id`).

    Returns:
        `Dataset`: As for `hh_rlhf_pairs`.
    """
    label = {"helpful": "better_response_id", "harmless": "safer_response_id"}[_checked_dimension(dimension)]
    dataset, origin = load_rows(PKU_SAFERLHF, path, split)
    return _response_pairs(dataset, "pku_saferlhf_pairs", origin, label)


def as_messages(prompt: str | list[dict[str, Any]] | None) -> list[Message]:
    """
    Messages from messages, from an HH-RLHF transcript (`Human:` and `Assistant:` turns, each after a blank line) or
    from plain text, which is one user message.

    Text before a transcript's first turn counts as the user's. Empty messages are left out, and neighboring messages
    of one role are merged.
    """
    if isinstance(prompt, list):
        turns = [(message["role"], message["content"] or "") for message in prompt]
    else:
        before, *parts = TURN.split(prompt or "")
        turns = [("user", before.strip() if parts else before)]
        turns += [(ROLES[role], text.strip()) for role, text in zip(parts[::2], parts[1::2], strict=True)]
    messages: list[Message] = []
    for role, content in turns:
        if not content.strip():
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + content
        else:
            messages.append({"role": role, "content": content})
    return messages


def shared_prompt(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that two conversations share at the beginning, up to the last user message among them."""
    shared: list[Message] = []
    for first, second in zip(chosen, rejected, strict=False):
        if first != second:
            break
        shared.append(first)
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    return shared


def _user_message(text: str | None) -> list[Message]:
    return [{"role": "user", "content": text}] if text and text.strip() else []


def _prompt_of(row: dict[str, Any]) -> list[Message]:
    """The prompt of a row that has one; plain text is a user message, even where it quotes a transcript."""
    prompt = checked_prompt(row["prompt"], "prompt")
    if not isinstance(prompt, list):
        return _user_message(prompt)
    messages = as_messages(prompt)
    return shared_prompt(messages, messages)


def _to_prompts(
    dataset: "Dataset",
    source: Source,
    origin: str,
    prompt_of: Callable[[dict[str, Any]], list[Message]] = _prompt_of,
    inputs: Sequence[str] = ("prompt",),
    remove: Sequence[str] = (),
) -> tuple["Dataset", DatasetReport]:
    report = DatasetReport(source.name, origin, read=len(dataset))
    feature = {"prompt": conversation_feature()}
    return convert_rows(dataset, lambda row: {"prompt": prompt_of(row)}, feature, report, inputs, remove), report


def _to_pairs(
    dataset: "Dataset",
    name: str,
    origin: str,
    pair_of: Callable[[dict[str, Any]], tuple[str, str, str] | None],
    inputs: Sequence[str],
) -> "Dataset":
    """Pairs of all rows, where `pair_of` gives prompt, chosen and rejected response, or `None` for a row without."""
    from datasets import Value

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        prompt, chosen, rejected = pair_of(row) or ("", "", "")
        # Hashes of the single responses, not one of both in their order: swapping the label then swaps the side.
        chosen_side = int(zlib.crc32(chosen.encode()) > zlib.crc32(rejected.encode()))
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "chosen_side": chosen_side}

    texts = ("prompt", "chosen", "rejected")
    features = {**{column: Value("string") for column in texts}, "chosen_side": Value("int64")}
    report = DatasetReport(name, origin, read=len(dataset))
    pairs = convert_rows(dataset, convert, features, report, inputs, remove=dataset.column_names)
    rows = list(iterate_rows(pairs, texts))
    complete = [index for index, row in enumerate(rows) if all(row[column].strip() for column in texts)]
    keep = [index for index in complete if rows[index]["chosen"] != rows[index]["rejected"]]
    report.dropped["without two answers to one prompt"] = len(rows) - len(complete)
    report.dropped["ties"] = len(complete) - len(keep)
    return drop_rows(pairs.select(keep), report, key_columns=texts, drop_duplicates=True)


def _load_hh_rows(path: str | None, split: str | None, dimension: str | None) -> tuple["Dataset", str]:
    if dimension is None:
        return load_rows(HH_RLHF, path, split)
    other = DIMENSIONS[1 - DIMENSIONS.index(_checked_dimension(dimension))]
    file = Path(path or "").name.lower()
    if other in file and dimension not in file:
        raise UsageError(
            f"hh_rlhf: the name of {path} says {other!r}, but dimension is {dimension!r}; correct one of them"
        )
    return load_rows(HH_RLHF, path, split, dimension=dimension, hub_dir=f"{dimension}-base")


def _pair_of_transcripts(row: dict[str, Any]) -> tuple[str, str, str] | None:
    chosen, rejected = (as_messages(checked_prompt(row[column], column)) for column in ("chosen", "rejected"))
    prompt = shared_prompt(chosen, rejected)
    answers = [conversation[len(prompt) :] for conversation in (chosen, rejected)]
    if not prompt or any([message["role"] for message in answer] != ["assistant"] for answer in answers):
        return None
    return prompt[-1]["content"], answers[0][0]["content"], answers[1][0]["content"]


def _response_pairs(dataset: "Dataset", name: str, origin: str, label: str) -> "Dataset":
    columns = ("prompt", "response_0", "response_1", label)
    require_columns(dataset, columns, name, origin, "give rows with two responses and a label")

    def pair_of(row: dict[str, Any]) -> tuple[str, str, str] | None:
        if row[label] not in (0, 1):
            raise UsageError(f"`{label}` must be 0 or 1, got {row[label]!r}; fix the row or leave it out")
        better = int(row[label])
        prompt = _prompt_of(row)
        if not prompt:
            return None
        responses = (f"response_{side}" for side in (better, 1 - better))
        chosen, rejected = (checked_text(row[column], column) or "" for column in responses)
        return prompt[-1]["content"], chosen, rejected

    return _to_pairs(dataset, name, origin, pair_of, columns)


def _checked_dimension(dimension: str) -> str:
    if dimension not in DIMENSIONS:
        raise UsageError(f"dimension must be one of {DIMENSIONS}, got {dimension!r}")
    return dimension


def _checked_categories(source: Source, categories: Sequence[str] | None) -> set[str] | None:
    if categories is None:
        return None
    wanted = {categories} if isinstance(categories, str) else set(categories)
    for category in wanted - set(HARM_CATEGORIES):
        close = difflib.get_close_matches(str(category), HARM_CATEGORIES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(HARM_CATEGORIES)}"
        raise UsageError(f"{source.name}: unknown category {category!r}; {hint}")
    return wanted
