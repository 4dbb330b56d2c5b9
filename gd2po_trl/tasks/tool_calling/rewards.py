"""
The three rewards of the tool-calling task: `correctness`, `format` and `length`.

`correctness`, `format` and `length` are reward functions with the published scales and settings (ToolRL,
https://huggingface.co/papers/2504.13958); [`Correctness`], [`Format`] and [`Length`] build the published variants. All
take TRL's arguments, conversational or plain completions, and (but for length) the column `answer`: the ground truth
as text. None ever raises on what a model wrote. A row whose `answer` is no text or cannot be parsed gets `None`, which
TRL treats as unscored; `check_data` counts such rows before training.

Deviations from the published code, which `reference=True` undoes:

1. Only what follows the last `</think>` can be the answer (the whole text if there is none). The published correctness
   reads the first `<tool_call>` anywhere: it scores -3 for a right call after thoughts that mention the tag, and 3 for
   a call that was only thought of.
2. `</tool_call>` must follow `<tool_call>`; the published correctness wants both tags somewhere.
3. The format wants one pair of think tags, and no line between the tool-call tags that begins with another tag. The
   published pattern accepts anything between a first and a last `</think>`, and a response inside the call block.

Without a counterpart in `reference=True`: a ground truth with a blank line between calls, or whose response mentions
`<tool_call>`, is understood, where the published code raises.
"""

import inspect
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ...errors import UsageError
from ...messages import completion_text, continued
from ...schedules import Schedule
from ...user_input import is_number
from .text_format import (
    Gold,
    parse_calls,
    parse_gold,
    reference_tool_call,
    split_completion,
    think_text,
    values_equal,
)


logger = logging.getLogger(__name__)

_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>")

MATCHES = ("partial", "refined", "intermediate", "refined_intermediate", "coarse")
SCHEDULES = ("linear", "step")

# A gold call is compared with at most this many predicted calls of its name, so that the time stays linear in the
# completion's length. No completion of ordinary length holds as many.
MAX_CANDIDATES = 1000


def _answer_required(func: Any) -> Callable:
    """Marks `answer` as required in the signature, where the trainer looks; its default is for an error of our own."""
    signature = inspect.signature(func)
    answer = signature.parameters["answer"].replace(default=inspect.Parameter.empty)
    func.__signature__ = signature.replace(parameters=list({**signature.parameters, "answer": answer}.values()))
    return func


def _read_gold(text: Any) -> Gold:
    if isinstance(text, str) and not text.strip():
        raise ValueError("the ground truth is empty")
    return parse_gold(text)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True, kw_only=True)
class _ScheduledReward:
    schedule_steps: int | None = None
    schedule: str = "linear"
    steps_per_batch: int = 1
    name: str = ""

    # Name of the field that the schedule changes.
    _scheduled: ClassVar[str]

    def __post_init__(self):
        final = f"final_{self._scheduled}"
        self._check_positive(self._scheduled, getattr(self, self._scheduled))
        if getattr(self, final) is not None:
            self._check_positive(final, getattr(self, final))
        steps = self.schedule_steps
        if steps is not None and not _is_count(steps):
            raise self._error("schedule_steps", steps, "must be a whole number of at least 1, or None")
        if not _is_count(self.steps_per_batch):
            raise self._error("steps_per_batch", self.steps_per_batch, "must be a whole number of at least 1")
        if (steps is None) != (getattr(self, final) is None):
            raise self._error("schedule_steps", steps, f"must be given together with `{final}`, or neither of them")
        self._check_choice("schedule", SCHEDULES)
        if not isinstance(self.name, str) or not self.name:
            raise self._error("name", self.name, "must be a text that is not empty")

    @property
    def __name__(self) -> str:  # TRL names the reward's metrics after it
        return self.name

    def _error(self, field: str, value: Any, remedy: str) -> UsageError:
        return UsageError(f"{type(self).__name__} reward: `{field}` is {value!r}; it {remedy}.")

    def _check_positive(self, field: str, value: Any) -> None:
        if not is_number(value) or not 0 < value <= sys.float_info.max:
            raise self._error(field, value, "must be a finite number greater than 0")

    def _check_choice(self, field: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, field) not in allowed:
            raise self._error(field, getattr(self, field), f"must be one of {', '.join(allowed)}")

    def _current(self, trainer_state: Any) -> float:
        """The scheduled field's value at the trainer's step."""
        start, final = getattr(self, self._scheduled), getattr(self, f"final_{self._scheduled}")
        step = getattr(trainer_state, "global_step", None)
        if final is None or self.schedule_steps is None or step is None:
            return start
        # `step` counts finished optimizer steps, so it is 0 at the first generation batch, which ToolRL calls 1.
        kind = "steps" if self.schedule == "step" else self.schedule
        return Schedule(kind, ((0, start), (self.schedule_steps, final))).at(step + self.steps_per_batch)


