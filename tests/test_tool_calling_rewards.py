"""The rewards of the tool-calling task: published numbers, variants, known defects, hostile completions."""

import inspect
import json
import math
import pickle
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gd2po_trl.rewards import resolve_reward
from gd2po_trl.tasks.tool_calling.rewards import (
    MATCHES,
    MAX_CANDIDATES,
    Correctness,
    Format,
    Length,
    correctness,
    format,
    length,
)


F = {"name": "f", "parameters": {"a": "1", "b": 2}}
G = {"name": "g", "parameters": {"c": [1, {"d": None}]}}


def block(*calls):
    return "<tool_call>\n" + "\n".join(json.dumps(call) for call in calls) + "\n</tool_call>"


def completion(*calls, think="why"):
    return f"<think> {think} </think>\n{block(*calls)}"


def f(**parameters):
    return {"name": "f", "parameters": parameters}


GOLD = completion(F)
RESPONSE = "<think> why </think>\n<response> hello </response>"
BOTH = completion(F) + "\n<response> hello </response>"
NEITHER = "<think> why </think>"


def score(text, answer=GOLD, reward=correctness, **kwargs):
    (value,) = reward(prompts=["p"], completions=[text], answer=[answer], completion_ids=[[1]], **kwargs)
    return value


# Published numbers


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("name", ["correctness", "format", "length"])
def test_golden_cases(shared_dir, name, reference):
    cases = json.loads((shared_dir / "golden/tool_calling_rewards.json").read_text(encoding="utf-8"))
    assert len(cases) == 120
    builder = {"correctness": Correctness, "format": Format, "length": Length}[name]
    reward = builder(reference=reference) if name != "length" else builder()
    texts = [case["completion"] for case in cases]
    for completions in (texts, [[{"role": "assistant", "content": text}] for text in texts]):
        values = reward(prompts=texts, completions=completions, answer=[case["answer"] for case in cases])
        assert values == pytest.approx([case[name] for case in cases], abs=1e-6)


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "text, expected",
    [
        (completion(F), 3),
        (completion(f(b=2, a="1")), 3),
        (completion({**F, "id": 7}), 3),
        (completion(f(a="1", b=2.0)), 3),
        (completion(f()), -1.5),
        (completion(f(a="1", b=3)), 1.5),
        (completion(f(a="1", b=2, c=3)), 2.5),
        (completion(F, F), 2.25),
        (completion(F, {"name": "h", "parameters": {}}), 2.25),
        (completion(F, F, F, F, F), 1.8),
        (completion({"name": "h", "parameters": F["parameters"]}), -3),
        (completion([F]), -3),
        (f"<think> why </think>\n<tool_call>\n{json.dumps(F, indent=2)}\n</tool_call>", -3),
        (completion({"parameters": F["parameters"]}), -3),
        (completion({"name": "f", "parameters": "a"}), -3),
        (completion({"name": "f"}), -3),
        (completion(F).replace("\n</tool_call>", "\n\n" + json.dumps(F) + "\n</tool_call>"), -3),
        (completion(f(a="1")) + "\n" + block(F), 0.75),
        (completion(F) + "\n" + block(f()), 3),
        (RESPONSE, -3),
        ("", -3),
    ],
)
def test_measured_correctness(text, expected, reference):
    assert score(text, reward=Correctness(reference=reference)) == pytest.approx(expected)


def test_a_boolean_equals_its_number_as_in_the_published_code():
    assert score(completion(f(a="1", b=True)), completion(f(a="1", b=1))) == 3
    assert score(completion(f(a="1", b="2"))) == 1.5


def test_order_of_calls_does_not_matter():
    assert score(completion(G, F), completion(F, G)) == pytest.approx(3)


def test_greedy_matching_uses_each_call_once():
    # Names 1/1; the first gold call takes the exact one, the second is left with one wrong value: 1 + 3 + 2 of 7.
    assert score(completion(F, f(a="1", b=5)), completion(F, f(a="1", b=9))) == pytest.approx(-3 + 6 * 6 / 7)


