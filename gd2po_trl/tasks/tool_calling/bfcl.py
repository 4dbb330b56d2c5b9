"""
BFCL v4, single turn: completions for the Berkeley Function-Calling Leaderboard, as files for its own checker.

The package `bfcl-eval` (Apache-2.0) carries the questions, the possible answers and the checker. It pins what it
needs, so it lives in an environment of its own and scores the files there. Here a policy that was trained on ToolRL's
rows answers the questions in the prompt of these rows.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...evaluation.predictions import EvalRow, make_folder, prefill_of, write_atomically
from ...messages import continued
from ...reporting import print_table
from .text_format import parse_calls, split_completion


CATEGORIES = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple", "irrelevance"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance"),
)
# The checker reads a model's results by its entry for this model. This one's are JSON lists of calls with `name` and
# `arguments`, read by `json.loads`, and names keep their dots.
RESULTS_AS = "Salesforce/xLAM-2-1b-fc-r"
_LANGUAGES = {"simple_java": "Java 8", "simple_javascript": "JavaScript"}
_TOOLS = re.compile(r"(.*?)^1\. Name: .*?(\n\n\*\*Steps for Each Turn\*\*.*)", re.DOTALL | re.MULTILINE)
_TURNS = {"assistant": "response"}


@dataclass(frozen=True)
class BfclRow(EvalRow):
    """One question; `category` is one of `CATEGORIES`."""

    category: str


def load_rows(
    folder: str, categories: Sequence[str] = CATEGORIES, limit: int | None = None, prompts: str | None = None
) -> list[BfclRow]:
    """
    Loads questions into prompts as ToolRL's rows have them.

    Args:
        folder (`str`): Folder with `BFCL_v4_simple_python.json`, ...: `bfcl_eval/data` where bfcl-eval is installed.
        categories (`Sequence[str]`, defaults to all of `CATEGORIES`): Categories to load.
        limit (`int`, *optional*): First questions of each category. All by default.
        prompts (`str`, *optional*): Rows of rlla_4k, from whose first system prompt all is taken but the tools: file,
            folder or Hub id. Those of the Hub by default.

    Raises:
        [`UsageError`]: if a category is unknown, a file is missing or not BFCL's, or the system prompt has no tools.
    """
    if unknown := [category for category in categories if category not in CATEGORIES]:
        raise UsageError(f"no category {unknown[0]!r}; there are {', '.join(CATEGORIES)}.")
    if limit is not None and limit < 1:
        raise UsageError(f"limit is {limit}; it must be at least 1.")
    questions = {category: _read(Path(folder), category)[:limit] for category in categories}
    before, after = _around_the_tools(prompts)
    rows = []
    for category, entries in questions.items():
        for entry in entries:
            tools = "\n".join(_tool(*numbered, category) for numbered in enumerate(entry["function"], 1))
            turns = [(_TURNS.get(turn["role"], turn["role"]), turn["content"]) for turn in entry["question"][0]]
            history = "\n".join(f"<{tag}> {text} </{tag}>" for tag, text in turns)
            prompt = [
                {"role": "system", "content": before + tools + after},
                {"role": "user", "content": f"**Dialogue Records History**\n{history}"},
            ]
            rows.append(BfclRow(id=entry["id"], prompt=prompt, category=category))
    return rows


def _read(folder: Path, category: str) -> list[dict[str, Any]]:
    file = folder / f"BFCL_v4_{category}.json"
    try:
        entries = [json.loads(line) for line in file.read_bytes().split(b"\n") if line.strip()]
        whole = all({"id", "question", "function"} <= entry.keys() for entry in entries)
    except OSError as error:
        raise UsageError(f"Cannot read {file}: {error.strerror}; it lies in bfcl_eval/data of bfcl-eval.") from None
    except (ValueError, AttributeError):
        whole = False
    if not whole:
        raise UsageError(f"{file} does not hold lines of JSON with `id`, `question` and `function`.")
    return entries


def _around_the_tools(path: str | None) -> tuple[str, str]:
    from .data import load_rlla

    prompt = load_rlla(path, None)[0]["prompt"]
    match = _TOOLS.fullmatch(prompt[0]["content"] if isinstance(prompt, list) else "")
    if match is None:
        raise UsageError("The first row's system prompt is not that of rlla_4k: its list of tools was not found.")
    return match[1], match[2]


def _tool(number: int, function: dict[str, Any], category: str) -> str:
    """A tool as in rlla_4k. Java's and JavaScript's arguments are asked for as text, for so the checker reads them."""
    parameters, language = function["parameters"], _LANGUAGES.get(category, "Python 3")
    properties = deepcopy(parameters["properties"])
    for name, schema in properties.items():
        if category in _LANGUAGES:
            kind = f"{schema.pop('type')} {json.dumps(schema.pop('items', {}))}".removesuffix(" {}")
            details = schema.pop("properties", None)
            entries = f" Its entries: {json.dumps(details)}" if details else ""
            note = f" A value of {language} type {kind}, written as a string.{entries}"
            schema |= {"type": "string", "description": schema.get("description", "") + note}
        if name not in parameters.get("required", []):
            schema["optional"] = True
    description = f"{function['description']} The function is written in {language}."
    text = json.dumps(properties, ensure_ascii=False)
    return f"{number}. Name: {function['name']}\nDescription: {description}\nParameters: {text}"


def read_calls(completion: str) -> tuple[list[dict[str, Any]], str]:
    """
    The calls of a completion, each with `name` and `arguments`, and `"calls"`; or none and why: `"no_call"` or
    `"malformed"`.
    """
    block = split_completion(completion).tool_call
    if block is None:
        return [], "no_call"
    calls = []
    for call in parse_calls(block) or [None]:
        name, parameters = (call.get("name"), call.get("parameters")) if isinstance(call, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(parameters, dict):
            return [], "malformed"
        calls.append({"name": name, "arguments": parameters})
    return calls, "calls"


def write_result_files(
    rows: Sequence[BfclRow], predictions: dict[str, dict[str, Any]], folder: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """
    Writes one file per category below `folder / "result"`. Without readable calls a question's result is empty, which
    the checker takes for no call. Questions without a completion are left out.

    Returns:
        `tuple[dict, list[dict]]`: How many completions of each category hold calls, none, malformed ones, and how many
        are missing or cut off; and one line per row with its `reason`.
    """
    lines: dict[str, list[str]] = {row.category: [] for row in rows}
    scores = []
    for row in rows:
        record = predictions.get(row.id, {"error": "no prediction"})
        score = {"id": row.id, "category": row.category, "reason": "missing", "cut_off": False}
        if record.get("error") is None:
            calls, reason = read_calls(continued(prefill_of(record), record["completion"]))
            # The checker writes what it read as UTF-8, which half a surrogate pair cannot be.
            text = json.dumps(calls, ensure_ascii=False).encode("utf-8", "replace").decode() if calls else ""
            lines[row.category].append(json.dumps({"id": row.id, "result": text}))
            score |= {"reason": reason, "cut_off": record.get("finish_reason") == "length"}
        scores.append(score)
    place = folder / "result" / RESULTS_AS.replace("/", "_")
    make_folder(place)
    for category, texts in lines.items():
        file = place / f"BFCL_v4_{category}_result.json"
        if texts:
            write_atomically(file, "".join(text + "\n" for text in texts))
        else:  # on which the checker would fail
            file.unlink(missing_ok=True)
    counts = {
        category: {
            **dict.fromkeys(("calls", "no_call", "malformed", "missing"), 0),
            **Counter(score["reason"] for score in scores if score["category"] == category),
            "cut_off": sum(score["cut_off"] for score in scores if score["category"] == category),
        }
        for category in lines
    }
    return {"task": "bfcl", "categories": counts, "result_files": str(place)}, scores


def print_results(results: dict[str, Any]) -> None:
    """Prints what the completions hold, and the command that scores them."""
    categories = results["categories"]
    columns = ["", "calls", "no call", "malformed", "missing", "cut off"]
    lines = [[name, *(str(count) for count in counts.values())] for name, counts in categories.items()]
    print_table("BFCL v4, completions", columns, lines, "Not scored yet: bfcl-eval does it in its own environment.")
    root = Path(results["result_files"]).parents[1].resolve()
    print(
        f"BFCL_PROJECT_ROOT='{root}' bfcl evaluate --partial-eval --model {RESULTS_AS} "
        f"--test-category {','.join(categories)}"
    )