@dataclass(frozen=True, kw_only=True)
class _GoldReward(_ScheduledReward):
    """A reward that reads the ground truth."""

    reference: bool = False

    # Whether it tells completions apart only where the ground truth has a call.
    _needs_calls: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.reference, bool):
            raise self._error("reference", self.reference, "must be true or false")

    def _golds(self, answer: Sequence[str] | None, completions: Sequence[Any]) -> list[Gold | None]:
        """One parsed ground truth per completion; the rollouts of a group share theirs."""
        if answer is None:
            raise UsageError(
                f"The {self.name} reward reads the ground truth from the column `answer`, which the dataset does not "
                "have: load the data with a tool-calling dataset loader, or rename the column."
            )
        if len(answer) != len(completions):
            raise UsageError(
                f"The {self.name} reward got {len(answer)} values of `answer` for {len(completions)} completions; "
                "it needs one per completion."
            )
        parsed: dict[str, Gold | None] = {}
        for text in answer:
            if isinstance(text, str) and text not in parsed:
                try:
                    parsed[text] = _read_gold(text)
                except ValueError:
                    parsed[text] = None
        return [parsed[text] if isinstance(text, str) else None for text in answer]

    def check_data(self, dataset: Any, what: str) -> None:
        """Warns of answers in a dataset that the reward cannot read; [`UsageError`] if it can read none."""
        golds, unread, rows = [], [], len(dataset["answer"])
        for index, answer in enumerate(dataset["answer"]):
            try:
                golds.append(_read_gold(answer))
            except ValueError as error:
                unread.append((index, error))
        if unread:
            index, reason = unread[0]
            message = (
                f"The {self.name} reward cannot read {len(unread)} of {rows} answers in the column `answer` of the "
                f"{what} and leaves those rows unscored. The first is row {index}: {reason}."
            )
            if not golds:
                raise UsageError(message)
            logger.warning(message)
        if golds and self._needs_calls and not any(gold.calls for gold in golds):
            logger.warning(
                f"The {self.name} reward is 0 for every completion: none of the {rows} answers in the {what} has a "
                "`<tool_call>` block."
            )


