"""
Helpfulness against harmlessness: the mean of each reward per data set, and how often the model beats a baseline.

As published: greedy decoding, one completion per prompt, the policy's prompt shortened from the left to 512 tokens
while the reward models read all of it, and per data set the mean of each reward and of their sum. Added here: win
rates against a baseline with confidence intervals, and means by harm category where the data name one.

Two protocols average the same scores. `all`, the default, averages every row. The published `mean@1` leaves out each
prompt that occurs more than once in its set, as verl files the completions of equal prompts under `mean@2`, `mean@3`,
...: of PKU-SafeRLHF's 8,211 rows it averages 6,982, of HH-RLHF's 8,520 rows 8,514. `reference` does the same. (verl
compares the prompts as the policy sees them, shortened; here the whole prompts are compared.)
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import UsageError
from ...evaluation.intervals import win_rate
from ...evaluation.predictions import EvalRow
from ...evaluation.scoring import SUM, compute_scores, resolve_rewards  # noqa: F401 (the evaluation in one place)
from ...reporting import decimals, print_table


PROTOCOLS = ("all", "reference")
# The published evaluation completes repeated prompts as often as they occur. BeaverTails repeats one for each of its
# judged responses.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "alpaca": {"split": "test", "drop_duplicates": False},
    "hh_rlhf": {"split": "test", "drop_duplicates": False},
    "pku_saferlhf": {"split": "test", "drop_duplicates": False},
    "beavertails": {"split": "30k_test"},
}


@dataclass(frozen=True)
class SafeAlignmentRow(EvalRow):
    """One prompt of the data set labeled `dataset`, with its harm categories, if the data name them."""

    dataset: str
    categories: tuple[str, ...] = ()


def load_rows(datasets: dict[str, dict[str, Any]], limit: int | None = None) -> list[SafeAlignmentRow]:
    """
    Loads prompts; ids are `label/0`, ...

    Args:
        datasets (`dict[str, dict]`):
            By label: the arguments of [`~gd2po_trl.datasets.load_dataset_by_name`], where `name` defaults to the label
            and the split to the test split.
        limit (`int`, *optional*): First rows of each data set. All by default.

    Raises:
        [`UsageError`]: if a data set is unknown, missing, or has no prompts.
    """
    from ...datasets import load_dataset_by_name

    rows = []
    for label, options in datasets.items():
        options = {"name": label, **options}
        defaults = _DEFAULTS.get(options["name"], {}) if isinstance(options["name"], str) else {}
        dataset = load_dataset_by_name(**{**defaults, "limit": limit, **options})
        for index, record in enumerate(dataset):
            prompt = record["prompt"]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            messages = [{"role": message["role"], "content": message["content"]} for message in prompt]
            rows.append(SafeAlignmentRow(f"{label}/{index}", messages, label, _categories(record.get("category"))))
    return rows


def _categories(value: Any) -> tuple[str, ...]:
    if isinstance(value, dict):
        return tuple(name for name, applies in value.items() if applies is True)
    return (value,) if isinstance(value, str) and value else ()


def summarize(
    rows: Sequence[SafeAlignmentRow],
    predictions: dict[str, dict[str, Any]],
    scores: dict[str, dict[str, float | None]],
    labels: Sequence[str],
    baseline: dict[str, dict[str, float | None]] | None = None,
    protocol: str = "all",
) -> dict[str, Any]:
    """
    The results per data set.

    Args:
        rows (`Sequence[SafeAlignmentRow]`): Prompts.
        predictions (`dict[str, dict]`): Completions by row id, for the counts.
        scores (`dict[str, dict]`): The model's part of [`compute_scores`]' result.
        labels (`Sequence[str]`): The rewards.
        baseline (`dict[str, dict]`, *optional*): The baseline's part.
        protocol (`str`, defaults to `"all"`):
            `"all"` averages every row, `"reference"` those whose prompt occurs once in the data set.

    Returns:
        `dict[str, Any]`: `protocol`, and `datasets`: by label `rows`, `missing` (no completion), `cut_off` (by the
        token limit), `unscored` (per reward), `mean` (per reward and their `sum`, by the protocol), `mean_all_rows`,
        `mean_reference` and `rows_reference` (both protocols' means whatever the protocol, and the rows of the
        second), and where they apply, over the protocol's rows, `by_category`, `baseline_mean` and `win_rate` (`rate`,
        in which a tie counts half, its 95 % Wilson `interval`, `wins`, `ties`, `losses`), in [0, 1].

    Raises:
        [`UsageError`]: for an unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}.")
    dimensions = [*labels, SUM]
    results: dict[str, Any] = {}
    for dataset in dict.fromkeys(row.dataset for row in rows):
        members = [row for row in rows if row.dataset == dataset]
        given = [predictions[row.id] for row in members if row.id in predictions]
        ids = [row.id for row in members]
        occurrences = Counter(row.prompt_sha256 for row in members)
        ids_reference = [row.id for row in members if occurrences[row.prompt_sha256] == 1]
        counted = ids_reference if protocol == "reference" else ids
        entry = {
            "rows": len(members),
            "missing": len(members) - sum(record.get("error") is None for record in given),
            "cut_off": sum(record.get("finish_reason") == "length" for record in given),
            "unscored": {label: sum(scores[key][label] is None for key in ids) for label in labels},
            "mean": _means(scores, counted, dimensions),
            "mean_all_rows": _means(scores, ids, dimensions),
            "mean_reference": _means(scores, ids_reference, dimensions),
            "rows_reference": len(ids_reference),
        }
        if any(row.categories for row in members):
            named = {row.id: row.categories for row in members}
            categories = sorted({category for key in counted for category in named[key]})
            by_category = {name: [key for key in counted if name in named[key]] for name in categories}
            entry["by_category"] = {
                name: {"rows": len(keys), **_means(scores, keys, dimensions)} for name, keys in by_category.items()
            }
        if baseline is not None:
            entry["baseline_mean"] = _means(baseline, counted, dimensions)
            entry["win_rate"] = {
                name: win_rate([(scores[key][name], baseline[key][name]) for key in counted]) for name in dimensions
            }
        results[dataset] = entry
    return {"task": "safe-alignment", "protocol": protocol, "datasets": results}


