"""The quickstart's task: generated tool calls in ToolRL's format.

Every prompt lists three tools and carries one request of a user, in which two values are named:

    **Available Tools**
    1. Name: set_alarm
    Parameters: {"name": "string", "hour": "string"}
    2. Name: fetch_forecast
    Parameters: {"location": "string", "date": "string"}
    3. Name: search_shop
    Parameters: {"shade": "string", "article": "string"}
    **Dialogue Records History**
    <user> What is the weather in oslo on friday?

and the gold answer thinks for a few words, then calls the one tool that fits:

    <think> the user needs one tool for this </think>
    <tool_call>
    {"name": "fetch_forecast", "parameters": {"location": "oslo", "date": "friday"}}
    </tool_call>

Each intent has two tools that would serve it, under different names and with different parameters; only one of the
two is listed, so the answer depends on the list, and both values have to be copied out of the request.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path


TOOLS_PER_PROMPT = 3
# Words of thinking in a gold answer and in a demonstration (both ends included).
THINK_WORDS = (3, 12)

VALUES = {
    "city": "oslo paris lima cairo quito delhi seoul tunis milan osaka dakar berlin".split(),
    "day": "monday tuesday wednesday thursday friday saturday sunday".split(),
    "hour": "six seven eight nine ten eleven noon midnight".split(),
    "dish": "soup pasta curry salad tacos noodles risotto pizza falafel sushi dumplings stew".split(),
    "person": "anna boris chen dalia emil farah george hana ivan julia karim lena".split(),
    "item": "lamp chair jacket bicycle kettle mirror blanket helmet camera basket ladder pillow".split(),
    "color": "red green blue yellow purple orange black white".split(),
    "language": "french german hindi arabic korean spanish polish greek".split(),
}

THINK_VOCABULARY = (
    "the user needs one tool for this let me read list again then pick what fits best and check values before i answer"
).split()


@dataclass(frozen=True)
class Tool:
    """A callable tool: its name and its two parameters, in the order in which the request names their values."""

    name: str
    parameters: tuple[str, str]


@dataclass(frozen=True)
class Intent:
    """What a user may want: the wording around two values, their kinds, and the two tools that can serve it."""

    wording: tuple[str, str, str]
    kinds: tuple[str, str]
    tools: tuple[Tool, Tool]


INTENTS = (
    Intent(
        ("What is the weather in ", " on ", "?"),
        ("city", "day"),
        (Tool("get_weather", ("city", "day")), Tool("fetch_forecast", ("location", "date"))),
    ),
    Intent(
        ("Please book a table in ", " at ", "."),
        ("city", "hour"),
        (Tool("book_table", ("city", "hour")), Tool("reserve_restaurant", ("location", "time"))),
    ),
    Intent(
        ("Send ", " to the desk of ", "."),
        ("dish", "person"),
        (Tool("order_food", ("dish", "guest")), Tool("request_meal", ("food", "customer"))),
    ),
    Intent(
        ("Tell ", " that I arrive on ", "."),
        ("person", "day"),
        (Tool("send_message", ("recipient", "day")), Tool("notify_contact", ("contact", "date"))),
    ),
    Intent(
        ("How do I say ", " in ", "?"),
        ("item", "language"),
        (Tool("translate_word", ("word", "language")), Tool("lookup_translation", ("term", "target"))),
    ),
    Intent(
        ("I want to buy a ", " ", "."),
        ("color", "item"),
        (Tool("find_product", ("color", "item")), Tool("search_shop", ("shade", "article"))),
    ),
    Intent(
        ("Wake ", " at ", "."),
        ("person", "hour"),
        (Tool("set_alarm", ("name", "hour")), Tool("create_reminder", ("who", "time"))),
    ),
    Intent(
        ("Find a train from ", " to ", "."),
        ("city", "city"),
        (Tool("find_train", ("origin", "destination")), Tool("search_rail", ("start", "end"))),
    ),
)


@dataclass(frozen=True)
class Request:
    """One thing a user can ask: an intent and its two values. Held-out requests never occur in training."""

    intent: int
    values: tuple[str, str]


@dataclass(frozen=True)
class Example:
    """A prompt, and what its gold answer is made of."""

    prompt: str
    tool: Tool
    values: tuple[str, str]
    thoughts: tuple[str, ...]

    @property
    def answer(self) -> str:
        """The gold answer."""
        return render_answer(self.tool, self.values, self.thoughts)


def all_requests() -> list[Request]:
    """Every request of the task, in a fixed order."""
    return [
        Request(index, (first, second))
        for index, intent in enumerate(INTENTS)
        for first in VALUES[intent.kinds[0]]
        for second in VALUES[intent.kinds[1]]
        if first != second
    ]


def split_requests(num_held_out: int, seed: int) -> tuple[list[Request], list[Request]]:
    """
    Splits all requests into training and held-out ones.

    Args:
        num_held_out (`int`): How many requests are kept for the evaluation.
        seed (`int`): Seed of the shuffle.

    Returns:
        `tuple[list[Request], list[Request]]`: Training requests and held-out requests, disjoint.
    """
    requests = all_requests()
    if not 0 < num_held_out < len(requests):
        raise ValueError(f"num_held_out must lie between 1 and {len(requests) - 1}, got {num_held_out}")
    random.Random(f"split-{seed}").shuffle(requests)
    return requests[num_held_out:], requests[:num_held_out]


def render_prompt(request: Request, tools: list[Tool]) -> str:
    """The prompt text: the numbered tools, then the request."""
    lines = ["**Available Tools**"]
    for number, tool in enumerate(tools, start=1):
        lines.append(f"{number}. Name: {tool.name}")
        lines.append("Parameters: " + json.dumps(dict.fromkeys(tool.parameters, "string")))
    before, between, after = INTENTS[request.intent].wording
    first, second = request.values
    lines.append("**Dialogue Records History**")
    lines.append(f"<user> {before}{first}{between}{second}{after}\n")
    return "\n".join(lines)


def render_answer(tool: Tool, values: tuple[str, str], thoughts: tuple[str, ...]) -> str:
    """A completion in ToolRL's format that calls `tool` with `values` after `thoughts`."""
    call = json.dumps({"name": tool.name, "parameters": dict(zip(tool.parameters, values, strict=True))})
    return f"<think> {' '.join(thoughts)} </think>\n<tool_call>\n{call}\n</tool_call>"