@dataclass(frozen=True, kw_only=True)
class Correctness(_GoldReward):
    """
    How well the tool calls agree with the ground truth's, in `[-max_score, max_score]`.

    0 if the ground truth has no call. `-max_score` if there is no `<tool_call>…</tool_call>` in the answer, a line in
    it is not JSON, a call has no name (or an array or object for one), or a call with the name of a gold call has no
    `parameters` object. Otherwise `-max_score + 2 * max_score * score / best_score` where, for `match="partial"`,
    `score` is the multiset overlap `|both| / (|gold| + |predicted| - |both|)` of the tool names, plus for each gold
    call the best of the unused predicted calls of the same name: the overlap of the parameter names plus 1 per equal
    value; `best_score` is 1 plus `1 + number of parameters` for each gold call (ToolRL, section 3.3).

    Args:
        match (`str`, defaults to `"partial"`):
            What earns a partial score (ToolRL, section 5.3, and its published code):

            - `"partial"`: as above.
            - `"refined"`: as above, but an overlap is 1 if the names are the same in the same order, else 0.
            - `"intermediate"`: a gold call is worth 1 and earns it if one predicted call equals it in everything.
            - `"refined_intermediate"`: both.
            - `"coarse"`: nothing; the calls equal the gold calls in the same order, or the score is `-max_score`.
        max_score (`float`, defaults to `3.0`):
            Highest score; its negative is the lowest. 1 is ToolRL's "equal max" variant.
        final_max_score (`float`, *optional*):
            `max_score` at the end of the schedule. ToolRL's two-stage scale is `max_score=1, final_max_score=3,
            schedule_steps=30, schedule="step"`, its dynamic scale `max_score=2, final_max_score=3,
            schedule_steps=150`.
        schedule_steps (`int`, *optional*):
            The optimizer step, counted from 1, from which on `final_max_score` applies. ToolRL counts generation
            batches: multiply by `steps_per_batch`. Without a trainer's state, as outside training, the start value
            applies.
        schedule (`str`, defaults to `"linear"`):
            `"linear"` from the start to the final value, or `"step"`: the start value until `schedule_steps`. The
            final value stays in force afterwards.
        steps_per_batch (`int`, defaults to `1`):
            Optimizer steps for which one generation batch is used. A batch is scored as at the last of its steps, so
            that the schedule moves as ToolRL's does, whose first batch is number 1.
        reference (`bool`, defaults to `False`):
            Whether to read the calls as the published code does, see the module's list of deviations.
        name (`str`, defaults to `"correctness"`): Name in the metrics.

    Raises:
        [`~gd2po_trl.errors.UsageError`] (a `ValueError`): for a wrong argument, and when called without `answer`.
    """

    match: str = "partial"
    max_score: float = 3.0
    final_max_score: float | None = None
    name: str = "correctness"

    _scheduled: ClassVar[str] = "max_score"
    _needs_calls: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self._check_choice("match", MATCHES)

    @_answer_required
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[str] | None = None,
        trainer_state: Any = None,
        **kwargs,
    ) -> list[float | None]:
        high = float(self._current(trainer_state))
        return [
            None if gold is None else self._score(completion_text(completion), gold, high)
            for completion, gold in zip(completions, self._golds(answer, completions), strict=True)
        ]

    def _score(self, text: str, gold: Gold, high: float) -> float:
        if not gold.calls:
            return 0.0
        block = reference_tool_call(text) if self.reference else split_completion(text).tool_call
        predicted = parse_calls(block)
        if predicted is None:
            return -high
        score, best_score = _match_calls(gold.calls, predicted, self.match, self.reference)
        return high * min(2 * score / best_score - 1, 1.0)


def _match_calls(gold: list[dict], predicted: list[Any], match: str, reference: bool) -> tuple[float, float]:
    """Score of the predicted values against the gold calls, and the best score there is."""
    nothing = 0.0, 1.0
    if values_equal(gold, predicted):
        return 1.0, 1.0
    if match == "coarse":
        return nothing
    refined, whole_calls = match.startswith("refined"), match.endswith("intermediate")
    # The published code counts names in a dictionary, except where it only asks whether the lists are the same.
    allows_odd_names = reference and refined

    gold_names = [call["name"] for call in gold]
    wanted = set(gold_names)
    predicted_names = []
    candidates: dict[str, list[Any]] = defaultdict(list)
    for call in predicted:
        if not isinstance(call, dict) or "name" not in call:
            return nothing
        if isinstance(call["name"], (list, dict)) and not allows_odd_names:
            return nothing
        name = call["name"]
        predicted_names.append(name)
        if isinstance(name, str) and name in wanted:
            if not whole_calls and not isinstance(call.get("parameters"), dict):
                return nothing
            if len(candidates[name]) < MAX_CANDIDATES:
                candidates[name].append(call)

    score = _name_overlap(gold_names, predicted_names, refined)
    best_score = 1.0
    for call in gold:
        unused = candidates[call["name"]]
        worth = 1 if whole_calls else 1 + len(call["parameters"])
        best_score += worth
        best, best_index = 0.0, None
        for index, candidate in enumerate(unused):
            if whole_calls:
                value = float(values_equal(call, candidate))
            else:
                value = _parameter_score(call["parameters"], candidate["parameters"], refined)
            if value > best:
                best, best_index = value, index
                if best == worth:
                    break
        if best_index is not None:
            score += best
            del unused[best_index]
    return score, best_score


