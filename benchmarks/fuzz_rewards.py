"""
Fuzz of the tool-calling rewards: mutated completions must neither raise, nor score out of range, nor cost much.

    python benchmarks/fuzz_rewards.py --completions rlla_sft.json --seconds 60 --output fuzz.json

Every mutated completion is scored by the three rewards and all published variants of correctness and format. The cost
is processor time per started KB (1,024 characters) of the completion, for one reward; a new worst case is measured
three times and the fastest counts, so that an interruption is not taken for a slow completion. Exit status 1 if any
reward raised or left its range.
"""

import argparse
import json
import platform
import random
import re
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

from gd2po_trl.tasks.tool_calling.rewards import MATCHES, Correctness, Format, Length


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")
REWARDS = {
    **{f"correctness[{match}]": Correctness(match=match) for match in MATCHES},
    "correctness[reference]": Correctness(reference=True),
    "format": Format(),
    "format[reference]": Format(reference=True),
    "length": Length(),
}
RANGES = {"correctness": (-3.0, 3.0), "format": (0.0, 1.0), "length": (0.0, 1.0)}
BUILT_IN = [
    '<think> Two cities. </think>\n<tool_call>\n{"name": "weather", "parameters": {"city": "Oslo", "days": 3}}\n'
    '{"name": "weather", "parameters": {"city": "Rome", "days": 3}}\n</tool_call>',
    "<think> Nothing to call. </think>\n<response> Which city do you mean? </response>",
    '<think> Both. </think>\n<tool_call>\n{"name": "open", "parameters": {"id": 7, "tags": ["a", {"b": null}]}}\n'
    "</tool_call>\n<response> Opening it. </response>",
]


def load(path: Path | None) -> list[tuple[str, str]]:
    """(completion, answer) pairs of a JSON list with the keys `completion` and `answer`, or `output` for both."""
    if path is None:
        return [(text, text) for text in BUILT_IN]
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [(row.get("completion", row.get("output")), row.get("answer", row.get("output"))) for row in rows]


def position(text: str, rng: random.Random) -> int:
    return rng.randint(0, len(text))


def insert(text: str, piece: str, rng: random.Random) -> str:
    at = position(text, rng)
    return text[:at] + piece + text[at:]


def replace_one(pattern: str, text: str, piece: str, rng: random.Random) -> str:
    """One match of the pattern replaced, or the piece inserted anywhere if there is none."""
    matches = list(re.finditer(pattern, text[:20_000]))
    if not matches:
        return insert(text, piece, rng)
    match = rng.choice(matches)
    return text[: match.start()] + piece + text[match.end() :]


def truncate(text, rng):
    return text[: position(text, rng)]


def cut_span(text, rng):
    start = position(text, rng)
    return text[:start] + text[start + rng.randint(1, 40) :]


def double_span(text, rng):
    start = position(text, rng)
    return text[:start] + text[start : start + rng.randint(1, 400)] * rng.choice([2, 3, 50]) + text[start:]


def insert_tag(text, rng):
    return insert(text, rng.choice(TAGS) * rng.choice([1, 1, 1, 2, 100]), rng)


def swap_tag(text, rng):
    return replace_one("|".join(TAGS), text, rng.choice(TAGS), rng)


def nest(text, rng):
    opening, closing = rng.choice([("[", "]"), ('{"a": ', "}"), ('[{"a": ', "}]")])
    depth = rng.choice([3, 50, 99, 100, 101, 1000, 10_000])
    closing = closing if rng.random() < 0.7 else ""
    return replace_one(r'(?<=: )(?:"[^"\n]*"|\d+)', text, opening * depth + "1" + closing * depth, rng)


def odd_number(text, rng):
    digits = "9" * rng.choice([20, 400, 4300, 4301, 100_000])
    number = rng.choice(
        ["NaN", "Infinity", "-Infinity", digits, f"-{digits}", f"0.{digits}", f"1e{digits}", "-0", "1E-9"]
    )
    return replace_one(r'(?<=: )(?:"[^"\n]*"|\d+)', text, number, rng)


def duplicate_key(text, rng):
    key = rng.choice(["name", "parameters", "a"])
    value = rng.choice(['"x"', "{}", "[]", "null", "1", '{"a": 1, "a": 2}'])
    return replace_one(r"\{", text, f'{{"{key}": {value}, ', rng)


def odd_character(text, rng):
    odd = [
        "\ud800",
        "\udfff",
        "\\ud800",
        "\x00",
        "\u2028",
        "\x85",
        "\ufeff",
        "\r",
        "\t",
        '"',
        "\\",
        "\\u12",
        "{",
        "]",
        "é",
    ]
    return insert(text, rng.choice(odd) * rng.choice([1, 1, 2, 1000]), rng)


def wrong_type(text, rng):
    value = rng.choice(["1", "null", "true", "[]", "{}", '"x"', '["a"]', '{"name": 1}'])
    return replace_one(r'"[^"\n]*"|\{[^{}\n]*\}', text, value, rng)


def shuffle_lines(text, rng):
    lines = text.split("\n")
    rng.shuffle(lines)
    return "\n".join(lines)


def repeat_line(text, rng):
    lines = text.split("\n")
    at = rng.randrange(len(lines))
    lines[at : at + 1] = [lines[at]] * rng.choice([2, 10, 300])
    return "\n".join(lines)