def sample_example(request: Request, rng: random.Random) -> Example:
    """Wraps a request into an example: the tool that serves it listed among two others, and words of thinking."""
    tool = rng.choice(INTENTS[request.intent].tools)
    others = [intent for index, intent in enumerate(INTENTS) if index != request.intent]
    tools = [tool] + [rng.choice(intent.tools) for intent in rng.sample(others, TOOLS_PER_PROMPT - 1)]
    rng.shuffle(tools)
    thoughts = rng.choices(THINK_VOCABULARY, k=rng.randint(*THINK_WORDS))
    return Example(render_prompt(request, tools), tool, request.values, tuple(thoughts))


def example_stream(requests: list[Request], seed: int) -> Iterator[Example]:
    """Endless examples, each request once per round in a new order; deterministic in `seed`."""
    rng = random.Random(f"examples-{seed}")
    order = list(requests)
    while True:
        rng.shuffle(order)
        for request in order:
            yield sample_example(request, rng)


def make_dataset(requests: list[Request], num_rows: int, seed: int) -> list[dict[str, str]]:
    """
    Draws the rows that a recipe trains or evaluates on.

    Args:
        requests (`list[Request]`): The requests to draw from.
        num_rows (`int`): How many rows to return; requests repeat, under other tools, where there are fewer.
        seed (`int`): Seed of the order, of the tools listed and of the thinking in the gold answers.

    Returns:
        `list[dict[str, str]]`: Rows with the columns `prompt` and `answer`, both plain text.
    """
    examples = islice(example_stream(requests, seed), num_rows)
    return [{"prompt": example.prompt, "answer": example.answer} for example in examples]


def vocabulary() -> list[str]:
    """Every text fragment that prompts and completions are made of, each one token, in a fixed order."""
    fragments = ["**Available Tools**\n", "**Dialogue Records History**\n<user> "]
    fragments += ['\nParameters: {"', '": "string", "', '": "string"}\n']
    fragments += [f"{number}. Name: " for number in range(1, TOOLS_PER_PROMPT + 1)]
    fragments += ["<think>", " </think>", "\n<tool_call>\n", '{"name": "', '", "parameters": {"', '": "', '", "']
    fragments += ['"}}', "\n</tool_call>", ".\n", "?\n"]
    for intent in INTENTS:
        fragments += intent.wording[:2]
        for tool in intent.tools:
            fragments += [tool.name, *tool.parameters]
    for values in VALUES.values():
        fragments += values
    fragments += [f" {word}" for word in THINK_VOCABULARY]
    return list(dict.fromkeys(fragments))


def write_jsonl(rows: list[dict[str, str]], path: Path) -> None:
    """Writes rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