def _name_overlap(gold: list[str], predicted: list[Any], refined: bool) -> float:
    if refined:
        return float(values_equal(gold, predicted))
    # Only gold names are counted: predicted ones may be numbers, whose hashes a text can make collide.
    gold_counts = Counter(gold)
    counts = Counter(name for name in predicted if isinstance(name, str) and name in gold_counts)
    both = sum(min(count, counts[name]) for name, count in gold_counts.items())
    return both / (len(gold) + len(predicted) - both)


def _parameter_score(gold: dict[str, Any], predicted: dict[str, Any], refined: bool) -> float:
    shared = gold.keys() & predicted.keys()
    if refined:
        overlap = float(list(gold) == list(predicted))
    elif not gold and not predicted:
        overlap = 1.0
    else:
        overlap = len(shared) / (len(gold) + len(predicted) - len(shared))
    return overlap + sum(values_equal(gold[key], predicted[key]) for key in shared)


@dataclass(frozen=True, kw_only=True)
class Format(_GoldReward):
    """
    `max_score` if the whole completion has the structure of the ground truth, else `min_score`.

    The structure is `<think>…</think>`, then on a new line, as the ground truth has them, `<tool_call>` newline …
    newline `</tool_call>` and on a new line `<response>…</response>`, and nothing else. The tags that the structure
    has occur once in the whole completion, also in the thoughts. Whether the lines between the tool-call tags are
    calls is the correctness reward's business.

    Args:
        max_score (`float`, defaults to `1.0`): Score of the right structure.
        final_max_score (`float`, *optional*):
            `max_score` at the end of the schedule. ToolRL's two-stage scale is `max_score=1, final_max_score=0.5,
            schedule_steps=30, schedule="step"`. Its dynamic scale shrinks the width of the range from 4 to 2:
            `max_score=4, final_max_score=2, schedule_steps=150` (where the range begins does not matter, a constant
            cancels in the group's mean).
        schedule_steps (`int`, *optional*): As in [`Correctness`].
        schedule (`str`, defaults to `"linear"`): As in [`Correctness`].
        steps_per_batch (`int`, defaults to `1`): As in [`Correctness`].
        min_score (`float`, defaults to `0.0`): Score of any other structure, below `max_score`.
        reference (`bool`, defaults to `False`):
            Whether to accept what the published pattern accepts, see the module's list of deviations.
        name (`str`, defaults to `"format"`): Name in the metrics.

    Raises:
        [`~gd2po_trl.errors.UsageError`] (a `ValueError`): for a wrong argument, and when called without `answer`.
    """

    max_score: float = 1.0
    final_max_score: float | None = None
    min_score: float = 0.0
    name: str = "format"

    _scheduled: ClassVar[str] = "max_score"

    def __post_init__(self):
        super().__post_init__()
        lowest, highest = self.min_score, min(self.max_score, self.final_max_score or self.max_score)
        if not is_number(lowest) or not -sys.float_info.max <= lowest < highest:
            raise self._error("min_score", lowest, "must be a finite number below `max_score`")

    @_answer_required
    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        answer: Sequence[str] | None = None,
        trainer_state: Any = None,
        prefill: Sequence[str] | None = None,
        **kwargs,
    ) -> list[float | None]:
        low, high = float(self.min_score), float(self._current(trainer_state))
        return [
            None if gold is None else high if _has_structure(text, gold, self.reference) else low
            for text, gold in zip(_turns(completions, prefill), self._golds(answer, completions), strict=True)
        ]


