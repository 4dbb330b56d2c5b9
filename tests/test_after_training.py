"""What is done with a trained policy: merging its adapter, completing prompts, and its rewards before and after."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gd2po_trl.cli import eval as evaluation
from gd2po_trl.cli.chat import main as chat
from gd2po_trl.cli.generate import main as generate
from gd2po_trl.cli.merge import main as merge
from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.rewards import RewardRow, mean_and_interval, summarize


@pytest.fixture(scope="module")
def adapter(tiny_policy, tmp_path_factory):
    """A LoRA adapter that changes what the policy writes, with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    config = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_policy).save_pretrained(folder)
    return folder


# Merging


def test_the_merged_model_computes_what_the_adapter_does(tiny_policy, adapter, tmp_path, capsys):
    output = tmp_path / "merged"
    assert merge([str(adapter), "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(output)
    batch = tokenizer("say a: ", return_tensors="pt", return_token_type_ids=False)
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    before = base(**batch).logits
    expected = PeftModel.from_pretrained(base, adapter)(**batch).logits
    merged = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)
    assert merged.dtype == base.dtype

    with pytest.raises(UsageError, match="exists"):
        merge([str(adapter), "--output", str(output)])


def test_the_dtype_of_a_merged_model_can_be_chosen(adapter, tmp_path):
    assert merge([str(adapter), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


def test_what_cannot_be_merged_is_said_before_anything_is_written(tiny_policy, adapter, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "no/where"}))
    chained = tmp_path / "chained"
    chained.mkdir()
    (chained / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(adapter)}))
    for arguments, message in (
        ([str(tiny_policy)], "a whole model"),
        ([str(tmp_path)], "no adapter"),
        ([str(tmp_path / "nowhere")], "There is no folder"),
        ([str(broken)], "'no/where' .* cannot be loaded"),
        ([str(chained)], "an adapter itself"),
    ):
        with pytest.raises(UsageError, match=message):
            merge([*arguments, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# Completing prompts


def test_one_prompt_prints_its_completion_alone(adapter, capsys):
    assert generate(["--model", str(adapter), "--prompt", "say a", "--max-new-tokens", "5"]) == 0
    first = capsys.readouterr().out
    assert generate(["--model", str(adapter), "--prompt", "say a", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == first
    assert first.strip()


def test_the_chat_template_is_used_unless_raw(adapter, tiny_policy, capsys):
    tokenizer, model = AutoTokenizer.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(tiny_policy)
    model = PeftModel.from_pretrained(model, adapter)
    conversation = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "say a"}]
    texts = {
        "--system": tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True),
        "--raw": "say a",
    }
    for option, text in texts.items():
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, return_token_type_ids=False)
        expected = model.generate(**ids, max_new_tokens=5, do_sample=False)[0, ids["input_ids"].shape[1] :]
        words = [option, "be brief"] if option == "--system" else [option]
        generate(["--model", str(adapter), "--prompt", "say a", "--max-new-tokens", "5", *words])
        assert capsys.readouterr().out.rstrip("\n") == tokenizer.decode(expected, skip_special_tokens=True).rstrip(
            "\n"
        )


