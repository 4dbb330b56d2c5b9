"""Data sets of the helpfulness-safety task: real files, and small files in the Hub's schemas."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import datasets
import pytest
from dataset_files import texts, user, write
from hypothesis import given
from hypothesis import strategies as st
from trl import is_conversational

from gd2po_trl.datasets import load_dataset_by_name
from gd2po_trl.errors import UsageError
from gd2po_trl.tasks.safe_alignment import data as safe_alignment
from gd2po_trl.tasks.safe_alignment.data import HARM_CATEGORIES, as_messages, shared_prompt


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "split", "read", "duplicates"),
    [("alpaca", "test", 512, 0), ("hh_rlhf", "test", 8520, 3), ("pku_saferlhf", "test", 8211, 716)],
)
def test_real_processed_prompts(name, split, read, duplicates, shared_dir):
    folder = str(shared_dir / "data/safe_alignment")
    dataset = load_dataset_by_name(name, folder, split=split)
    assert len(dataset) == read - duplicates
    assert f"of {read:,} rows kept" in dataset.info.description
    assert (f"{duplicates} duplicates" if duplicates else "none dropped") in dataset.info.description
    assert len(load_dataset_by_name(name, folder, split=split, drop_duplicates=False)) == read
    for prompt in dataset["prompt"]:
        roles = [message["role"] for message in prompt]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert all(message["content"].strip() for message in prompt)
    if name == "hh_rlhf":
        assert max(map(len, dataset["prompt"])) > 11


def test_alpaca_hub_schema(tmp_path):
    rows = [
        {"instruction": "Sum up.", "input": "A long text.", "output": "o", "text": "t"},
        {"instruction": "Say hi.\n\nHuman: hi", "input": "", "output": "o", "text": "t"},
        {"instruction": "Sum up.", "input": "A long text.", "output": "other", "text": "t"},
        {"instruction": " ", "input": "", "output": "o", "text": "t"},
    ]
    dataset = load_dataset_by_name("alpaca", write(tmp_path / "train.parquet", rows))
    assert dataset["prompt"] == [user("Sum up.\n\nA long text."), user("Say hi.\n\nHuman: hi")]
    assert set(dataset.column_names) == {"prompt", "instruction", "input", "output", "text"}
    assert "2 of 4 rows kept (1 with an empty prompt, 1 duplicates)" in dataset.info.description
    with pytest.raises(UsageError, match="no column 'instruction'"):
        load_dataset_by_name("alpaca", write(tmp_path / "other.json", [{"question": "x"}]))


def test_published_alpaca_split(tmp_path, shared_dir, monkeypatch):
    """The Hub's copy holds all 52,002 prompts in one split; their hashes tell the published 512 test prompts apart."""
    folder = shared_dir / "data/safe_alignment"
    test, train = (
        texts(load_dataset_by_name("alpaca", str(folder), split=name, drop_duplicates=False))
        for name in ("test", "train")
    )
    assert (len(test), len(train)) == (512, 51490)
    rows = [{"instruction": text.replace(" ", "  ", 1) + " ", "input": ""} for text in [*train[:300], *test]]
    hub = write(tmp_path / "all.parquet", rows)
    assert len(load_dataset_by_name("alpaca", hub)) == 300
    assert len(load_dataset_by_name("alpaca", hub, drop_test_prompts=False)) == 812
    assert len(load_dataset_by_name("alpaca", hub, "test")) == 812  # a local file of that name is what it says
    monkeypatch.setattr(safe_alignment, "ALPACA", replace(safe_alignment.ALPACA, default_path=hub))
    kept = load_dataset_by_name("alpaca")
    assert len(kept) == 300 and "512 of the published test split" in kept.info.description
    tested = load_dataset_by_name("alpaca", split="test")
    assert [" ".join(text.split()) for text in texts(tested)] == [" ".join(text.split()) for text in test]
    assert "300 of the training split" in tested.info.description
    with pytest.raises(UsageError, match="cannot be sliced"):
        load_dataset_by_name("alpaca", split="test[:5]")


def test_prompts_that_occur_once(shared_dir, tmp_path):
    """What the published `mean@1` averages."""
    folder = str(shared_dir / "data/safe_alignment")
    for name, rows in (("alpaca", 512), ("hh_rlhf", 8514), ("pku_saferlhf", 6982)):
        assert len(load_dataset_by_name(name, folder, split="test", drop_duplicates="all")) == rows
    path = write(tmp_path / "rows.jsonl", [{"prompt": text} for text in ("a", "b", "a", "", "")])
    once = load_dataset_by_name("pku_saferlhf", path, drop_duplicates="all")
    assert texts(once) == ["b"]
    assert "1 of 5 rows kept (2 with an empty prompt, 2 duplicates)" in once.info.description
    with pytest.raises(UsageError, match="drop_duplicates must be"):
        load_dataset_by_name("pku_saferlhf", path, drop_duplicates="first")


