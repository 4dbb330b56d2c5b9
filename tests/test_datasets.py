"""Data sets: the registry, where rows come from, own prompts and tool calling; errors name file, row and remedy."""

import csv
import json
from collections import Counter
from datetime import datetime

import datasets
import pytest
from dataset_files import texts, user, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import is_conversational

from gd2po_trl.datasets import DATASETS, check_dataset, load_dataset_by_name
from gd2po_trl.datasets.sources import Source, find_local_files, is_hub_id
from gd2po_trl.errors import UsageError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def no_network(monkeypatch):
    """Fails the test where a load gets as far as `datasets.load_dataset`."""

    def refuse(*args, **kwargs):
        raise AssertionError("load_dataset was called")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


def rlla_row(gold: str, question: str = "Which?") -> dict:
    return {
        "data_source": "rlla",
        "prompt": [{"role": "system", "content": "Tools."}, {"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"ground_truth": gold, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
    }


CALL = '<think> ok </think>\n<tool_call>\n{"name": "f", "parameters": {"a": 1}}\n</tool_call>'


# Registry


def test_registry_describes_every_loader():
    for name, loader in DATASETS.items():
        assert check_dataset(name) is loader
        assert loader.description and "\n" not in loader.description
        assert "prompt" in loader.columns


def test_unknown_name_lists_the_known_ones_and_suggests():
    with pytest.raises(UsageError, match=r"did you mean 'alpaca'.*known: prompts, rlla_4k.*pku_saferlhf_pairs"):
        load_dataset_by_name("alpca")


def test_unknown_option_and_bad_limit(no_network):
    with pytest.raises(UsageError, match=r"takes no 'is_save' .*is_safe, categories"):
        load_dataset_by_name("beavertails", is_save=True)
    for limit in (0, -1, 2.5, True, "3"):
        with pytest.raises(UsageError, match="limit must be a positive"):
            load_dataset_by_name("alpaca", limit=limit)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ["a"]}, r"unknown data set \['a'\]"),
        ({"name": "alpaca", "path": 5}, "path of data set 'alpaca' must be text, got 5"),
        ({"name": "alpaca", "split": 5}, "split of data set 'alpaca' must be text, got 5"),
        ({"name": "alpaca", "seed": "x"}, "seed must be a whole number, got 'x'"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, message, no_network):
    with pytest.raises(UsageError, match=message):
        load_dataset_by_name(**arguments)