@pytest.mark.parametrize("answer", [RESPONSE, NEITHER, "plain text"])
@pytest.mark.parametrize("text", [GOLD, RESPONSE, "", "<tool_call>"])
def test_no_correctness_signal_without_gold_call(text, answer):
    assert score(text, answer) == 0


@pytest.mark.parametrize(
    "text, scores",
    [
        # partial, refined, intermediate, refined_intermediate, coarse
        (completion(F, G), (3, 3, 3, 3, 3)),
        (completion(G, F), (3, -3 + 6 * 5 / 6, 3, -3 + 6 * 2 / 3, -3)),
        (completion(F), (-3 + 6 * 3.5 / 6, -3 + 6 * 3 / 6, -3 + 6 * 1.5 / 3, -3 + 6 * 1 / 3, -3)),
        (completion(F, f()), (-3 + 6 * (1 / 3 + 3) / 6, -3 + 6 * 3 / 6, -3 + 6 * (1 / 3 + 1) / 3, -3 + 6 * 1 / 3, -3)),
        (
            completion(f(a="1", b=2, c=3), G),
            (-3 + 6 * (1 + 2 / 3 + 2 + 2) / 6, -3 + 6 * 5 / 6, -3 + 6 * 2 / 3, -3 + 6 * 2 / 3, -3),
        ),
        (
            completion(f(b=2, a="0"), G),
            (-3 + 6 * (1 + 2 + 2) / 6, -3 + 6 * (1 + 1 + 2) / 6, -3 + 6 * 2 / 3, -3 + 6 * 2 / 3, -3),
        ),
        (completion({**F, "id": 7}, G), (3, 3, -3 + 6 * 2 / 3, -3 + 6 * 2 / 3, -3)),
        (completion({"name": "f"}, G), (-3, -3, -3 + 6 * 2 / 3, -3 + 6 * 2 / 3, -3)),
    ],
)
def test_published_variants_of_matching(text, scores):
    for match, expected in zip(MATCHES, scores, strict=True):
        assert score(text, completion(F, G), Correctness(match=match)) == pytest.approx(expected), match


def test_a_name_that_is_no_text_in_the_published_refined_reward():
    """`REFINEDREWARD` compares lists of names; without it the published code fails on a list as a name."""
    for name in ([], ["f"], {"f": 1}):
        text = completion({"name": name, "parameters": {"a": "1", "b": 2}}, F)
        for match in MATCHES:
            refined = match.startswith("refined")
            published = -3 + 6 * ((1 / 2) if match.endswith("intermediate") else (3 / 4)) if refined else -3
            assert score(text, reward=Correctness(match=match, reference=True)) == pytest.approx(published), match
            assert score(text, reward=Correctness(match=match)) == -3, match


@pytest.mark.parametrize("match", MATCHES)
def test_correctness_between_minus_one_and_one(match):
    for text in (completion(F), completion(f()), completion(F, F), ""):
        expected = score(text, reward=Correctness(match=match)) / 3
        assert score(text, reward=Correctness(match=match, max_score=1)) == pytest.approx(expected)


# Known defects of the published code


@pytest.mark.parametrize(
    "text, expected, published",
    [
        (completion(F, think="the <tool_call> tag"), 3, -3),
        (completion(F, think=f"<think> {block(f())}"), 3, -1.5),
        (f"<think> {block(F)} </think>", -3, 3),
        (f"<think> {block(F)} </think>\n<response> hello </response>", -3, 3),
        (f"<think> a </think> or {block(F)} </think>\n{block(f())}", -1.5, 3),
        (f"</tool_call>\n<tool_call>\n{json.dumps(F)}", -3, 3),
        (completion({"name": "f", "parameters": {"a": "<tool_call>", "b": 2}}), 1.5, -3),
        (block(F), 3, 3),
        (f"<think> not closed {block(F)}", 3, 3),
    ],
)
def test_only_what_follows_the_thoughts_counts(text, expected, published):
    assert score(text) == pytest.approx(expected)
    assert score(text, reward=Correctness(reference=True)) == pytest.approx(published)