def beavertails_row(prompt: str, *categories: str) -> dict:
    return {
        "prompt": prompt,
        "response": "r",
        "category": {name: name in categories for name in HARM_CATEGORIES},
        "is_safe": not categories,
    }


def test_beavertails_filters(tmp_path):
    rows = [
        beavertails_row("a"),
        beavertails_row("a", "animal_abuse"),
        beavertails_row("b", "self_harm", "privacy_violation"),
        beavertails_row("b", "self_harm"),
        beavertails_row("c"),
    ]
    path = write(tmp_path / "330k_train.parquet", rows)

    def load(**kwargs):
        return texts(load_dataset_by_name("beavertails", path, **kwargs))

    assert load() == texts(load_dataset_by_name("beavertails", str(tmp_path))) == ["a", "b", "c"]
    assert load(drop_duplicates=False) == ["a", "a", "b", "b", "c"]
    assert load(is_safe=True) == ["a", "c"]
    assert load(is_safe=False) == ["a", "b"]
    assert load(categories=["animal_abuse", "privacy_violation"]) == ["a", "b"]
    assert load(categories="privacy_violation", is_safe=False) == ["b"]
    description = load_dataset_by_name("beavertails", path, is_safe=False).info.description
    assert "2 of 5 rows kept (2 filtered out, 1 duplicates)" in description
    with pytest.raises(UsageError, match="no row is left"):
        load(categories=["child_abuse"])
    with pytest.raises(UsageError, match="unknown category 'self_ham'; did you mean 'self_harm'"):
        load(categories=["self_ham"])
    with pytest.raises(UsageError, match="is_safe must be"):
        load(is_safe="no")