def test_limit_and_shuffle(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": str(number)} for number in range(50)])
    assert load_dataset_by_name("prompts", path, limit=3)["prompt"] == ["0", "1", "2"]
    assert len(load_dataset_by_name("prompts", path, limit=500)) == 50
    shuffled = [load_dataset_by_name("prompts", path, shuffle=True, seed=seed)["prompt"][:] for seed in (1, 1, 2)]
    assert shuffled[0] == shuffled[1] != shuffled[2]
    assert sorted(shuffled[0], key=int) == [str(number) for number in range(50)]


# Where rows come from


@pytest.mark.parametrize(
    "path",
    ["nope.parquet", "./nope", "/nope/rows", "data/nope.jsonl.gz", "nope", "here/nope", "a/b/c", "~/nope", r"a\b"],
)
def test_dead_path_is_refused_without_the_hub(path, tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(UsageError, match="alpaca: no such file or folder"):
        load_dataset_by_name("alpaca", path)


def test_hub_ids():
    assert all(is_hub_id(loader.default_path) for loader in DATASETS.values() if loader.default_path)
    assert is_hub_id("a-b.c/d_e.f-1.0")
    assert not is_hub_id("owner/name.jsonl.gz") and not is_hub_id("../name") and not is_hub_id("owner/name/")


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("rlla", {}, {"path": "RamAnanth1/toolrl-rlla4k", "split": "train"}),
        ("alpaca", {"split": "train[:9]"}, {"path": "tatsu-lab/alpaca", "split": "train[:9]"}),
        ("beavertails", {}, {"path": "PKU-Alignment/BeaverTails", "split": "330k_train"}),
        ("beavertails_evaluation", {}, {"path": "PKU-Alignment/BeaverTails-Evaluation", "split": "test"}),
        ("pku_saferlhf", {"path": "me/copy"}, {"path": "me/copy", "split": "train"}),
        (
            "hh_rlhf_pairs",
            {"dimension": "harmless", "split": "test"},
            {"path": "Anthropic/hh-rlhf", "split": "test", "data_dir": "harmless-base"},
        ),
    ],
)
def test_hub_id_is_asked_for_and_its_failure_is_explained(name, kwargs, expected, monkeypatch):
    calls = []

    def fail(**arguments):
        calls.append(arguments)
        raise ConnectionError("cannot reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=f"Hub data set {expected['path']} .*check the id.*: cannot reach the Hub$"):
        load_dataset_by_name(name, **kwargs)
    assert expected.items() <= calls[0].items()
    assert "trust_remote_code" not in calls[0]


@pytest.mark.parametrize("name", ["prompts", "rlla_sft", "api_bank"])
def test_no_path_where_no_hub_id_is_known(name, no_network):
    with pytest.raises(UsageError, match=f"{name}: no path given"):
        load_dataset_by_name(name)


@pytest.mark.parametrize("file", ["rows.parquet", "rows.json", "rows.jsonl", "rows.jsonl.gz"])
def test_formats(file, tmp_path):
    path = write(tmp_path / file, [{"prompt": "a", "hint": 1}, {"prompt": "b", "hint": 2}])
    dataset = load_dataset_by_name("prompts", path, split="anything")
    assert dataset.to_list() == [{"prompt": "a", "hint": 1}, {"prompt": "b", "hint": 2}]


def test_folder_splits_and_shards(tmp_path):
    for shard in range(2):
        write(tmp_path / "data" / f"train-0000{shard}-of-00002.parquet", [{"prompt": f"train {shard}"}])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", [{"prompt": "test"}])
    assert load_dataset_by_name("prompts", str(tmp_path))["prompt"] == ["train 0", "train 1"]
    assert load_dataset_by_name("prompts", str(tmp_path), split="train[1:]")["prompt"] == ["train 1"]
    assert load_dataset_by_name("prompts", str(tmp_path), split="test")["prompt"] == ["test"]
    with pytest.raises(UsageError, match=r"split 'validation' not found in folder .*test-00000-of-00001\.parquet"):
        load_dataset_by_name("prompts", str(tmp_path), split="validation")


def test_folder_never_gives_another_set_or_split(tmp_path):
    for name in ("alpaca_train.json", "pku_saferlhf_test.json", "notes.txt"):
        write(tmp_path / name, [{"prompt": "x"}])
    alpaca = Source("alpaca", file_hints=("alpaca",))
    assert [path.name for path in find_local_files(tmp_path, "train", alpaca)] == ["alpaca_train.json"]
    for split, source in [("test", alpaca), ("train", Source("hh", file_hints=("hh_rlhf",)))]:
        with pytest.raises(UsageError, match=f"split '{split}' not found"):
            find_local_files(tmp_path, split, source)


def test_folder_with_rival_files(tmp_path):
    write(tmp_path / "train.json", [{"prompt": "x"}])
    write(tmp_path / "train.parquet", [{"prompt": "x"}])
    with pytest.raises(UsageError, match=r"train\.json, train\.parquet; name one"):
        load_dataset_by_name("prompts", str(tmp_path))


def test_unreadable_files(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text('[{"prompt": "a"}, ')
    with pytest.raises(UsageError, match=r"broken\.json cannot be read"):
        load_dataset_by_name("prompts", str(broken))
    (tmp_path / "note.txt").write_text("hello")
    with pytest.raises(UsageError, match="not a parquet, JSON, JSONL or CSV file"):
        load_dataset_by_name("prompts", str(tmp_path / "note.txt"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"empty\.jsonl holds no rows$"):
        load_dataset_by_name("prompts", str(tmp_path / "empty.jsonl"))
    for file in ("latin.jsonl", "latin.csv"):
        content = "prompt\nétude\n" if file.endswith("csv") else '{"prompt": "a"}\n{"prompt": "étude"}\n'
        (tmp_path / file).write_bytes(content.encode("latin-1"))
        with pytest.raises(UsageError, match=rf"{file} cannot be read; save it as UTF-8: .*byte 0xe9"):
            load_dataset_by_name("prompts", str(tmp_path / file))


# Text stays what is written


def test_json_text_that_looks_like_a_date(tmp_path):
    rows = [
        {"prompt": user("2024-05-01"), "answer": "2024-05-01", "n": 1, "more": {"at": "2023-01-01T10:00:00Z", "x": 1}},
        {"prompt": user("2024-05-02"), "answer": None, "n": 2, "more": {"at": "2023-01-02 10:00", "x": None}},
    ]
    for file in ("rows.jsonl", "rows.json", "rows.jsonl.gz"):
        dataset = load_dataset_by_name("prompts", write(tmp_path / file, rows), split="train[:2]")
        assert dataset.to_list() == rows
        assert [dataset[index] for index in range(2)] == rows
    alpaca = [{"instruction": "2024-05-01", "input": ""}, {"instruction": "2024-05-02", "input": "2024-05-03"}]
    dataset = load_dataset_by_name("alpaca", write(tmp_path / "alpaca.jsonl", alpaca))
    assert texts(dataset) == ["2024-05-01", "2024-05-02\n\n2024-05-03"]


def test_a_parquet_file_keeps_its_timestamps(tmp_path):
    path = tmp_path / "rows.parquet"
    moment = datetime(2024, 5, 1)
    datasets.Dataset.from_list([{"prompt": "a", "at": moment}]).to_parquet(path)
    assert load_dataset_by_name("prompts", str(path))["at"] == [moment]


def test_csv_text_that_looks_like_something_else(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "prompt,answer,code,label,safe,share\n7,007,010,1,True,0.5\nNA,None,2,0,False,2\nnull,,+3,1,True,\n"
    )
    assert load_dataset_by_name("prompts", str(path)).to_list() == [
        {"prompt": "7", "answer": "007", "code": "010", "label": 1, "safe": True, "share": 0.5},
        {"prompt": "NA", "answer": "None", "code": "2", "label": 0, "safe": False, "share": 2.0},
        {"prompt": "null", "answer": None, "code": "+3", "label": 1, "safe": True, "share": None},
    ]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(st.sampled_from(["NA", "nan", "1e5", "0", "-0", "1_0", "0x1", "Inf", "TRUE"]), st.text(max_size=4))
    )
)
def test_csv_cells_of_text_columns_come_back(tmp_path, cells):
    cells = [cell for cell in cells if cell.isprintable()]
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["prompt", "answer"], *(["p", cell] for cell in cells), ["p", "end"]])
    assert load_dataset_by_name("prompts", str(path))["answer"] == [*(cell or None for cell in cells), "end"]