def newlines(text, rng):
    return text.replace("\n", rng.choice(["", " ", "\n\n", "\r\n", "\\n"]))


def flood(text, rng):
    """One or two million characters of one thing."""
    piece = rng.choice(
        [
            *TAGS,
            "".join(TAGS),
            "</think>\n<tool_call>\n",
            "\n</tool_call>\n<response>",
            "\n",
            " ",
            "a ",
            "[",
            "{}",
            '"',
            "\\",
            '{"a":',
            '{"name": "f", "parameters": {}}\n',
            '{"name": 2305843009213693951}\n',
            "1\n",
            "9",
            text,
            text.partition("<tool_call>\n")[2].partition("</tool_call>")[0] or "x",
        ]
    )
    return insert(text, piece * (rng.choice([1_000_000, 2_000_000]) // len(piece)), rng)


SMALL = [
    truncate,
    cut_span,
    double_span,
    insert_tag,
    swap_tag,
    nest,
    odd_number,
    duplicate_key,
    odd_character,
    wrong_type,
    shuffle_lines,
    repeat_line,
    newlines,
]


def mutate(text: str, rng: random.Random, flood_rate: float) -> tuple[str, list[str]]:
    mutations = [rng.choice(SMALL) for _ in range(rng.randint(1, 5))]
    if rng.random() < flood_rate:
        mutations.append(flood)
    for mutation in mutations:
        text = mutation(text, rng)
    return text, [mutation.__name__ for mutation in mutations]


def timed(reward, completion: str, answer: str) -> tuple[float | None, float]:
    """The reward and the milliseconds of processor time it took."""
    start = time.process_time_ns()
    (value,) = reward(prompts=[""], completions=[completion], answer=[answer])
    return value, (time.process_time_ns() - start) / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=Path, help="JSON file with real completions; three built in if left out")
    parser.add_argument("--seconds", type=float, default=60, help="time limit (default: 60)")
    parser.add_argument("--cases", type=int, default=10**9, help="limit on mutated completions (default: none)")
    parser.add_argument("--flood-rate", type=float, default=0.005, help="share of completions of over 1 MB (0.005)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the mutations (default: 0)")
    parser.add_argument("--output", type=Path, help="JSON file for the report")
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    bases = load(arguments.completions)
    deadline = time.monotonic() + arguments.seconds
    tried, characters, largest, exceptions, out_of_range = 0, 0, 0, [], []
    total_ms, worst, counts, distinct = Counter(), {}, Counter(), {name: set() for name in REWARDS}
    while tried < arguments.cases and time.monotonic() < deadline:
        base, answer = rng.choice(bases)
        if rng.random() < 0.1:
            answer = rng.choice(bases)[1]
        text, mutations = mutate(base, rng, arguments.flood_rate)
        tried += 1
        characters += len(text)
        largest = max(largest, len(text))
        counts.update(mutations)
        kilobytes = max(len(text) / 1024, 1)
        for name, reward in REWARDS.items():
            case = {"reward": name, "mutations": mutations, "characters": len(text), "case": tried}
            try:
                value, cost = timed(reward, text, answer)
                if cost / kilobytes > worst.get(name, {"ms_per_kb": 0})["ms_per_kb"]:
                    cost = min(cost, *(timed(reward, text, answer)[1] for _ in range(2)))
                    if cost / kilobytes > worst.get(name, {"ms_per_kb": 0})["ms_per_kb"]:
                        worst[name] = {"ms_per_kb": round(cost / kilobytes, 4), "ms": round(cost, 3), **case}
            except Exception:
                exceptions.append({**case, "traceback": traceback.format_exc(limit=-3)})
                continue
            total_ms[name] += cost
            low, high = RANGES[reward.__name__]
            if type(value) is not float or not low <= value <= high:
                out_of_range.append({**case, "value": repr(value)})
            else:
                distinct[name].add(round(value, 6))

    report = {
        "cases": tried,
        "rewards_computed": tried * len(REWARDS),
        "seed": arguments.seed,
        "base_completions": len(bases),
        "python": platform.python_version(),
        "megabytes": round(characters / 2**20, 1),
        "largest_characters": largest,
        "exceptions": len(exceptions),
        "out_of_range": len(out_of_range),
        "worst_ms_per_kb": max((case["ms_per_kb"] for case in worst.values()), default=0.0),
        "mean_ms_per_kb": {name: round(ms * 1024 / characters, 5) for name, ms in total_ms.items()},
        "distinct_scores": {name: len(scores) for name, scores in distinct.items()},
        "worst": worst,
        "mutations": dict(counts.most_common()),
        "failures": (exceptions + out_of_range)[:20],
    }
    print(f"mutated completions   {tried:,} ({report['megabytes']} MB, the largest {largest:,} characters)")
    print(f"rewards computed      {report['rewards_computed']:,}")
    print(f"exceptions            {report['exceptions']}")
    print(f"out of range          {report['out_of_range']}")
    for name, case in worst.items():
        print(
            f"worst ms per KB       {case['ms_per_kb']:.3f}  {name} ({case['characters']:,} characters: "
            f"{', '.join(case['mutations'])})"
        )
    for failure in report["failures"][:5]:
        print(failure, file=sys.stderr)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 1 if exceptions or out_of_range else 0


if __name__ == "__main__":
    sys.exit(main())