def test_a_file_of_prompts_gives_a_file_of_completions(tiny_policy, tmp_path, capsys):
    prompts = ["say a", [{"role": "user", "content": "say b"}]]
    for index, prompt in enumerate(prompts):
        source, output = tmp_path / f"prompts{index}.jsonl", tmp_path / f"out{index}.jsonl"
        source.write_text(json.dumps({"prompt": prompt}) + "\n")
        words = ["--model", str(tiny_policy), "--prompts", str(source), "--output", str(output)]
        words += ["--max-new-tokens", "4", "--temperature", "1", "--num-samples", "3"]
        assert generate(words) == 0
        records = [json.loads(line) for line in output.read_text().splitlines()]
        assert [record["prompt"] for record in records] == [prompt] * 3
        assert len({record["completion"] for record in records}) > 1
        with pytest.raises(UsageError, match="exists"):
            generate(words)
    generate(["--model", str(tiny_policy), "--prompt", "a", "--prompt", "b", "--max-new-tokens", "4"])
    assert "Prompt 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere", "--prompt", "a"], "no such folder"),
        (["--model", "some/where"], "which prompts"),
        (["--model", "some/where", "--prompt", " "], "prompt 1 is empty"),
        (["--model", str(Path(__file__).parent), "--prompt", "a"], "holds no model"),
        (["--model", f"{Path(__file__).parent}/nowhere", "--prompt", "a"], "no such folder"),
        (["--model", "some/where", "--prompt", "a", "--num-samples", "2"], "needs a --temperature"),
        (["--model", "some/where", "--prompt", "a", "--temperature", "-1"], "0 or more"),
        (["--model", "some/where", "--prompt", "a", "--temperature", "nan"], "0 or more"),
        (["--model", "some/where", "--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
        (["--model", "some/where", "--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_slips_are_one_line(words, message):
    with pytest.raises(UsageError, match=message):
        generate(words)


def test_a_conversation_goes_on_until_an_empty_line(tiny_policy, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("say a\nsay b\n\nsay c\n"))
    assert chat(["--model", str(tiny_policy), "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.count("> ") == 3


# Rewards before and after


@pytest.fixture
def run(adapter, tiny_policy, tmp_path, monkeypatch):
    """The folder of a run as `gd2po train` leaves it, with a reward that reads a column."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "eval_rewards_of_mine.py").write_text(
        "def near(completions, target, trainer_state, **kwargs):\n"
        "    assert trainer_state.global_step == 7\n"
        "    return [-abs(len(c) - t) if len(c) else None for c, t in zip(completions, target)]\n"
        "def tokens(completions, completion_ids, log_metric, **kwargs):\n"
        "    log_metric('seen', 1.0)\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    rows = [{"prompt": f"say {letter}: ", "target": index} for index, letter in enumerate("abcdef")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in adapter.iterdir():
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    recipe = {
        "model_name_or_path": str(tiny_policy),
        "dataset": "prompts",
        "dataset_path": "data.jsonl",
        "reward_funcs": ["near", "tokens"],
        "reward_kwargs": {
            "near": {"type": "eval_rewards_of_mine.near"},
            "tokens": {"type": "eval_rewards_of_mine.tokens"},
        },
        "reward_weights": [1.0, -0.5],
        "max_completion_length": 6,
    }
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": []}))
    return tmp_path / "run"


def test_a_run_is_compared_with_the_model_before_it(run, capsys):
    assert evaluation.main(["rewards", "--model", str(run)]) == 0
    results = json.loads((run / "eval/results.json").read_text())
    (entry,) = results["datasets"].values()
    assert (entry["rows"], results["weights"]) == (6, {"near": 1.0, "tokens": -0.5})
    lines = [json.loads(line) for line in (run / "eval/scores.jsonl").read_text().splitlines()]
    completions = [json.loads(line) for line in (run / "eval/predictions.jsonl").read_text().splitlines()]
    by_id = {record["id"]: record for record in completions}
    tokenizer = AutoTokenizer.from_pretrained(run)
    for index, line in enumerate(lines):
        text = by_id[line["id"]]["completion"]
        assert line["near"] == (-abs(len(text) - index) if text else None)
        assert line["tokens"] >= len(tokenizer(text)["input_ids"])
    for name in ("near", "tokens"):
        figures = entry["rewards"][name]
        pairs = [(line[name], line["before"][name]) for line in lines]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        assert figures["difference"] == pytest.approx(sum(a - b for a, b in pairs) / len(pairs))
        low, high = figures["difference_interval"]
        assert low <= figures["difference"] <= high
        assert figures["win_rate"]["wins"] == sum(a > b for a, b in pairs)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("near", "tokens", "sum", "before", "after"))


def test_without_a_baseline_there_are_means_alone(run, capsys):
    words = ["rewards", "--model", str(run), "--baseline", "none", "--reward", "tokens=eval_rewards_of_mine.tokens"]
    assert evaluation.main([*words, "--limit", "4"]) == 0
    (entry,) = json.loads((run / "eval/results.json").read_text())["datasets"].values()
    assert entry["rows"] == 4 and list(entry["rewards"]) == ["tokens"]
    assert "difference" not in entry["rewards"]["tokens"]
    assert "before" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "other.jsonl"], "needs the dataset column `target`"),
        (["--reward", "near"], "Unknown reward 'near'"),
        (["--baseline", "no/where"], "--baseline none"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl, and there is no such file"),
    ],
)
def test_slips_are_found_before_the_model_runs(run, words, message):
    (run.parent / "other.jsonl").write_text('{"prompt": "say a: "}\n')
    with pytest.raises(UsageError, match=message):
        evaluation.main(["rewards", "--model", str(run), *words])
    assert not (run / "eval").exists()


def test_a_model_without_a_recipe_needs_to_be_told(tiny_policy):
    with pytest.raises(UsageError, match="which rewards"):
        evaluation.main(["rewards", "--model", str(tiny_policy)])
    with pytest.raises(UsageError, match="which prompts"):
        evaluation.main(["rewards", "--model", str(tiny_policy), "--reward", "format"])


def test_intervals_cover_the_mean_of_their_values():
    mean, (low, high) = mean_and_interval([1.0, 2.0, 3.0, 4.0])
    half = 3.182446 * math.sqrt(5 / 3 / 4)  # Student's t with 3 degrees of freedom
    assert (mean, low, high) == (2.5, pytest.approx(2.5 - half), pytest.approx(2.5 + half))
    assert mean_and_interval([2.0, 2.0]) == (2.0, [2.0, 2.0])
    assert mean_and_interval([2.0]) == (2.0, None)
    assert mean_and_interval([]) == (None, None)


def test_a_watched_reward_without_a_score_leaves_the_sum():
    rows = [RewardRow(f"d/{index}", "p", "d") for index in range(2)]
    scores = {"d/0": {"a": 1.0, "b": None}, "d/1": {"a": 3.0, "b": 2.0}}
    results = summarize(rows, {}, scores, {"a": 2.0, "b": 0.0})
    assert results["datasets"]["d"]["rewards"]["sum"]["mean"] == pytest.approx(4.0)
    results = summarize(rows, {}, scores, {"a": 2.0, "b": 1.0})
    assert results["datasets"]["d"]["rewards"]["sum"]["mean"] == pytest.approx(8.0)