@pytest.mark.parametrize(
    ("name", "rows", "column"),
    [
        ("prompts", [{"prompt": "a"}, {"prompt": 5}], "prompt"),
        ("prompts", [{"prompt": user("a")}, {"prompt": [{"role": "user", "content": 5}]}], "prompt"),
        ("prompts", [{"prompt": user("a")}, {"prompt": [{"content": "b"}]}], "prompt"),
        ("alpaca", [{"prompt": user("a")}, {"prompt": [{"from": "human", "value": "a"}]}], "prompt"),
        ("alpaca", [{"prompt": user("a")}, {"prompt": [{"role": "user", "content": ["a"]}]}], "prompt"),
        ("alpaca", [{"instruction": "1", "input": "x"}, {"instruction": "1", "input": 2}], "input"),
        ("rlla", [{"prompt": user("a"), "answer": CALL}, {"prompt": ["a"], "answer": CALL}], "prompt"),
        ("hh_rlhf", [{"chosen": "\n\nHuman: a", "rejected": "b"}, {"chosen": 1, "rejected": "b"}], "chosen"),
        ("hh_rlhf_pairs", [{"chosen": "\n\nHuman: a", "rejected": "b"}, {"chosen": "a", "rejected": 2}], "rejected"),
        (
            "pku_saferlhf_pairs",
            [{"prompt": "a", "response_0": text, "response_1": "b", "better_response_id": 0} for text in ("a", 5)],
            "response_0",
        ),
    ],
)
def test_a_wrong_cell_is_named(name, rows, column, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UsageError, match=rf"row 1 of .*rows\.jsonl: the column `{column}` must be text"):
        load_dataset_by_name(name, path)


# Own prompts


