"""What the policy wrote in a completion: one reading for every reward."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import byte_tokenizer

from gd2po_trl.messages import completion_text, text_of, written_text, written_texts
from gd2po_trl.reward_models.conversation import ConversationEncoder, render
from gd2po_trl.reward_models.text_scorer import fit_text_scorer


CALL = {"type": "function", "function": {"name": "f", "arguments": {"q": "thanks"}}}
TOOL = {"role": "tool", "name": "f", "content": "thanks sure gladly"}


def says(content, role="assistant", **fields):
    return {"role": role, "content": content, **fields}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


# A completion, and what the policy wrote in it.
COMPLETIONS = [
    ("no", "no"),
    ([says("no")], "no"),
    ([says(parts("n", "o"))], "no"),
    ([says([{"type": "image", "image": "i.png"}, *parts("no")])], "no"),
    ([says(["n", "o"])], "no"),
    ([says("no", tool_calls=[CALL]), TOOL, says("")], "no"),
    ([says(None, tool_calls=[CALL]), TOOL, says("no")], "no"),
    ([says("let me", tool_calls=[CALL]), says(parts("thanks"), "tool"), says("see")], "let me\nsee"),
    ([says("no"), says("really?", "user")], "no"),
    ([{"content": "no"}], "no"),
    ([says(None, tool_calls=[CALL])], ""),
    ([], ""),
]


@pytest.mark.parametrize(("completion", "text"), COMPLETIONS)
def test_tools_are_left_out_and_parts_become_text(completion, text):
    assert written_text(completion) == text
    assert render("q", completion, "{prompt} => {response}", "") == f"q => {text}"
    assert render("q", completion, "beaver", "</s>") == f"BEGINNING OF CONVERSATION: USER: q ASSISTANT:{text}"
    assert completion_text(completion) == (written_texts(completion) or [""])[-1]


@pytest.mark.parametrize("template", ["chat", "beaver", "{prompt} => {response}"])
def test_reward_models_read_the_same(template):
    encoder = ConversationEncoder(byte_tokenizer(), template, 512, "left")
    prompt = [{"role": "user", "content": "q"}]
    completions, texts = zip(*COMPLETIONS, strict=True)
    messages = [[says(text)] for text in texts]
    assert encoder([prompt] * len(texts), completions) == encoder([prompt] * len(texts), messages)


def test_text_scorers_read_the_same(tmp_path):
    pairs = {
        "prompt": [f"q{row}" for row in range(60)],
        "chosen": [f"thanks sure gladly item{row % 7}" for row in range(60)],
        "rejected": [f"no never refuse item{row % 5}" for row in range(60)],
        "chosen_side": [row % 2 for row in range(60)],
    }
    scorer = fit_text_scorer(pairs, tmp_path / "scorer")
    completions, texts = zip(*COMPLETIONS, strict=True)
    assert scorer([""] * len(texts), completions) == scorer([""] * len(texts), texts)
    assert scorer([""], ["no"])[0] < 0 < scorer([""], ["thanks"])[0]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "content", "text", "type"]), inner),
    max_leaves=12,
)


@given(anything)
def test_nothing_breaks_the_reading(completion):
    assert isinstance(written_text(completion), str)
    assert isinstance(completion_text([completion, says(completion)]), str)
    assert isinstance(text_of({"content": completion}), str)