def test_gold_texts_on_which_the_published_code_raises():
    blank_line = completion(F).replace("\n</tool_call>", "\n\n" + json.dumps(G) + "\n</tool_call>")
    assert score(completion(F, G), blank_line) == 3
    mention = "<think> why </think>\n<response> the <tool_call> tag </response>"
    assert score(completion(F), mention) == 0
    assert score(RESPONSE, mention, format) == 1
    assert score(mention, mention, format) == 1


@pytest.mark.parametrize(
    "text, answer",
    [
        (f"<think> a </think> junk </think>\n{block(F)}", GOLD),
        (f"<think> a </think>\n{block(F)} </think>\n<response> b </response>", RESPONSE),
        (f"<think> a </think> {block(F)} </think>", NEITHER),
        (f"<think> <think> a </think>\n{block(F)}", GOLD),
        (completion(F).replace("\n</tool_call>", "\n<response> b </response>\n</tool_call>"), GOLD),
    ],
)
def test_junk_between_tags_is_no_format(text, answer):
    assert score(text, answer, format) == 0
    assert score(text, answer, Format(reference=True)) == 1


# Format


def test_format_wants_the_structure_of_the_ground_truth():
    golds = [GOLD, RESPONSE, BOTH, NEITHER]
    for answer in golds:
        assert [score(text, answer, format) for text in golds] == [float(text == answer) for text in golds]


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    "text, answer, expected",
    [
        (f"\n {GOLD}\n", GOLD, 1),
        (GOLD.replace(json.dumps(F), "not a call"), GOLD, 1),
        (GOLD.replace("\n<tool_call>", "<tool_call>"), GOLD, 0),
        (GOLD.replace("\n<tool_call>", "\n\n<tool_call>"), GOLD, 0),
        (GOLD.replace("<tool_call>\n", "<tool_call>"), GOLD, 0),
        ("<think> a </think>\n<tool_call>\n</tool_call>", GOLD, 0),
        ("<think> a </think>\n<tool_call>\n\n</tool_call>", GOLD, 1),
        ("a" + GOLD, GOLD, 0),
        (GOLD + "a", GOLD, 0),
        (block(F), GOLD, 0),
        (GOLD + "\n" + block(F), GOLD, 0),
        (completion(F, think="the <tool_call> tag"), GOLD, 0),
        (completion(F, think="a </response> tag"), GOLD, 1),
        (BOTH.replace("</tool_call>\n", "</tool_call>\n\n"), BOTH, 0),
        (f"<think> a </think>\n<response> b </response>\n{block(F)}", BOTH, 0),
        ("<think></think>", NEITHER, 1),
        ("<think>", NEITHER, 0),
        ("", NEITHER, 0),
    ],
)
def test_format(text, answer, expected, reference):
    assert score(text, answer, Format(reference=reference)) == expected


# Length


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"<think>{' a' * 256} </think>", 0.5),
        (f"<think>{' a' * 3} </think>", 0.01),
        (f"<think>{' a' * 2} </think>", 0.0),
        (f"<think>{' a' * 5000}</think>", 1.0),
        (f"<think>{' a' * 512}", 0.0),
        (f"{' a' * 512}</think>", 0.0),
        (f"<think>{' a' * 512}</think><think>{' a' * 128}</think>", 0.25),
    ],
)
def test_length(text, expected):
    assert length(prompts=["p"], completions=[text]) == [expected]
    assert length(prompts=["p"], completions=[[{"role": "assistant", "content": text}]]) == [expected]


# Settings