def test_filter_needs_its_column(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    with pytest.raises(UsageError, match="no column 'is_safe'"):
        load_dataset_by_name("beavertails", path, is_safe=False)


def test_beavertails_evaluation_real(shared_dir):
    folder = str(shared_dir / "data/beavertails")
    dataset = load_dataset_by_name("beavertails_evaluation", folder)
    assert Counter(dataset["category"]) == dict.fromkeys(HARM_CATEGORIES, 50)
    assert all(is_conversational(row) for row in dataset)
    some = load_dataset_by_name("beavertails_evaluation", folder, categories=["self_harm"])
    assert set(some["category"]) == {"self_harm"} and len(some) == 50


def pku_row(prompt: str, better: int, safer: int) -> dict:
    row = {"prompt": prompt, "response_0": f"{prompt} zero", "response_1": f"{prompt} one"}
    return {**row, "better_response_id": better, "safer_response_id": safer}


def test_pku_saferlhf_hub_schema(tmp_path):
    path = write(tmp_path / "train.jsonl", [pku_row("a", 0, 1), pku_row("a", 1, 1), pku_row("b", 1, 0)])
    dataset = load_dataset_by_name("pku_saferlhf", path)
    assert texts(dataset) == ["a", "b"]
    assert dataset["safer_response_id"] == [1, 0]
    helpful = load_dataset_by_name("pku_saferlhf_pairs", path)
    assert (helpful["chosen"][0], helpful["rejected"][0]) == ("a zero", "a one")
    harmless = load_dataset_by_name("pku_saferlhf_pairs", path, dimension="harmless")
    # The first two rows are the same pair once safety decides.
    assert harmless["chosen"] == ["a one", "b zero"]
    assert harmless.column_names == ["prompt", "chosen", "rejected", "chosen_side"]
    with pytest.raises(UsageError, match=r"dimension must be one of \('helpful', 'harmless'\), got 'safe'"):
        load_dataset_by_name("pku_saferlhf_pairs", path, dimension="safe")
    bad = write(tmp_path / "bad.jsonl", [pku_row("a", 0, 1), pku_row("a", 2, 1)])
    with pytest.raises(UsageError, match=r"row 1 of .*bad\.jsonl: `better_response_id` must be 0 or 1, got 2"):
        load_dataset_by_name("pku_saferlhf_pairs", bad)


HH_ROWS = [
    {  # the ordinary case: only the last answer differs
        "chosen": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: because",
        "rejected": "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: why?\n\nAssistant: so",
    },
    {  # the transcripts part earlier than the last answer
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d",
    },
    {  # an empty answer, a quoted turn, a blank line inside a message, two assistant turns in a row
        "chosen": "\n\nHuman: one\n\ntwo. Human: quoted\n\nAssistant:\n\nAssistant: e\n\nHuman: f\n\nAssistant: g",
        "rejected": "\n\nHuman: one\n\ntwo. Human: quoted\n\nAssistant:\n\nAssistant: e\n\nHuman: f\n\nAssistant: ",
    },
    {"chosen": "\n\nAssistant: nobody asked", "rejected": "\n\nAssistant: nobody did"},
    {"chosen": "\n\nHuman: tie\n\nAssistant: same", "rejected": "\n\nHuman: tie\n\nAssistant: same"},
]


@pytest.mark.parametrize("file", ["train.jsonl.gz", "train.parquet"])
def test_hh_rlhf_hub_schema(file, tmp_path):
    path = write(tmp_path / file, HH_ROWS)
    dataset = load_dataset_by_name("hh_rlhf", path)
    assert dataset.column_names == ["prompt"]
    turns = [[message["content"] for message in prompt] for prompt in dataset["prompt"]]
    assert turns == [["hi", "hello", "why?"], ["a"], ["one\n\ntwo. Human: quoted", "e", "f"], ["tie"]]
    assert "4 of 5 rows kept (1 with an empty prompt)" in dataset.info.description
    pairs = load_dataset_by_name("hh_rlhf_pairs", path)
    assert pairs.remove_columns("chosen_side").to_list() == [
        {"prompt": "why?", "chosen": "because", "rejected": "so"},
    ]
    assert "1 of 5 rows kept (3 without two answers to one prompt, 1 ties)" in pairs.info.description


@pytest.mark.parametrize("columns", [("chosen",), ("chosen", "rejected")])
def test_hh_rlhf_with_windows_line_ends(columns, tmp_path):
    rows = [{column: HH_ROWS[0][column].replace("\n", "\r\n") for column in columns}]
    dataset = load_dataset_by_name("hh_rlhf", write(tmp_path / "train.jsonl", rows))
    assert [message["content"] for message in dataset["prompt"][0]] == ["hi", "hello", "why?"]


def test_alpaca_with_numbers(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text("instruction,input\n1,2\n007,\n")
    assert texts(load_dataset_by_name("alpaca", str(path))) == ["1\n\n2", "007"]


def test_hh_rlhf_real_pairs(shared_dir):
    folder = str(shared_dir / "data/hh_rlhf")
    for dimension, count in (("harmless", 2281), ("helpful", 2330)):
        pairs = load_dataset_by_name("hh_rlhf_pairs", folder, split="test", dimension=dimension)
        assert len(pairs) == count
        assert abs(sum(pairs["chosen_side"]) / count - 0.5) < 0.05
    with pytest.raises(UsageError, match="says 'harmless', but dimension is 'helpful'"):
        load_dataset_by_name("hh_rlhf_pairs", f"{folder}/hh_rlhf_harmless_test.json", dimension="helpful")
    with pytest.raises(UsageError, match="several files"):
        load_dataset_by_name("hh_rlhf_pairs", folder, split="test")


def test_side_tells_nothing_about_the_label(tmp_path):
    rows = [pku_row(str(number), better=0, safer=1) for number in range(200)]
    path = write(tmp_path / "train.jsonl", rows)
    first = load_dataset_by_name("pku_saferlhf_pairs", path, dimension="helpful")["chosen_side"]
    swapped = load_dataset_by_name("pku_saferlhf_pairs", path, dimension="harmless")["chosen_side"]
    # The same response stands on the same side whichever of the two is preferred.
    assert [1 - side for side in first] == swapped[:]
    assert 60 < sum(first) < 140


# Transcripts

# No blank line and no turn marker, which would make another message of it; no space at the ends, which is stripped.
SAY = st.text(min_size=1, max_size=20).map(str.strip).filter(lambda text: text and "\n\n" not in text)


@given(st.lists(SAY, min_size=1, max_size=7))
def test_transcript_round_trip(contents):
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": content} for index, content in enumerate(contents)
    ]
    names = {"user": "Human", "assistant": "Assistant"}
    transcript = "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)
    assert as_messages(transcript) == messages
    assert as_messages(transcript.removeprefix("\n\n")) == messages


@given(
    st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", " ", "x", "\n", "Human: ", "\n\n"])), st.integers(0, 9)
)
def test_any_transcript_gives_well_formed_messages(parts, cut):
    messages = as_messages("".join(parts))
    roles = [message["role"] for message in messages]
    assert all(first != second for first, second in pairwise(roles))
    assert all(message["content"].strip() for message in messages)
    prompt = shared_prompt(messages, as_messages("".join(parts[:cut])))
    assert prompt == messages[: len(prompt)]
    assert not prompt or prompt[-1]["role"] == "user"
