"""The scripts under examples/: their headers install what is pinned here, and they run with a tiny policy."""

import configparser
import importlib.util
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml


ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
HEADER = re.compile(r"(?m)^# /// script\n((?:#(?: .*)?\n)+?)# ///$")
TOOL_CALL = '<think> a </think>\n<tool_call>\n{"name": "f", "parameters": {"a": "1"}}\n</tool_call>'


def header_of(path: Path) -> dict:
    """The one block of metadata, as PEP 723 finds it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML parser")
    (block,) = HEADER.findall(path.read_text(encoding="utf-8"))
    return tomllib.loads("".join(line.removeprefix("#").removeprefix(" ") + "\n" for line in block.splitlines()))


def test_there_are_three():
    assert [path.stem for path in EXAMPLES] == ["gpu_benchmark", "tool_calling_lora", "two_rewards"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_header_installs_the_clone_and_the_pinned_versions(path):
    header = header_of(path)
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert sorted(header["dependencies"]) == sorted(["gd2po-trl", *pinned])
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert header["requires-python"] == setup["options"]["python_requires"]
    source = header["tool"]["uv"]["sources"]["gd2po-trl"]
    assert (path.parent / source["path"]).resolve() == ROOT
    # Nothing of where packages come from, which is the user's to say.
    assert set(header["tool"]["uv"]) == {"sources"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_text_names_the_command(path):
    assert f"uv run examples/{path.name}" in path.read_text(encoding="utf-8")


def run_example(name: str, words: list[str], monkeypatch) -> None:
    path = ROOT / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()


def test_two_rewards_trains(tiny_policy, tmp_path, monkeypatch):
    words = ["--model", str(tiny_policy), "--steps", "2", "--batch", "16", "--length", "8", "--output", str(tmp_path)]
    run_example("two_rewards", words, monkeypatch)
    table = pd.concat(map(pd.read_parquet, (tmp_path / "completions").glob("*.parquet")))
    assert len(table) == 32 and {"right", "brief"} <= set(table.columns)
    assert table["brief"].between(0, 1).all()
    assert (tmp_path / "model.safetensors").is_file()


def test_two_rewards_scores_what_it_says():
    spec = importlib.util.spec_from_file_location("two_rewards", ROOT / "examples" / "two_rewards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    completions = [[{"role": "assistant", "content": text}] for text in ("It is 3, so 5.", "5, not 3", "none")]
    assert module.right(completions, ["5", "5", "5"]) == [1.0, 0.0, 0.0]
    assert module.brief(completions) == pytest.approx([0.95, 0.97, 0.99])
    rows = module.questions(3)
    assert all(
        str(int(row["prompt"][0]["content"][8:10]) + int(row["prompt"][0]["content"][13:15])) == row["answer"]
        for row in rows
    )


def test_tool_calling_trains_an_adapter(tiny_policy, tmp_path, monkeypatch):
    data = tmp_path / "rows.parquet"
    prompt = [{"role": "system", "content": "Call f."}, {"role": "user", "content": "Go."}]
    reward_model = {"ground_truth": TOOL_CALL, "style": "rule"}
    pd.DataFrame([{"prompt": prompt, "reward_model": reward_model}] * 4).to_parquet(data)
    output = tmp_path / "out"
    words = ["--model", str(tiny_policy), "--data", str(data), "--steps", "1", "--batch", "8", "--length", "8"]
    run_example("tool_calling_lora", [*words, "--output", str(output)], monkeypatch)
    table = pd.concat(map(pd.read_parquet, (output / "completions").glob("*.parquet")))
    assert {"correctness", "format", "length"} <= set(table.columns)
    assert table["correctness"].tolist() == [-3.0] * 8  # random bytes are no tool call
    assert (output / "adapter_model.safetensors").is_file()


def test_the_issue_template_takes_the_benchmark():
    template = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/result.yml").read_text(encoding="utf-8"))
    fields = {entry["id"]: entry for entry in template["body"]}
    assert fields["gpu_json"]["attributes"]["render"] == "json"
    assert not fields["gpu_json"]["validations"]["required"]
    assert "examples/gpu_benchmark.py" in fields["gpu_json"]["attributes"]["description"]


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_benchmarks_train_in_what_the_gpu_has(capability, dtype, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import update_harness

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert update_harness.half_precision("cuda") is dtype
    assert update_harness.half_precision("cpu") is torch.float32