def test_prompts_keeps_columns_and_format(tmp_path):
    rows = [
        {"prompt": user("a"), "answer": "1"},
        {"prompt": user(" "), "answer": "2"},
        {"prompt": user("a"), "answer": "3"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    dataset = load_dataset_by_name("prompts", path)
    assert dataset.to_list() == [rows[0], rows[2]]
    assert "2 of 3 rows kept (1 with an empty prompt)" in dataset.info.description
    dataset = load_dataset_by_name("prompts", path, drop_duplicates=True)
    assert dataset["answer"] == ["1"]
    assert "1 of 3 rows kept (1 with an empty prompt, 1 duplicates)" in dataset.info.description


def test_prompts_errors(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question": "a", "gold": "b"}])
    with pytest.raises(UsageError, match=r"a\.jsonl has no column 'prompt' \(it has: question, gold\); rename"):
        load_dataset_by_name("prompts", path)
    path = write(tmp_path / "b.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(UsageError, match=r"'completions'.*rename it"):
        load_dataset_by_name("prompts", path)
    path = write(tmp_path / "c.jsonl", [{"prompt": [{"from": "user", "value": "a"}]}])
    with pytest.raises(
        UsageError, match=r"row 0 of .*c\.jsonl: the column `prompt` must be text or a list of messages"
    ):
        load_dataset_by_name("prompts", path)
    path = write(tmp_path / "d.jsonl", [{"prompt": "  "}, {"prompt": ""}])
    with pytest.raises(UsageError, match=r"no row is left: .*2 with an empty prompt"):
        load_dataset_by_name("prompts", path)


# Tool calling


def test_rlla_real_test_split(shared_dir):
    dataset = load_dataset_by_name("rlla", str(shared_dir / "data/rlla_4k"), split="test")
    assert len(dataset) == 80
    assert {"prompt", "answer", "data_source", "ability", "reward_model", "extra_info"} == set(dataset.column_names)
    for row in dataset:
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert row["answer"] == row["reward_model"]["ground_truth"] == row["extra_info"]["output"]
    assert sum("<tool_call>" in answer for answer in dataset["answer"]) == 71


def test_rlla_train_split_is_not_taken_from_other_files(shared_dir):
    with pytest.raises(UsageError, match="split 'train' not found"):
        load_dataset_by_name("rlla_4k", str(shared_dir / "data/rlla_4k"))


def test_rlla_sft_real_rows(shared_dir):
    path = shared_dir / "data/rlla_4k/rlla_sft.json"
    dataset = load_dataset_by_name("rlla_sft", str(path))
    raw = json.loads(path.read_text())
    assert dataset.column_names == ["prompt", "completion"]
    assert is_conversational(dataset[0])
    assert [row[0]["content"] for row in dataset["completion"]] == [row["output"] for row in raw]
    assert texts(dataset) == [row["input"] for row in raw]
    # Raw rows of the same layout work for RL, too.
    assert load_dataset_by_name("rlla_4k", str(path))["answer"] == [row["output"] for row in raw]


def test_rlla_layouts_agree(tmp_path):
    published = write(tmp_path / "train.parquet", [rlla_row(CALL)])
    raw = write(tmp_path / "raw.json", [{"instruction": "Tools.", "input": "Which?", "output": CALL}])
    ready = write(tmp_path / "ready.jsonl", [{"prompt": rlla_row(CALL)["prompt"], "answer": CALL}])
    loaded = [
        load_dataset_by_name("rlla", path).select_columns(["prompt", "answer"]) for path in (published, raw, ready)
    ]
    assert loaded[0].to_list() == loaded[1].to_list() == loaded[2].to_list()
    plain = write(tmp_path / "plain.jsonl", [{"prompt": "Which?", "answer": CALL}])
    assert load_dataset_by_name("rlla", plain)["prompt"] == ["Which?"]


@pytest.mark.parametrize(
    "gold",
    [
        CALL.replace("}}\n", '}}\n\n{"name": "g", "parameters": {}}\n\n'),
        "<think> I use <tool_call> here </think>\n<response> Put it in <tool_call> tags. </response>",
        CALL + "\n<response> Done, see <tool_call>. </response>",
        "<response> Bonjour \u2028 été </response>",
    ],
)
def test_unusual_but_valid_gold_is_kept_as_it_is(gold, tmp_path):
    path = write(tmp_path / "train.parquet", [rlla_row(gold)])
    assert load_dataset_by_name("rlla", path)["answer"] == [gold]


@pytest.mark.parametrize(
    ("gold", "message"),
    [
        ("", "missing or empty"),
        (None, "missing or empty"),
        ("<tool_call>\n{'name': 'f', 'parameters': {}}\n</tool_call>", "not JSON"),
        ('<tool_call>\n{"name": "f"}\n</tool_call>', "parameters"),
        ('<tool_call>\n{"name": "f", "parameters": {}}', "not closed"),
    ],
)
def test_unreadable_gold_names_file_row_and_remedy(gold, message, tmp_path):
    path = write(tmp_path / "train.parquet", [rlla_row(CALL), rlla_row(gold)])
    with pytest.raises(UsageError, match=rf"rlla_4k: row 1 of .*train\.parquet: .*{message}.*; fix the row"):
        load_dataset_by_name("rlla", path)


def test_rlla_missing_columns_and_empty_prompt(tmp_path):
    row = rlla_row(CALL)
    path = write(tmp_path / "a.parquet", [{"prompt": row["prompt"], "ability": "math"}])
    with pytest.raises(UsageError, match=r"a\.parquet has no column 'reward_model' \(it has: prompt, ability\)"):
        load_dataset_by_name("rlla", path)
    path = write(tmp_path / "b.parquet", [row, rlla_row(CALL, question=" ")])
    with pytest.raises(UsageError, match=r"row 1 of .*b\.parquet: the prompt is empty"):
        load_dataset_by_name("rlla", path)
    path = write(tmp_path / "c.parquet", [{**row, "reward_model": {"style": "rule"}}])
    with pytest.raises(UsageError, match=r"row 0 of .*c\.parquet: the ground truth is missing"):
        load_dataset_by_name("rlla", path)
    path = write(tmp_path / "d.json", [{"instruction": "x", "output": CALL}])
    with pytest.raises(UsageError, match=r"rlla_sft: .*d\.json has no column 'input'"):
        load_dataset_by_name("rlla_sft", path)


def test_api_bank_real_levels(shared_dir):
    folder = shared_dir / "data/api_bank"
    dataset = load_dataset_by_name("api_bank", str(folder))
    assert Counter(dataset["level"]) == {1: 399, 2: 67, 3: 131}
    raw = json.loads((folder / "level-2-api_processed.json").read_text())
    level_2 = load_dataset_by_name("api_bank", str(folder), levels=[2])
    assert level_2["index"] == list(range(67))
    for row, source in zip(level_2, raw, strict=True):
        tag, gold, end = row["answer"].split("\n")
        assert (tag, end) == ("<tool_call>", "</tool_call>")
        assert json.loads(gold) == source["answer"]
        assert [message["content"] for message in row["prompt"]] == [source["system"], source["user"]]
        assert json.loads(row["other"]) == source["other"]
    alone = load_dataset_by_name("api_bank", str(folder / "level-3-api_processed.json"))
    assert set(alone["level"]) == {3} and len(alone) == 131


def test_api_bank_errors(tmp_path):
    good = {"system": "s", "user": "u", "answer": [{"name": "f", "parameters": {}}]}
    path = tmp_path / "level-1-api_processed.json"
    for bad in ({**good, "answer": []}, {**good, "answer": {"name": "f"}}, {"system": "s", "user": "u"}, "row"):
        path.write_text(json.dumps([good, bad]))
        with pytest.raises(UsageError, match=r"api_bank: row 1 of .*level-1-api_processed"):
            load_dataset_by_name("api_bank", str(tmp_path), levels=[1])
    with pytest.raises(UsageError, match=r"no such file: .*level-2-api_processed\.json"):
        load_dataset_by_name("api_bank", str(tmp_path), levels=[2])
    with pytest.raises(UsageError, match="levels must be among"):
        load_dataset_by_name("api_bank", str(tmp_path), levels=[4])
    with pytest.raises(UsageError, match="neither a folder nor a file named like"):
        load_dataset_by_name("api_bank", str(tmp_path / "gone"))
    path.write_text("{")
    with pytest.raises(UsageError, match="is not a JSON file"):
        load_dataset_by_name("api_bank", str(path))
