"""Tool calling: ToolRL's rlla rows for RL, its SFT rows with reasoning, and API-Bank in ToolRL's format."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...datasets.sources import (
    DatasetReport,
    Source,
    checked_prompt,
    conversation_feature,
    convert_rows,
    finish,
    load_rows,
    require_columns,
)
from ...errors import UsageError
from .text_format import parse_gold


if TYPE_CHECKING:
    from datasets import Dataset

RLLA = Source("rlla_4k", default_path="RamAnanth1/toolrl-rlla4k", file_hints=("rlla_4k", "rlla_rl"))
RLLA_SFT = Source(
    "rlla_sft",
    file_hints=("rlla_sft",),
    remedy="set `dataset_path` to rlla_sft.json from ToolRL's repository (github.com/qiancheng0/ToolRL)",
)
RAW_COLUMNS = ("instruction", "input", "output")
API_BANK_FILE = "level-{level}-api_processed.json"
API_BANK_LEVELS = (1, 2, 3)


def load_rlla(path: str | None, split: str | None) -> "Dataset":
    """
    Loads ToolRL's rows for RL. Three layouts are understood: the published one (`prompt`, `reward_model`), the raw one
    (`instruction`, `input`, `output`), and rows that have `prompt` and `answer` already.

    Args:
        path (`str`, *optional*): Data file, folder or Hub id, `"RamAnanth1/toolrl-rlla4k"` if `None`.
        split (`str`, *optional*): `"train"` (3,920 rows; also if `None`) or `"test"` (80 rows).

    Returns:
        `Dataset`: `prompt` (system and user message; plain text stays plain), `answer` (the ground truth: think tags,
        then a tool call block and/or a response), and all other columns.

    Raises:
        [`UsageError`]: A column is missing, a prompt is empty, or a ground truth cannot be read.
    """
    dataset, origin = load_rows(RLLA, path, split)
    columns = set(dataset.column_names)
    prompt_feature = conversation_feature()
    inputs: tuple[str, ...]
    remove: tuple[str, ...]
    if columns.issuperset(RAW_COLUMNS) and "prompt" not in columns:
        inputs = remove = RAW_COLUMNS

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            return {"prompt": _conversation(row["instruction"], row["input"]), "answer": _checked_gold(row["output"])}
    else:
        gold_column = "answer" if "answer" in columns else "reward_model"
        inputs, remove = ("prompt", gold_column), ()
        remedy = (
            "the rows need `prompt` with `reward_model.ground_truth` or `answer`, or instruction, input and output"
        )
        require_columns(dataset, ["prompt", gold_column], RLLA.name, origin, remedy)
        if not isinstance(dataset[0]["prompt"], list):
            prompt_feature = dataset.features["prompt"]

        def convert(row: dict[str, Any]) -> dict[str, Any]:
            gold = row[gold_column]
            if gold_column == "reward_model":
                gold = gold.get("ground_truth") if isinstance(gold, dict) else None
            return {"prompt": _checked_prompt(row["prompt"]), "answer": _checked_gold(gold)}

    from datasets import Value

    features = {"prompt": prompt_feature, "answer": Value("string")}
    report = DatasetReport(RLLA.name, origin, read=len(dataset))
    return finish(convert_rows(dataset, convert, features, report, inputs, remove), report)


def load_rlla_sft(path: str | None, split: str | None) -> "Dataset":
    """
    Loads ToolRL's SFT rows, whose answers carry real reasoning, in the format of TRL's `SFTTrainer`.

    Args:
        path (`str`): `rlla_sft.json`, or a folder or Hub id that holds it.
        split (`str`, *optional*): Split, `"train"` if `None`.

    Returns:
        `Dataset`: `prompt` (system and user message) and `completion` (one assistant message).

    Raises:
        [`UsageError`]: A column is missing, a prompt is empty, or an output cannot be read.
    """
    dataset, origin = load_rows(RLLA_SFT, path, split)
    require_columns(dataset, RAW_COLUMNS, RLLA_SFT.name, origin, "use the rows of ToolRL's rlla_sft.json")

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        completion = [{"role": "assistant", "content": _checked_gold(row["output"])}]
        return {"prompt": _conversation(row["instruction"], row["input"]), "completion": completion}

    features = {"prompt": conversation_feature(), "completion": conversation_feature()}
    report = DatasetReport(RLLA_SFT.name, origin, read=len(dataset))
    return finish(convert_rows(dataset, convert, features, report, RAW_COLUMNS, dataset.column_names), report)


def load_api_bank(path: str | None, split: str | None = None, *, levels: Sequence[int] = API_BANK_LEVELS) -> "Dataset":
    """
    Loads API-Bank in ToolRL's format: each row asks for one tool call.

    The gold parameters differ from row to row, which a table of typed columns cannot hold, so `answer` is text in the
    format of the completions: one JSON object with `name` and `parameters` in a tool call block.

    Args:
        path (`str`): A folder with `level-1-api_processed.json`, ... or one of these files.
        split (`str`, *optional*): Ignored; API-Bank is an evaluation set without splits.
        levels (`Sequence[int]`, *optional*, defaults to `(1, 2, 3)`): Levels to load from a folder.

    Returns:
        `Dataset`: `prompt` (system and user message), `answer`, `level` (`int`), `index` (`int`, row within the level)
        and `other` (JSON text: where in API-Bank the row comes from). Duplicates stay: scores average all rows.

    Raises:
        [`UsageError`]: No such file, or a row without prompt or gold call.
    """
    if path is None:
        raise UsageError(
            "api_bank: no path given and no Hub id known; name the folder that holds level-1-api_processed.json and"
            " its siblings, from ToolRL's repository (github.com/qiancheng0/ToolRL)"
        )
    source = Path(path).expanduser()
    if source.is_dir():
        wrong = [level for level in levels if level not in API_BANK_LEVELS]
        if wrong or not levels:
            raise UsageError(f"api_bank: levels must be among {API_BANK_LEVELS}, got {list(levels)}")
        files = {level: source / API_BANK_FILE.format(level=level) for level in levels}
    else:
        match = re.search(r"level-([123])", source.name)
        if match is None:
            raise UsageError(f"api_bank: {path} is neither a folder nor a file named like level-1-api_processed.json")
        files = {int(match.group(1)): source}

    from datasets import Dataset, Features, Value

    rows = [row for level, file in files.items() for row in _read_api_bank_level(file, level)]
    columns = {"answer": "string", "level": "int64", "index": "int64", "other": "string"}
    features = Features(prompt=conversation_feature(), **{name: Value(kind) for name, kind in columns.items()})
    dataset = Dataset.from_list(rows, features=features)
    return finish(dataset, DatasetReport("api_bank", str(source), read=len(rows)))


def _read_api_bank_level(file: Path, level: int) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"api_bank: no such file: {file}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"api_bank: {file} is not a JSON file: {error}") from None
    if not isinstance(content, list):
        raise UsageError(f"api_bank: {file} must hold a JSON list of rows")
    rows = []
    for index, row in enumerate(content):
        try:
            rows.append({**_api_bank_row(row), "level": level, "index": index})
        except UsageError as error:
            raise UsageError(f"api_bank: row {index} of {file}: {error}") from None
    return rows


def _api_bank_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict) or not {"system", "user", "answer"} <= row.keys():
        raise UsageError("needs `system`, `user` and `answer`; use ToolRL's processed API-Bank files")
    # A list of one in levels 1 and 3, the object itself in level 2.
    calls = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    call = calls[0] if len(calls) == 1 and isinstance(calls[0], dict) else {}
    if not isinstance(call.get("name"), str) or not isinstance(call.get("parameters"), dict):
        raise UsageError(f"`answer` must be one call with `name` and `parameters`, got {str(row['answer'])[:80]!r}")
    gold = json.dumps({"name": call["name"], "parameters": call["parameters"]}, ensure_ascii=False)
    return {
        "prompt": _conversation(row["system"], row["user"]),
        "answer": f"<tool_call>\n{gold}\n</tool_call>",
        "other": json.dumps(row.get("other"), ensure_ascii=False),
    }


def _conversation(system: Any, user: Any) -> list[dict[str, str]]:
    return _checked_prompt([{"role": "system", "content": system}, {"role": "user", "content": user}])


def _checked_prompt(prompt: Any) -> Any:
    prompt = checked_prompt(prompt, "prompt")
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt or []]
    if not texts or not all(text and text.strip() for text in texts):
        raise UsageError("the prompt is empty or has an empty message; fix the row or leave it out")
    return prompt


def _checked_gold(text: Any) -> str:
    """Returns a ground truth unchanged if the rewards can read it."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError("the ground truth is missing or empty; fix the row or leave it out")
    try:
        parse_gold(text)
    except ValueError as error:
        raise UsageError(f"the ground truth cannot be read: {error}; fix the row or leave it out") from None
    return text
