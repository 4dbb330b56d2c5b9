"""The quickstart's task, tokenizer, warm-up, report and command."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from gd2po_trl.cli.quickstart import RECIPE, _free_folder, main
from gd2po_trl.datasets import load_dataset_by_name
from gd2po_trl.errors import UsageError
from gd2po_trl.progress import print_change
from gd2po_trl.quickstart.policy import build_policy, build_tokenizer
from gd2po_trl.quickstart.prepare import prepare
from gd2po_trl.quickstart.report import plot_curves, print_samples, sample_completions
from gd2po_trl.quickstart.task import (
    INTENTS,
    THINK_VOCABULARY,
    Example,
    all_requests,
    example_stream,
    make_dataset,
    render_prompt,
    split_requests,
    vocabulary,
)
from gd2po_trl.quickstart.warmup import collate, demonstrate, warm_up
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import recipe_path
from gd2po_trl.rewards import resolve_reward
from gd2po_trl.run_log import held_out_change, read_log


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def every_example() -> list[Example]:
    """Every request with either of its tools listed in every place; all words of thinking occur."""
    examples = []
    for index, request in enumerate(all_requests()):
        for tool in INTENTS[request.intent].tools:
            others = [INTENTS[(request.intent + shift) % len(INTENTS)].tools[index % 2] for shift in (1, 2)]
            tools = others[: index % 3] + [tool] + others[index % 3 :]
            thoughts = THINK_VOCABULARY[index % len(THINK_VOCABULARY) :][:8]
            examples.append(Example(render_prompt(request, tools), tool, request.values, tuple(thoughts)))
    return examples


def score(completions: list[str], answers: list[str]) -> dict[str, list[float]]:
    kwargs = {"length": {"max_words": 12}}
    return {
        name: resolve_reward(name, kwargs.get(name))(
            prompts=[""] * len(answers), completions=completions, answer=answers
        )
        for name in ("correctness", "format", "length")
    }


# Task


def test_dataset_depends_on_the_seed_alone():
    requests = all_requests()
    assert make_dataset(requests, 50, seed=3) == make_dataset(requests, 50, seed=3)
    assert make_dataset(requests, 50, seed=3) != make_dataset(requests, 50, seed=4)
    assert split_requests(100, seed=3) == split_requests(100, seed=3)
    assert split_requests(100, seed=3) != split_requests(100, seed=4)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_held_out_requests_never_occur_in_training(seed):
    train, held_out = split_requests(128, seed)
    assert len(held_out) == 128
    assert not set(train) & set(held_out)
    assert len(set(train) | set(held_out)) == len(all_requests())

    def asked(requests):
        return {row["prompt"].splitlines()[-1] for row in make_dataset(requests, 2048, seed)}

    assert not asked(train) & asked(held_out)


@pytest.mark.parametrize("number", [0, -1, 10_000])
def test_split_names_a_number_that_cannot_be_held_out(number):
    with pytest.raises(ValueError, match=f"num_held_out.*got {number}"):
        split_requests(number, seed=1)


def test_the_gold_tool_is_the_only_listed_one_that_fits():
    for example in islice(example_stream(all_requests(), seed=5), 300):
        intent = next(intent for intent in INTENTS if example.tool in intent.tools)
        listed = [tool for tool in intent.tools if f"Name: {tool.name}\n" in example.prompt]
        assert listed == [example.tool]


def test_rewards_accept_every_gold_answer():
    examples = every_example()
    answers = [example.answer for example in examples]
    scores = score(answers, answers)
    assert set(scores["correctness"]) == {3.0}
    assert set(scores["format"]) == {1.0}
    assert scores["length"] == [round(len(example.thoughts) / 12, 2) for example in examples]


def test_demonstrations_are_careless_and_more_so_the_longer_they_think():
    rng = random.Random(0)
    examples = list(islice(example_stream(all_requests(), seed=6), 3000))
    answers = [example.answer for example in examples]
    scores = score([demonstrate(example, rng) for example in examples], answers)
    # Right, both values swapped, and without the closing tag: nothing else.
    assert set(scores["correctness"]) == {3.0, 0.0, -3.0}
    assert 0.8 < sum(scores["format"]) / 3000 < 0.95

    def share_right(long: bool) -> float:
        chosen = [
            value
            for value, example in zip(scores["correctness"], examples, strict=True)
            if (len(example.thoughts) > 7) == long
        ]
        return sum(value == 3.0 for value in chosen) / len(chosen)

    assert 0.1 < share_right(long=True) < share_right(long=False) - 0.05 < 0.5


# Tokenizer and policy


def test_tokenizer_gives_back_every_text_of_the_task(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for example in every_example():
        prompt, answer = (loaded(text)["input_ids"] for text in (example.prompt, example.answer))
        assert loaded.unk_token_id not in prompt + answer
        assert loaded.decode(prompt) == example.prompt
        assert loaded.decode(answer) == example.answer
        # What the policy generates behind a prompt is tokenized as in the warm-up.
        assert loaded(example.prompt + example.answer)["input_ids"] == prompt + answer
    assert (loaded.pad_token, loaded.eos_token, loaded.padding_side) == ("<pad>", "<eos>", "left")


@given(st.lists(st.integers(min_value=0, max_value=len(vocabulary()) - 1), max_size=60))
def test_tokenizer_decodes_whatever_a_policy_writes(indices):
    tokenizer = build_tokenizer()
    fragments = vocabulary()
    ids = tokenizer.convert_tokens_to_ids([fragments[index] for index in indices])
    expected = "".join(fragments[index] for index in indices)
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == expected


def test_tokenizer_marks_what_it_does_not_know(tokenizer):
    assert tokenizer.unk_token_id in tokenizer("Bonjour <think> the")["input_ids"]


def test_policy_is_small_and_depends_on_the_seed_alone(tokenizer):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first, again, other = (build_policy(tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert 80_000 < first.num_parameters() < 120_000
    assert torch.equal(first.model.embed_tokens.weight, again.model.embed_tokens.weight)
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)


# Warm-up


def test_only_the_completion_and_its_end_are_learned(tokenizer):
    example = next(example_stream(all_requests(), seed=0))
    batch = collate(tokenizer, [(example.prompt, example.answer), (example.prompt, "<think>")])
    learned = batch["labels"] != -100
    assert tokenizer.decode(batch["labels"][0][learned[0]]) == example.answer + "<eos>"
    assert tokenizer.decode(batch["labels"][1][learned[1]]) == "<think><eos>"
    assert torch.equal(batch["input_ids"][learned], batch["labels"][learned])
    assert torch.equal(batch["attention_mask"].bool(), batch["input_ids"] != tokenizer.pad_token_id)


def test_warm_up_lowers_the_loss_and_repeats(tokenizer):
    def run(steps):
        policy = build_policy(tokenizer, seed=1)
        return warm_up(policy, tokenizer, example_stream(all_requests(), 1), num_steps=steps, batch_size=8, seed=1)

    losses = run(40)
    assert losses[-1] < losses[0] - 1.0
    assert run(3) == losses[:3]


def test_prepared_files_load_as_a_recipe_names_them(tmp_path):
    prepare(tmp_path, seed=2, num_warmup_steps=1)
    train, held_out = (
        load_dataset_by_name("prompts", str(tmp_path / file), None) for file in ("train.jsonl", "heldout.jsonl")
    )
    assert {"prompt", "answer"} <= set(train.column_names)
    assert not set(train["prompt"]) & set(held_out["prompt"])
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert policy.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "policy"))
    texts = sample_completions(tmp_path / "policy", held_out["prompt"][:3], max_new_tokens=5)
    assert texts == sample_completions(tmp_path / "policy", held_out["prompt"][:3], max_new_tokens=5)
    assert len(texts) == 3


# Report


def synthetic_log(num_steps: int = 4) -> list[dict]:
    log = []
    for step in range(num_steps + 1):
        if step:
            rewards = {"rewards/correctness/mean": step - 1.0, "rewards/length/mean": step / 8}
            log.append({"step": step, **rewards, "gd2po/conflict_ratio": 0.5 / step, "gd2po/kept_ratio": 0.5})
        if step % 2 == 0:
            means = {"eval_rewards/correctness/mean": -1.0 + step, "eval_rewards/length/mean": 0.25 + step / 16}
            log.append({"step": step, **means, "eval_gd2po/conflict_ratio": 0.0})
    log.append({"step": num_steps, "train_runtime": 1.0})
    return log


def test_report_from_a_log(tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": synthetic_log()}))
    log = read_log(tmp_path)
    assert held_out_change(log) == {"correctness": (-1.0, 3.0), "length": (0.25, 0.5)}

    console = Console(record=True, width=100, file=open(tmp_path / "screen.txt", "w"))
    print_change(log, console)
    text = " ".join(console.export_text().split())
    assert "correctness -1.00 3.00 +4.00" in text
    assert "length 0.250 0.500 +0.250" in text
    assert "50% in the first tenth of the steps, 12% in the last, 26% over all" in text

    assert plot_curves(log, tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_report_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match="run the training first"):
        read_log(tmp_path)
    with pytest.raises(UsageError, match="eval_on_start"):
        held_out_change([entry for entry in synthetic_log() if not entry["step"]] + synthetic_log()[1:2])


def test_samples_show_completions_as_they_are(tmp_path):
    example = next(example_stream(all_requests(), seed=0))
    rows = [{"prompt": example.prompt, "answer": example.answer}]
    console = Console(record=True, width=40, file=open(tmp_path / "screen.txt", "w"))
    rewards = {"correctness": resolve_reward("correctness")}
    print_samples(rows, {"before": ["[red]no call[/red]"], "after": [example.answer]}, rewards, console)
    text = console.export_text()
    assert "before (correctness -3.00)" in text and "after (correctness 3.00)" in text
    assert "[red]no call[/red]" in text and example.answer in text


# Command


def test_quickstart_trains_and_reports(tmp_path, capsys):
    options = {
        "--output": tmp_path,
        "--warmup-steps": 30,
        "--max_steps": 2,
        "--eval_steps": 2,
        "--per_device_train_batch_size": 16,
        "--num_generations": 4,
        "--max_completion_length": 24,
    }
    assert main([str(word) for option in options.items() for word in option]) == 0

    trained = tmp_path / "trained"
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "policy", trained))
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)
    assert set(held_out_change(read_log(trained))) == {"correctness", "format", "length"}
    assert (tmp_path / "curves.png").is_file()
    report = (tmp_path / "report.txt").read_text()
    assert report.count("Held-out prompt") == 3
    assert "Mean reward on held-out prompts" in report
    assert report.strip() in capsys.readouterr().out
    assert f"gd2po analyze {trained}" in report.replace("\n", "")
    assert len(list((trained / "completions").glob("*.parquet"))) >= 2

    # A second run does not overwrite the first.
    with pytest.raises(UsageError, match="holds a run"):
        main(["--output", str(tmp_path)])
    with pytest.raises(UsageError, match="holds a run already"):  # one folder holds the run and its report
        main(["--output_dir", str(tmp_path)])


def test_the_default_folder_is_the_next_free_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _free_folder(None) == Path("outputs/quickstart")
    for name in ("quickstart", "quickstart-2"):
        (tmp_path / "outputs" / name / "trained").mkdir(parents=True)
    assert _free_folder(None) == Path("outputs/quickstart-3")


def test_the_rewards_of_the_recipe_can_be_chosen():
    recipe = load_recipe(recipe_path(RECIPE), ["--reward_funcs", "correctness", "length"])
    assert recipe.arguments.reward_funcs == ["correctness", "length"]


def test_quickstart_refuses_a_slip_before_it_writes(tmp_path):
    output = tmp_path / "run"
    with pytest.raises(UsageError, match="max_step"):
        main(["--output", str(output), "--max_step", "2"])
    with pytest.raises(UsageError, match="Unknown reward 'brevity'"):
        main(["--output", str(output), "--reward_funcs", "correctness", "brevity"])
    with pytest.raises(UsageError, match="warmup-steps"):
        main(["--output", str(output), "--warmup-steps", "-1"])
    assert not output.exists()
    output.write_text("")
    with pytest.raises(UsageError, match="is a file"):
        main(["--output", str(output)])