def _means(
    scores: dict[str, dict[str, float | None]], ids: Sequence[str], dimensions: Sequence[str]
) -> dict[str, float | None]:
    means = {}
    for name in dimensions:
        values = [value for key in ids if (value := scores[key][name]) is not None]
        means[name] = math.fsum(values) / len(values) if values else None
    return means


def print_results(results: dict[str, Any]) -> None:
    """Prints the means, the win rates and the means by category, and what is missing from them."""
    datasets = results["datasets"]
    labels = list(next(iter(datasets.values()))["mean"])
    compared = any("win_rate" in entry for entry in datasets.values())
    lines, notes = [], []
    for name, entry in datasets.items():
        means = [decimals(entry["mean"][label], 4) for label in labels]
        rows = entry["rows_reference" if results["protocol"] == "reference" else "rows"]
        lines.append([name, *means, str(rows), str(entry["cut_off"])])
        if compared:
            lines.append(["  baseline", *(decimals(entry["baseline_mean"][label], 4) for label in labels), "", ""])
        if entry["rows_reference"] < entry["rows"]:
            notes.append(_note_on_repeated_prompts(name, entry, results["protocol"]))
        if entry["missing"]:
            notes.append(f"{name}: {entry['missing']} rows have no completion and are left out.")
        for label, count in entry["unscored"].items():
            if count > entry["missing"]:
                notes.append(f"{name}: {label} gave no score for {count - entry['missing']} completions.")
    print_table(
        f"Means per data set, protocol {results['protocol']}",
        ["", *labels, "rows", "cut off"],
        lines,
        "\n".join(notes),
    )

    if compared:
        lines = [[name, *(_cell(entry["win_rate"][label]) for label in labels)] for name, entry in datasets.items()]
        print_table("Win rate against the baseline in % (95 % interval)", ["", *labels], lines)

    for name, entry in datasets.items():
        if "by_category" in entry:
            lines = [
                [category, *(decimals(means[label], 4) for label in labels), str(means["rows"])]
                for category, means in entry["by_category"].items()
            ]
            print_table(f"{name} by harm category", ["", *labels, "rows"], lines)


def _note_on_repeated_prompts(name: str, entry: dict[str, Any], protocol: str) -> str:
    other, rows = ("reference", entry["rows_reference"]) if protocol == "all" else ("all_rows", entry["rows"])
    means = ", ".join(f"{label} {decimals(value, 4)}" for label, value in entry[f"mean_{other}"].items())
    rule = "leaves out prompts that occur more than once" if protocol == "all" else "averages every row"
    return f"{name}: --protocol {'reference' if protocol == 'all' else 'all'} {rule}: {means} over {rows} rows."


def _cell(win: dict[str, Any]) -> str:
    low, high = win["interval"]
    return "–" if win["rate"] is None else f"{100 * win['rate']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
