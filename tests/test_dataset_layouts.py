"""Data as people keep it: folders in any layout, data sets saved to disk, and JSON lines with a mistake in one."""

import json

import pytest
from dataset_files import write
from datasets import Dataset, DatasetDict

from gd2po_trl.datasets import load_dataset_by_name
from gd2po_trl.errors import UsageError


def rows(path) -> list[str]:
    return load_dataset_by_name("prompts", str(path))["prompt"]


@pytest.mark.parametrize(
    "files",
    [
        ["default/train/0000.parquet", "default/train/0001.parquet", "default/test/0000.parquet"],
        ["train/a.parquet", "train/b.parquet", "val/a.parquet"],
        ["part-0.parquet", "part-1.parquet"],
        ["0000.parquet", "0001.parquet"],
        ["year=2024/x.parquet", "year=2025/x.parquet"],
        ["mine_train.parquet", "mine_val.parquet"],
        ["deep/down/rows.parquet"],
        ["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"],
        [".cache/train/other.parquet", "rows.jsonl"],
    ],
    ids=lambda files: files[0],
)
def test_a_folder_of_any_layout(tmp_path, files):
    for file in files:
        write(tmp_path / file, [{"prompt": file}])
    other = ("test", "val", ".cache")
    assert rows(tmp_path) == [file for file in files if not any(word in file for word in other)]


def test_validation_goes_by_several_names(tmp_path):
    for name in ("x_train.jsonl", "x_dev.jsonl"):
        write(tmp_path / name, [{"prompt": name}])
    assert load_dataset_by_name("prompts", str(tmp_path), "validation")["prompt"] == ["x_dev.jsonl"]
    with pytest.raises(UsageError, match=r"split 'test' not found.*x_dev\.jsonl"):
        load_dataset_by_name("prompts", str(tmp_path), "test")


def test_files_of_other_names_are_not_thrown_together(tmp_path):
    for name in ("prompts.jsonl", "answers.jsonl"):
        write(tmp_path / name, [{"prompt": name}])
    with pytest.raises(UsageError, match="name the file"):
        rows(tmp_path)


def test_what_save_to_disk_wrote(tmp_path):
    one = Dataset.from_dict({"prompt": ["a", "b"]})
    one.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": one, "test": one.select([0])}).save_to_disk(str(tmp_path / "several"))
    assert rows(tmp_path / "one") == rows(tmp_path / "several") == ["a", "b"]
    assert load_dataset_by_name("prompts", str(tmp_path / "several"), "test")["prompt"] == ["a"]
    with pytest.raises(UsageError, match=r"no split 'validation'.*train, test"):
        load_dataset_by_name("prompts", str(tmp_path / "several"), "validation")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "b",}\n', ["line 2", '{"prompt": "b",}']),
        ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n{"prompt": "c"}\n', ["line 3", '{"prompt": "b"']),
        ("x.jsonl", "{'prompt': 'a'}\n", ["line 1", "double quotes"]),
        ("x.jsonl", '{"prompt": "a"}\n["b"]\n', ["line 2", "no object"]),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "b", "prompt": "c"}\n', ["line 2", "twice"]),
        ("x.json", '[{"prompt": "a"},\n {"prompt": "b"},]\n', ["line 2"]),
        ("x.json", '[{"prompt": "a"}\n {"prompt": "b"}]\n', ["line 2"]),
    ],
)
def test_a_broken_line_is_named(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as error:
        rows(tmp_path / name)
    assert all(word in str(error.value) for word in [name, *words]), str(error.value)


def test_text_among_messages(tmp_path):
    message = [{"role": "user", "content": "x"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in (message, message, "text")))
    with pytest.raises(UsageError, match=r"row 2 of .* is text and row 0 a list of messages"):
        rows(path)
    path.write_text(json.dumps({"prompt": message}) + "\n" + json.dumps({"prompt": [*message, "text"]}) + "\n")
    with pytest.raises(UsageError, match="row 1"):
        rows(path)