def test_schedules_follow_the_trainers_step():
    def at(step):
        return {"trainer_state": SimpleNamespace(global_step=step)}

    # ToolRL calls the first generation batch 1; TRL's step is then 0, and 4 at the second batch of 4 optimizer steps.
    words = f"<think>{' a' * 512}</think>"
    schedule = Length(max_words=384, final_max_words=640, schedule_steps=105)
    assert [score(words, reward=schedule, **at(step)) for step in (0, 51, 104, 500)] == [1.0, 1.0, 0.8, 0.8]
    assert score(f"<think>{' a' * 384}</think>", reward=schedule) == 1.0, "the start value without a trainer"
    half = Length(max_words=400, final_max_words=600, schedule_steps=10)
    assert score(f"<think>{' a' * 250}</think>", reward=half, **at(4)) == 0.5
    for batch in range(1, 106):
        published = round(400 / ((640 - 384) * batch / 105 + 384), 2)
        in_steps = Length(max_words=384, final_max_words=640, schedule_steps=420, steps_per_batch=4)
        assert score(f"<think>{' a' * 400}</think>", reward=in_steps, **at(4 * (batch - 1))) == min(published, 1)

    step = Correctness(max_score=1, final_max_score=3, schedule_steps=30, schedule="step")
    assert [score(GOLD, reward=step, **at(n)) for n in (0, 28, 29, 30)] == [1, 1, 3, 3]
    assert [score("", reward=step, **at(n)) for n in (0, 29)] == [-1, -3]
    step = Correctness(max_score=1, final_max_score=3, schedule_steps=120, schedule="step", steps_per_batch=4)
    assert [score(GOLD, reward=step, **at(n)) for n in (0, 112, 116, 120)] == [1, 1, 3, 3]
    linear = Correctness(max_score=2, final_max_score=3, schedule_steps=150)
    assert [score(GOLD, reward=linear, **at(n)) for n in (74, 149, 150)] == [2.5, 3, 3]
    assert score(GOLD, reward=linear, **at(0)) == pytest.approx(2 + 1 / 150)
    halved = Format(max_score=1, final_max_score=0.5, schedule_steps=30, schedule="step")
    assert [score(GOLD, reward=halved, **at(n)) for n in (28, 29)] == [1, 0.5]


def test_published_schedules_as_they_ran():
    """In the released code the step never reaches the rewards: each schedule stays at its value for step 0."""
    assert score(f"<think>{' a' * 192}</think>", reward=Length(max_words=384)) == 0.5
    assert [score(text, reward=Correctness(max_score=2)) for text in (GOLD, "")] == [2, -2]
    assert [score(text, reward=Format(min_score=-2, max_score=2)) for text in (GOLD, "")] == [2, -2]
    third = Correctness(max_score=0.3333333333333333)
    assert [score(text, reward=third) for text in (GOLD, "")] == [1 / 3, -1 / 3]


@pytest.mark.parametrize(
    "builder, kwargs, field",
    [
        (Length, {"max_words": 0}, "max_words"),
        (Length, {"max_words": "512"}, "max_words"),
        (Length, {"max_words": True}, "max_words"),
        (Length, {"max_words": math.nan}, "max_words"),
        (Length, {"max_words": 10**400}, "max_words"),
        (Length, {"final_max_words": -1, "schedule_steps": 2}, "final_max_words"),
        (Length, {"final_max_words": 640}, "schedule_steps"),
        (Length, {"schedule_steps": 105}, "schedule_steps"),
        (Length, {"final_max_words": 640, "schedule_steps": 0}, "schedule_steps"),
        (Length, {"final_max_words": 640, "schedule_steps": 1.5}, "schedule_steps"),
        (Length, {"name": ""}, "name"),
        (Correctness, {"match": "strict"}, "match"),
        (Correctness, {"match": ["coarse"]}, "match"),
        (Correctness, {"max_score": math.inf}, "max_score"),
        (Correctness, {"schedule": "cosine"}, "schedule"),
        (Correctness, {"reference": "yes"}, "reference"),
        (Correctness, {"steps_per_batch": 0}, "steps_per_batch"),
        (Length, {"steps_per_batch": True}, "steps_per_batch"),
        (Format, {"max_score": -1}, "max_score"),
        (Format, {"min_score": 1}, "min_score"),
        (Format, {"min_score": -math.inf}, "min_score"),
        (Format, {"min_score": "low"}, "min_score"),
        (Format, {"min_score": 0.7, "final_max_score": 0.5, "schedule_steps": 3}, "min_score"),
        (Format, {"reference": 1}, "reference"),
    ],
)
def test_a_wrong_setting_is_named(builder, kwargs, field):
    with pytest.raises(ValueError, match=f"{builder.__name__} reward: `{field}` is"):
        builder(**kwargs)