def _has_structure(text: str, gold: Gold, reference: bool) -> bool:
    once = ["<tool_call>", "</tool_call>"] if gold.calls else []
    once += ["<response>", "</response>"] if gold.has_response else []
    once += [] if reference else ["<think>", "</think>"]
    if not text.startswith("<think>") or any(text.count(tag) != 1 for tag in once):
        return False

    if not gold.calls and not gold.has_response:
        return text.endswith("</think>")
    if gold.calls:
        opening, ending = "</think>\n<tool_call>\n", "\n</tool_call>"
    else:
        opening, ending = "</think>\n<response>", "</response>"
    start = text.find(opening, len("<think>"))
    if start < 0:
        return False
    body = text[start + len(opening) :]
    if gold.calls and gold.has_response:
        body, separator, response = body.partition("\n</tool_call>\n<response>")
        if not separator or not response.endswith("</response>"):
            return False
    elif not body.endswith(ending):
        return False
    else:
        body = body[: -len(ending)]
    if gold.calls and not reference:
        return not any(line.lstrip().startswith(_TAGS) for line in body.split("\n"))
    return True


@dataclass(frozen=True, kw_only=True)
class Length(_ScheduledReward):
    """
    Length of the thoughts, in [0, 1]: words after the last `<think>` and before the next `</think>`, divided by
    `max_words`, rounded to 2 decimals and capped at 1; 0 unless both tags occur (ToolRL, section 5.1). It rewards
    longer thoughts whether the answer is right or wrong.

    Args:
        max_words (`float`, defaults to `512`): Words from which on the score is 1.
        final_max_words (`float`, *optional*):
            `max_words` at the end of the schedule. ToolRL's schedule is `max_words=384, final_max_words=640,
            schedule_steps=105`.
        schedule_steps (`int`, *optional*): As in [`Correctness`].
        schedule (`str`, defaults to `"linear"`): As in [`Correctness`].
        steps_per_batch (`int`, defaults to `1`): As in [`Correctness`].
        name (`str`, defaults to `"length"`): Name in the metrics.

    Raises:
        [`~gd2po_trl.errors.UsageError`] (a `ValueError`): for a wrong argument.
    """

    max_words: float = 512
    final_max_words: float | None = None
    name: str = "length"

    _scheduled: ClassVar[str] = "max_words"

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        trainer_state: Any = None,
        prefill: Sequence[str] | None = None,
        **kwargs,
    ) -> list[float]:
        max_words = self._current(trainer_state)
        thoughts = [think_text(text) for text in _turns(completions, prefill)]
        return [0.0 if text is None else min(round(len(text.split()) / max_words, 2), 1.0) for text in thoughts]


def _turns(completions: Sequence[Any], prefill: Sequence[str] | None) -> list[str]:
    """The assistant's turns: what the prompts opened of them (a chat template may open `<think>`), and the rest."""
    texts = [completion_text(completion) for completion in completions]
    return texts if prefill is None else [continued(start, text) for start, text in zip(prefill, texts, strict=True)]


_CORRECTNESS, _FORMAT, _LENGTH = Correctness(), Format(), Length()


@_answer_required
def correctness(prompts, completions, answer=None, **kwargs) -> list[float | None]:
    """Agreement of the tool calls with the ground truth, in [-3, 3]: [`Correctness`] with its defaults."""
    return _CORRECTNESS(prompts, completions, answer, **kwargs)


@_answer_required
def format(prompts, completions, answer=None, prefill=None, **kwargs) -> list[float | None]:
    """1 if the completion has the structure of the ground truth, else 0: [`Format`] with its defaults."""
    return _FORMAT(prompts, completions, answer, prefill=prefill, **kwargs)


def length(prompts, completions, prefill=None, **kwargs) -> list[float]:
    """Words in the thoughts / 512, in [0, 1]: [`Length`] with its defaults."""
    return _LENGTH(prompts, completions, prefill=prefill, **kwargs)


correctness.check_data = _CORRECTNESS.check_data  # type: ignore[attr-defined]
format.check_data = _FORMAT.check_data  # type: ignore[attr-defined]
