"""Prompts that are too long for the policy: dropped, or shortened from the left."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gd2po_trl.datasets import drop_long_prompts, truncate_prompts_left
from gd2po_trl.datasets.prompts import count_prompt_tokens
from gd2po_trl.errors import UsageError


# Two tokens per message and two for the generation prompt.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} end {% endfor %}"
    "{% if add_generation_prompt %}assistant go{% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]")
    tokenizer.chat_template = chat_template
    return tokenizer


TOKENIZER = make_tokenizer()


def words(count: int, word: str = "w") -> str:
    return " ".join(f"{word}{index}" for index in range(count))


def conversation(*turns: tuple[str, int]) -> list[dict]:
    return [{"role": role, "content": words(count)} for role, count in turns]


def test_count_includes_template_and_generation_prompt():
    prompts = [conversation(("user", 3)), conversation(("system", 1), ("user", 2))]
    assert count_prompt_tokens(prompts, TOKENIZER) == [7, 9]
    ids = TOKENIZER.apply_chat_template(prompts[1], add_generation_prompt=True, tokenize=True, return_dict=True)
    assert len(ids["input_ids"]) == 9
    assert count_prompt_tokens(["a b", "c"], TOKENIZER) == [2, 1]


def test_drop_long_prompts():
    dataset = Dataset.from_dict(
        {"prompt": [conversation(("user", count)) for count in (3, 9, 5)], "answer": [1, 2, 3]}
    )
    kept, dropped = drop_long_prompts(dataset, TOKENIZER, 9)
    assert (kept["answer"], dropped) == ([1, 3], 1)
    assert drop_long_prompts(dataset, TOKENIZER, 13)[1] == 0
    with pytest.raises(UsageError, match=r"none of the 3 prompts has at most 5 tokens \(the shortest has 7\)"):
        drop_long_prompts(dataset, TOKENIZER, 5)


def test_tokenizer_without_chat_template():
    tokenizer = make_tokenizer(chat_template=None)
    with pytest.raises(UsageError, match="no chat template"):
        drop_long_prompts(Dataset.from_dict({"prompt": [conversation(("user", 3))]}), tokenizer, 9)
    kept, dropped = drop_long_prompts(Dataset.from_dict({"prompt": ["a b c", "a"]}), tokenizer, 2)
    assert (kept["prompt"], dropped) == (["a"], 1)


def test_truncation_drops_old_turns_and_keeps_the_system_message():
    prompt = conversation(("system", 2), ("user", 9), ("assistant", 4), ("user", 3))
    dataset = Dataset.from_dict({"prompt": [prompt, prompt[-1:]], "answer": ["a", "b"]})
    shortened, count = truncate_prompts_left(dataset, TOKENIZER, 15)
    assert count == 1
    assert shortened["prompt"] == [[prompt[0], prompt[3]], prompt[-1:]]
    assert shortened["full_prompt"] == dataset["prompt"]
    assert shortened["answer"] == ["a", "b"]


def test_truncation_cuts_the_last_message_only_when_nothing_else_is_left():
    dataset = Dataset.from_dict({"prompt": [conversation(("system", 1), ("user", 4), ("assistant", 1), ("user", 20))]})
    shortened, _ = truncate_prompts_left(dataset, TOKENIZER, 12)
    system, last = shortened["prompt"][0]
    assert system["content"] == "w0"
    assert dataset[0]["prompt"][-1]["content"].endswith(last["content"])
    assert last["content"].split()[1:] == ["w16", "w17", "w18", "w19"]
    with pytest.raises(UsageError, match="prompt 0 cannot be shortened to 7 tokens"):
        truncate_prompts_left(dataset, TOKENIZER, 7)


def test_a_long_system_message_alone_is_named():
    dataset = Dataset.from_dict({"prompt": [conversation(("user", 3)), conversation(("system", 20))]})
    with pytest.raises(UsageError, match="prompt 1 cannot be shortened to 12 tokens: its system message"):
        truncate_prompts_left(dataset, TOKENIZER, 12)


def test_variables_of_the_chat_template_count():
    tokenizer = make_tokenizer(TEMPLATE + "{% if date_string is defined %} {{ date_string }}{% endif %}")
    prompts = [conversation(("user", 3)), conversation(("user", 4))]
    variables = {"date_string": "26 Jul 2024"}
    counts = count_prompt_tokens(prompts, tokenizer, variables)
    assert counts == [count + 3 for count in count_prompt_tokens(prompts, tokenizer)] == [10, 11]
    dataset = Dataset.from_dict({"prompt": prompts})
    assert drop_long_prompts(dataset, tokenizer, 10, chat_template_kwargs=variables)[1] == 1
    shortened, count = truncate_prompts_left(dataset, tokenizer, 10, chat_template_kwargs=variables)
    assert count == 1
    assert count_prompt_tokens(shortened["prompt"][:], tokenizer, variables) == [10, 10]


def test_variables_that_the_template_lacks_are_said_once(caplog):
    """`apply_chat_template` ignores them; its own arguments are no variables."""
    tokenizer = make_tokenizer(TEMPLATE + "{% if date_string is defined %} {{ date_string }}{% endif %}")
    variables = {"date_string": "26 Jul 2024", "enable_thinkin": False, "continue_final_message": False}
    for _ in range(2):
        count_prompt_tokens([conversation(("user", 3))], tokenizer, variables)
    said = [record.message for record in caplog.records if "`chat_template_kwargs`" in record.message]
    assert len(said) == 1 and "`enable_thinkin`" in said[0]


def test_plain_prompts_are_cut_from_the_left():
    shortened, count = truncate_prompts_left(Dataset.from_dict({"prompt": [words(9), "a"]}), TOKENIZER, 3)
    assert count == 1
    assert shortened["prompt"][0].split()[1:] == ["w7", "w8"]
    assert shortened["prompt"][1] == "a"


@settings(deadline=None, max_examples=50)
@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=5).filter(lambda counts: len(counts) % 2 == 1),
    with_system=st.booleans(),
    limit=st.integers(8, 40),
)
def test_shortened_prompts_fit_and_end_as_before(counts, with_system, limit):
    turns = [("assistant" if index % 2 else "user", count) for index, count in enumerate(counts)]
    prompt = conversation(*([("system", 1)] if with_system else []), *turns)
    dataset = Dataset.from_dict({"prompt": [prompt]})
    shortened, count = truncate_prompts_left(dataset, TOKENIZER, limit)
    result = shortened["prompt"][0]
    assert count_prompt_tokens([result], TOKENIZER)[0] <= limit
    assert (count == 0) == (result == prompt)
    assert (result[0] == prompt[0]) or not with_system
    assert prompt[-1]["content"].endswith(result[-1]["content"]) and result[-1]["content"]
    assert result[int(with_system)]["role"] == "user"


def parts(*texts: str, image: bool = False) -> list[dict]:
    content = [{"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": ([{"type": "image", "text": None}] if image else []) + content}]


PARTS_TEMPLATE = TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] or 'image pixels' }} {% endfor %}{% endif %}",
)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (parts(words(20)), ["w18 w19"]),
        (parts(words(20), "question"), ["w19", "question"]),
        (parts(words(20), "the question"), ["the question"]),
        (parts(words(20), "a long question"), ["long question"]),
    ],
)
def test_text_in_parts_is_shortened(prompt, expected):
    dataset = Dataset.from_dict({"prompt": [prompt]})
    shortened, count = truncate_prompts_left(dataset, make_tokenizer(PARTS_TEMPLATE), 6)
    (message,) = shortened[0]["prompt"]
    assert count == 1 and shortened[0]["full_prompt"] == prompt
    assert [part["text"].strip() for part in message["content"]] == expected


@pytest.mark.parametrize(
    ("prompt", "blamed", "innocent"),
    [
        (conversation(("user", 5)), ["the chat template alone fills"], ["system", "after the last user"]),
        (conversation(("system", 5), ("user", 5)), ["its system message and the chat template alone"], ["after"]),
        (conversation(("user", 5), ("assistant", 9)), ["the messages after the last user message"], ["system"]),
        (parts(words(20)), ["the chat template alone"], ["system", "parts"]),
        (parts(words(20), image=True), ["its parts that are no text and the chat template alone"], ["system"]),
        (words(9), ["the tokens that the tokenizer adds"], ["system", "chat template"]),
    ],
)
def test_the_error_blames_what_is_there(prompt, blamed, innocent):
    tokenizer = make_tokenizer(PARTS_TEMPLATE)
    with pytest.raises(UsageError) as error:
        truncate_prompts_left(Dataset.from_dict({"prompt": [prompt]}), tokenizer, 0 if isinstance(prompt, str) else 3)
    assert all(word in str(error.value) for word in blamed) and not any(word in str(error.value) for word in innocent)