def test_recipes_build_the_rewards():
    reward = resolve_reward("length", {"max_words": 256})
    assert reward == Length(max_words=256)
    short = resolve_reward("short", {"type": "length", "max_words": 128})
    assert short.__name__ == "short"
    assert short(prompts=["p"], completions=[f"<think>{' a' * 64}</think>"]) == [0.5]
    with pytest.raises(ValueError, match="max_word"):
        resolve_reward("length", {"max_word": 256})


@pytest.mark.parametrize("reward", [correctness, format, length, Correctness(match="coarse"), Format(), Length()])
def test_rewards_are_named_picklable_and_not_async(reward):
    restored = pickle.loads(pickle.dumps(reward))
    assert restored == reward
    assert restored.__name__ in ("correctness", "format", "length")
    assert not inspect.iscoroutinefunction(reward.__call__)


def test_names_can_be_told_apart():
    assert Length(max_words=64, name="short").__name__ == "short"


# The answer column


@pytest.mark.parametrize("reward", [correctness, format, Correctness(), Format()])
def test_answer_column(reward):
    assert inspect.signature(reward).parameters["answer"].default is inspect.Parameter.empty
    with pytest.raises(ValueError, match=r"column `answer`.*rename"):
        reward(prompts=["p"], completions=[GOLD])
    with pytest.raises(ValueError, match="1 values of `answer` for 2 completions"):
        reward(prompts=["p", "p"], completions=[GOLD, GOLD], answer=[GOLD])


@pytest.mark.parametrize("answer", [None, 3, {"name": "f"}, "<tool_call>\nf(1)\n</tool_call>", "<response> a"])
@pytest.mark.parametrize("reward", [correctness, format])
def test_a_row_without_readable_ground_truth_is_unscored(reward, answer):
    assert reward(prompts=["p"] * 2, completions=[GOLD] * 2, answer=[answer, GOLD]) == [
        None,
        reward(["p"], [GOLD], [GOLD])[0],
    ]


# Hostile completions

ALL = [
    *(Correctness(match=match, reference=reference) for match in MATCHES for reference in (False, True)),
    Format(),
    Format(reference=True),
    Length(),
]
LOW = {"correctness": -3, "format": 0, "length": 0}
HIGH = {"correctness": 3, "format": 1, "length": 1}


ANSWERS = (GOLD, RESPONSE, BOTH, NEITHER, completion(F, G, F))


def check_all(completions, answers=ANSWERS):
    for answer in answers:
        for reward in ALL:
            values = reward(
                prompts=[""] * len(completions), completions=completions, answer=[answer] * len(completions)
            )
            assert len(values) == len(completions)
            for value in values:
                assert type(value) is float and LOW[reward.__name__] <= value <= HIGH[reward.__name__]


fragments = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "\n", " ", "a", '"', "\\"),
    *("</think>\n<tool_call>\n", "\n</tool_call>", "[" * 200, "9" * 5000, "\ud800", "\x00", "\u2028", "\ufeff"),
    *(json.dumps(call) for call in (F, G, f(), {"name": "f"}, {"name": []}, {"name": 1, "parameters": {}}, 1, [])),
    '{"name": "f", "name": "g", "parameters": {"a": NaN, "b": -Infinity, "b": 1e999}}',
    '{"name": "f", "parameters": {"a": "\\ud800", "b": {"a": [[{}]]}}}',
]


@given(st.lists(st.lists(st.sampled_from(fragments), max_size=20).map("".join), max_size=3))
def test_any_text_scores_in_range(completions):
    check_all(completions)


@given(st.lists(st.text(), max_size=3))
def test_any_body_scores_in_range(bodies):
    check_all([f"<think> a </think>\n<tool_call>\n{body}\n</tool_call>" for body in bodies])


def test_no_completion_is_odd_enough_to_raise():
    check_all([None, 3, [], [None], [{}], [{"role": "assistant"}], [{"role": "assistant", "content": [1]}], {"a": 1}])


HOSTILE_BODIES = {
    "nested arrays": "[" * 10_000,
    "nested objects": '{"a":' * 10_000,
    "nested value": '{"name": "f", "parameters": {"a": ' + "[" * 10_000 + "]" * 10_000 + "}}",
    "huge integer": '{"name": "f", "parameters": {"b": ' + "9" * 100_000 + "}}",
    "huge exponent": '{"name": "f", "parameters": {"b": 1e' + "9" * 100_000 + "}}",
    "many calls": "\n".join([json.dumps(F)] * 20_000),
    "many small calls": "\n".join(['{"name":"f","parameters":{}}'] * 20_000),
    "colliding numbers for names": "\n".join(f'{{"name": {k * (2**61 - 1)}}}' for k in range(20_000)),
    "many parameters": json.dumps(f(**{f"p{k}": k for k in range(50_000)})),
    "many opening tags": "<tool_call>" * 100_000,
    "many blocks": block(F) * 10_000,
    "many think tags": "<think></think>" * 100_000,
    "alternating": "</think>\n<tool_call>\n" * 50_000,
    "blank lines": "\n" * 1_000_000,
    "open string": '"' + "\\" * 500_001,
    "brackets in a string": json.dumps({"name": "f", "parameters": {"a": "[{" * 100_000}}),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_large_hostile_completions(name):
    body = HOSTILE_BODIES[name]
    check_all([f"<think> a </think>\n<tool_call>\n{body}\n</tool_call>"], answers=ANSWERS[-1:])
    assert all(math.isfinite(value) for value in length([""], [body]))


def test_a_call_among_too_many_is_not_found():
    wrong = [f()] * MAX_CANDIDATES
    assert score(completion(F, *wrong)) > score(completion(*wrong, F))


# Properties

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
calls = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["f", "g", "h"]),
        "parameters": st.dictionaries(st.sampled_from(["a", "b", "c"]), scalars | st.lists(scalars, max_size=2)),
    }
)


@given(st.lists(calls, min_size=1, max_size=4), st.data())
def test_the_gold_calls_in_any_order_score_best(gold, data):
    answer = completion(*gold)
    assert score(completion(*data.draw(st.permutations(gold))), answer) == pytest.approx(3)
    assert score(answer, answer, format) == 1


@given(st.lists(calls, min_size=1, max_size=4), st.lists(calls, min_size=1, max_size=4), st.data())
def test_correctness_does_not_depend_on_the_order_of_keys(gold, predicted, data):
    shuffled = [
        {**call, "parameters": dict(data.draw(st.permutations(list(call["parameters"].items()))))}
        for call in predicted
    ]
    answer = completion(*gold)
    assert score(completion(*shuffled), answer) == score(completion(*predicted), answer)


@given(st.lists(calls, min_size=1, max_size=4), calls)
def test_a_call_too_many_costs(gold, extra):
    assert score(completion(*gold, extra), completion(*gold)) < 3
