"""GD2POTrainer on a tiny policy: the seams in TRL, and everything GRPOTrainer takes."""

import asyncio
import copy
import logging
import re
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from peft import LoraConfig
from tiny import conversational_dataset, letters_dataset, low_bytes, spread_bytes, tiny_args, tiny_settings
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from gd2po_trl import GD2POConfig, GD2POTrainer, compute_advantages
from gd2po_trl.reward_guard import RewardError


REWARDS = [low_bytes, spread_bytes]


@pytest.fixture
def build(tiny_policy, tmp_path):
    def _build(reward_funcs=None, trainer_class=GD2POTrainer, dataset=None, trainer_kwargs=None, **overrides):
        return trainer_class(
            str(tiny_policy),
            REWARDS if reward_funcs is None else reward_funcs,
            tiny_args(tmp_path / "run", **overrides),
            train_dataset=letters_dataset() if dataset is None else dataset,
            **(trainer_kwargs or {}),
        )

    return _build


def parameters_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def moved(trainer, before):
    return [name for name, value in trainer.model.named_parameters() if not torch.equal(value, before[name])]


def train(trainer):
    """Train; assert that parameters moved and are finite, and return the log history without the summary."""
    before = parameters_of(trainer)
    trainer.train()
    assert moved(trainer, before)
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    return [entry for entry in trainer.state.log_history if "reward" in entry]


class Spy:
    """Keeps what the seam hands to the loss: rewards, output and, before we replace them, TRL's own advantages."""

    def __init__(self, trainer):
        self.rewards, self.outputs = [], []
        calculate, generate = trainer._calculate_rewards, trainer._generate_and_score_completions

        def calculate_rewards(*args, **kwargs):
            self.rewards.append(calculate(*args, **kwargs))
            return self.rewards[-1]

        def generate_and_score(inputs):
            self.outputs.append(generate(inputs))
            return self.outputs[-1]

        trainer._calculate_rewards = calculate_rewards
        trainer._generate_and_score_completions = generate_and_score


def test_parameters_move_and_the_advantages_are_ours(build):
    trainer = build()
    spy = Spy(trainer)
    history = train(trainer)
    assert len(history) == 2 and len(spy.outputs) == 2
    for rewards, output, entry in zip(spy.rewards, spy.outputs, history, strict=True):
        expected = compute_advantages(rewards, 4, token_counts=output["completion_mask"].sum(1))
        assert torch.equal(output["advantages"], expected.advantages)
        assert entry["gd2po/conflict_ratio"] == pytest.approx(expected.conflict.float().mean().item())
        assert entry["gd2po/kept_ratio"] == pytest.approx(expected.kept.float().mean().item())


def test_dropped_rollouts_have_exactly_zero_advantage(build):
    trainer = build(reward_funcs=[low_bytes, lambda completions, **kw: [-r for r in low_bytes(completions)]])
    spy = Spy(trainer)
    trainer.train()
    for output in spy.outputs:
        assert (output["advantages"] == 0).all()
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert all(entry["gd2po/kept_ratio"] == 0 and entry["gd2po/conflict_ratio"] == 1 for entry in history)
    assert all(entry["grad_norm"] == 0 for entry in history)


def test_contract_with_trl(build):
    """A TRL release that moves the seam fails here by name: its own advantages follow from the captured rewards."""
    trainer = build(trainer_class=GRPOTrainer, multi_objective_aggregation="sum_then_normalize", scale_rewards="group")
    spy = Spy(trainer)
    trainer.train()
    for rewards, output in zip(spy.rewards, spy.outputs, strict=True):
        total = rewards.sum(1).view(-1, 4)
        expected = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
        assert torch.allclose(output["advantages"], expected.flatten(), atol=1e-5)


def test_contract_with_trl_gdpo(build):
    trainer = build(trainer_class=GRPOTrainer, multi_objective_aggregation="normalize_then_sum")
    spy = Spy(trainer)
    trainer.train()
    for rewards, output in zip(spy.rewards, spy.outputs, strict=True):
        grouped = rewards.view(-1, 4, 2)
        scaled = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)
        total = scaled.sum(2).flatten()
        assert torch.allclose(output["advantages"], (total - total.mean()) / (total.std() + 1e-4), atol=1e-5)
        ours = compute_advantages(rewards, 4, conflict_filter=None, whitening="sequence")
        # The two differ by the constants that guard their divisions.
        assert torch.allclose(ours.advantages, output["advantages"], atol=1e-2)


def test_sum_then_normalize_leaves_stock_advantages(build, caplog):
    stock = build(trainer_class=GRPOTrainer, multi_objective_aggregation="sum_then_normalize")
    stock_spy = Spy(stock)
    stock.train()
    with caplog.at_level(logging.WARNING):
        ours = build(
            multi_objective_aggregation="sum_then_normalize",
            skip_zero_advantage_rows=False,
            packed_update=False,
            keep_prompts_together=False,
        )
    assert sum("do not apply" in record.message for record in caplog.records) == 1
    ours_spy = Spy(ours)
    ours.train()
    for theirs, mine in zip(stock_spy.outputs, ours_spy.outputs, strict=True):
        assert torch.equal(theirs["completion_ids"], mine["completion_ids"])
        assert torch.equal(theirs["advantages"], mine["advantages"])
    for name, value in stock.model.named_parameters():
        assert torch.equal(value, ours.model.get_parameter(name))
    assert any("gd2po/conflict_ratio" in entry for entry in ours.state.log_history)


def test_plain_grpo_config(tiny_policy, tmp_path):
    config = GRPOConfig(**tiny_settings(tmp_path))
    before = copy.copy(config.__dict__)
    trainer = GD2POTrainer(str(tiny_policy), REWARDS, config, train_dataset=letters_dataset())
    assert isinstance(trainer.args, GD2POConfig)
    assert (trainer.args.conflict_filter, trainer.multi_objective_aggregation) == ("hard", "normalize_then_sum")
    assert trainer.args.learning_rate == config.learning_rate
    assert config.__dict__ == before and type(config) is GRPOConfig
    assert train(trainer)[0]["gd2po/kept_ratio"] <= 1


def test_no_config(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # TRL trains in bf16 by default, which transformers takes for impossible on a machine without a GPU.
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    trainer = GD2POTrainer(str(tiny_policy), low_bytes, train_dataset=letters_dataset())
    assert isinstance(trainer.args, GD2POConfig) and trainer.args.conflict_filter == "hard"
    assert Path(trainer.args.output_dir).name == f"{tiny_policy.name}-GD2PO"


def test_model_instance(tiny_policy, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    data = {"train_dataset": letters_dataset(), "processing_class": tokenizer}
    trainer = GD2POTrainer(model, low_bytes, tiny_args(tmp_path), **data)
    assert trainer.model is model and train(trainer)


@pytest.mark.parametrize(
    "overrides",
    [
        {"conflict_filter": "snr", "snr_threshold": 0.5},
        {"conflict_filter": None},
        {"consensus_weighting": "after_whitening"},
        {"whitening": "sequence", "whitening_shift_mean": False},
        {"whitening": None, "consensus_weighting": None},
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"reward_weights": [1.0, 0.0]},
        {"reward_weights": [2.0, 0.5]},
        {"num_iterations": 2, "max_steps": 4},
        {"gradient_accumulation_steps": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 4},
        {"mask_truncated_completions": True},
        {"beta": 0.1},
        {"loss_type": "grpo"},
    ],
    ids=str,
)
def test_settings_train(build, overrides):
    trainer = build(**overrides)
    spy = Spy(trainer)
    if overrides.get("mask_truncated_completions"):
        trainer.train()  # a tiny policy rarely ends by itself, so that little or nothing is left to train
    else:
        train(trainer)
    for rewards, output in zip(spy.rewards, spy.outputs, strict=True):
        args = trainer.args
        expected = compute_advantages(
            rewards,
            4,
            reward_weights=args.reward_weights,
            token_counts=output["completion_mask"].sum(1),
            conflict_filter=args.conflict_filter,
            snr_threshold=args.snr_threshold,
            consensus_weighting=args.consensus_weighting,
            whitening=args.whitening,
            whitening_shift_mean=args.whitening_shift_mean,
            scale_rewards=args.scale_rewards,
        )
        assert torch.equal(output["advantages"], expected.advantages)


def test_lora_trains_the_adapter_alone(build, tmp_path):
    trainer = build(trainer_kwargs={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])})
    before = parameters_of(trainer)
    trainer.train()
    names = moved(trainer, before)
    assert names and all("lora_" in name for name in names)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert (
        "PEFT adapter of `" in card and "gd2po merge run" in card and "None" not in card.split("## Training proc")[0]
    )


def test_reward_model_beside_a_function(build, tiny_reward_model):
    trainer = build(reward_funcs=[str(tiny_reward_model), low_bytes])
    entry = train(trainer)[0]
    name = tiny_reward_model.name
    assert f"rewards/{name}/mean" in entry and f"gd2po/conflict_ratio/{name}_vs_low_bytes" in entry


def test_async_reward_and_conversational_prompts(build):
    async def patient(completions, **kwargs):
        await asyncio.sleep(0.01)
        return low_bytes(completions)

    history = train(build(reward_funcs=[patient, spread_bytes], dataset=conversational_dataset()))
    assert "gd2po/conflict_ratio/patient_vs_spread_bytes" in history[0]


def test_none_from_one_and_from_all_rewards(build):
    def sometimes(completions, **kwargs):
        return [None if index % 4 == 0 else value for index, value in enumerate(spread_bytes(completions))]

    trainer = build(reward_funcs=[low_bytes, sometimes])
    spy = Spy(trainer)
    train(trainer)
    assert torch.isnan(spy.rewards[0][::4, 1]).all()

    def never(completions, **kwargs):
        return [None] * len(completions)

    def one_per_group(completions, **kwargs):
        return [1.0 * index if index % 4 == 0 else None for index in range(len(completions))]

    train(build(reward_funcs=low_bytes))  # a single reward
    for silent in ([never, never], one_per_group):
        stays_as_it_is(build(reward_funcs=silent))


def stays_as_it_is(trainer):
    before = parameters_of(trainer)
    trainer.train()
    assert not moved(trainer, before)
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())


def test_eval_with_one_generation(build):
    trainer = build(
        trainer_kwargs={"eval_dataset": letters_dataset(4)},
        eval_strategy="steps",
        eval_steps=1,
        num_generations_eval=1,
        per_device_eval_batch_size=2,
        log_completions=True,
        num_completions_to_print=1,
    )
    train(trainer)
    evaluated = [entry for entry in trainer.state.log_history if "eval_reward" in entry]
    assert len(evaluated) == 2
    assert all(entry["eval_gd2po/conflict_ratio"] == 0 for entry in evaluated)


def test_completions_table(build, tmp_path):
    trainer = build(log_completions=True, num_completions_to_print=1, gradient_accumulation_steps=2)
    spy = Spy(trainer)
    trainer.train()
    tables = sorted((tmp_path / "run" / "completions").glob("*.parquet"))
    assert len(tables) == 2
    for path, rewards, output in zip(tables, spy.rewards, spy.outputs, strict=True):
        table = pd.read_parquet(path)
        assert len(table) == 16
        expected = compute_advantages(rewards, 4, token_counts=output["completion_mask"].sum(1))
        assert table["advantage"].tolist() == pytest.approx(expected.advantages.tolist())
        assert table["gd2po_kept"].tolist() == expected.kept.tolist()
        assert table["gd2po_conflict"].tolist() == expected.conflict.tolist()
        assert table["low_bytes"].tolist() == pytest.approx(rewards[:, 0].tolist())


def test_half_precision_that_a_cpu_ignores_is_refused(build):
    with pytest.raises(ValueError, match="`fp16`"):
        build(fp16=True)


def test_tables_of_an_earlier_run_are_moved_aside(build, tmp_path):
    """By their steps they would be taken for this run's; nothing is deleted."""
    folder = tmp_path / "run" / "completions"
    settings = {"log_completions": True, "num_completions_to_print": 0, "save_strategy": "steps", "save_steps": 1}
    build(max_steps=3, **settings).train()
    earlier = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(earlier) == [f"completions_{step:05d}.parquet" for step in (1, 2, 3)]

    first, second, third = sorted(earlier)
    (folder / "eval_held_out_3.parquet").write_bytes(b"")
    build(max_steps=2, **settings).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert sorted(path.name for path in folder.iterdir()) == [first, second]
    moved_aside = tmp_path / "run" / "completions_old_1"
    assert sorted(path.name for path in moved_aside.iterdir()) == [second, third, "eval_held_out_3.parquet"]

    build(max_steps=1, seed=8, **settings).train()
    assert [path.name for path in folder.iterdir()] == [first]
    assert (folder / first).read_bytes() != earlier[first]
    moved_aside = tmp_path / "run" / "completions_old_2"
    assert (moved_aside / first).read_bytes() == earlier[first]


def test_pairs_and_zero_std_share(build):
    def constant(completions, **kwargs):
        return [0.1] * len(completions)

    entry = train(build(reward_funcs=[low_bytes, spread_bytes, constant]))[0]
    pairs = [name for name in entry if name.startswith("gd2po/conflict_ratio/")]
    assert len(pairs) == 3
    assert entry["gd2po/conflict_ratio/low_bytes_vs_constant"] == 0
    assert entry["frac_reward_zero_std"] == entry["gd2po/frac_groups_without_signal"]

    trainer = build(reward_funcs=[constant])
    trainer.train()
    assert trainer.state.log_history[0]["frac_reward_zero_std"] == 1


def test_tables_hold_rollouts_of_training_or_of_evaluation(build, tmp_path):
    """TRL would keep the last rollouts of either; an evaluation then cuts a group of the training in two."""
    trainer = build(
        log_completions=True,
        num_completions_to_print=0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        steps_per_generation=4,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=2,
        per_device_eval_batch_size=6,
        trainer_kwargs={"eval_dataset": letters_dataset(3)},
    )
    trainer.train()
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "run" / "completions").glob("*.parquet"))]
    # The evaluation after a step replaces the table of that step.
    assert [len(table) for table in tables] == [16, 6, 16, 6]
    for table, num_generations in zip(tables, [4, 2, 4, 2], strict=True):
        assert (table["prompt"].value_counts() % num_generations == 0).all()


@pytest.mark.parametrize("skip", [True, False])
def test_update_time_is_the_step_without_generation_and_rewards(build, skip):
    def slow(completions, **kwargs):
        time.sleep(0.5)
        return low_bytes(completions)

    sizes = {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "max_steps": 2}
    trainer = build(reward_funcs=[slow, spread_bytes], skip_zero_advantage_rows=skip, **sizes)
    train(trainer)
    log = [entry for entry in trainer.state.log_history if "step_time" in entry]
    # The first step generates and scores, the second trains on what is left of the same generation batch.
    assert len(log) == 2
    assert all(entry["gd2po/update_time"] > 0 for entry in log)
    assert log[0]["step_time"] - log[0]["gd2po/update_time"] > 0.4


def test_all_dropped_is_said(build, caplog):
    opposite = [low_bytes, lambda completions, **kw: [-r for r in low_bytes(completions)]]
    trainer = build(reward_funcs=opposite, max_steps=50)
    before = parameters_of(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 50 and not moved(trainer, before)
    said = [record.message for record in caplog.records if "All advantages were zero" in record.message]
    assert len(said) == 2 and "10 generation batches" in said[1] and "disagree on 100%" in said[0]


# Bad rewards: one error that names the function


def raises(completions, **kwargs):
    raise KeyError("score")


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda n: [1.0] * (n - 1), ["7 rewards for 8 completions"]),
        (lambda n: [], ["0 rewards for 8 completions"]),
        (lambda n: None, ["NoneType"]),
        (lambda n: 1.0, ["float"]),
        (lambda n: ["1.0"] * n, ["'1.0'", "str", "completion 0"]),
        (lambda n: [1.0] * (n - 1) + [[1.0]], ["list", "completion 7"]),
        (lambda n: [float("inf")] + [0.0] * (n - 1), ["1 infinite"]),
        (lambda n: [float("-inf")] * n, ["8 infinite"]),
    ],
)
def test_wrong_rewards_are_named(build, returned, words):
    def culprit(completions, **kwargs):
        return returned(len(completions))

    with pytest.raises(RewardError) as error:
        build(reward_funcs=[low_bytes, culprit]).train()
    assert all(word in str(error.value) for word in ["'culprit'", *words]), str(error.value)


def test_a_reward_that_raises_is_named(build):
    with pytest.raises(RewardError, match=r"'raises' raised KeyError: 'score'") as error:
        build(reward_funcs=[raises]).train()
    assert isinstance(error.value.__cause__, KeyError)


def test_a_reward_that_never_returns_is_named(build):
    async def hangs(completions, **kwargs):
        await asyncio.sleep(1000)

    def blocks(completions, **kwargs):
        import time

        time.sleep(30)

    for culprit in (hangs, blocks):
        with pytest.raises(RewardError, match=rf"'{culprit.__name__}' did not return within reward_timeout=0.2"):
            build(reward_funcs=[culprit], reward_timeout=0.2).train()


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_timeout_of_the_reward_itself_is_not_taken_for_ours(build, timeout):
    async def asks_a_judge(completions, **kwargs):
        raise TimeoutError("judge: connect timed out")

    def asks_another(completions, **kwargs):
        raise TimeoutError("judge: connect timed out")

    for culprit in (asks_a_judge, asks_another):
        with pytest.raises(RewardError, match=f"'{culprit.__name__}' raised TimeoutError: judge: connect timed out"):
            build(reward_funcs=[culprit], reward_timeout=timeout).train()


def test_tensors_and_numpy_scalars_are_rewards(build):
    import numpy

    def tensor(completions, **kwargs):
        return torch.tensor(low_bytes(completions))

    def scalars(completions, **kwargs):
        return [numpy.float32(value) for value in spread_bytes(completions)]

    train(build(reward_funcs=[tensor, scalars]))


# Mistakes that are found before a model is loaded


def needs_answer(completions, answer, **kwargs):
    return [1.0 for _ in completions]


def answered():
    dataset = letters_dataset()
    return dataset.add_column("answer", ["a"] * len(dataset))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"reward_funcs": []}, ["reward_funcs", "empty"]),
        ({"reward_funcs": None}, ["reward_funcs", "empty"]),
        ({"reward_funcs": [low_bytes, 3]}, ["reward_funcs[1]", "3"]),
        ({"reward_funcs": needs_answer}, ["'needs_answer'", "`answer`", "prompt"]),
        ({"dataset": letters_dataset().rename_column("prompt", "question")}, ["`prompt`", "question"]),
        (
            {"reward_funcs": needs_answer, "dataset": answered(), "eval_dataset": {"hard": letters_dataset()}},
            ["'needs_answer'", "`answer`", "evaluation dataset 'hard'"],
        ),
        ({"eval_dataset": letters_dataset().rename_column("prompt", "q")}, ["`prompt`", "evaluation dataset"]),
        ({"reward_weights": [1.0]}, ["reward_weights", "1 entries", "2 reward functions"]),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(tmp_path, arguments, words):
    arguments = {"reward_funcs": REWARDS, "dataset": letters_dataset(), **arguments}
    weights = arguments.get("reward_weights")
    with pytest.raises(ValueError) as error:
        GD2POTrainer(
            "no/such-model",
            arguments["reward_funcs"],
            tiny_args(tmp_path, reward_weights=weights),
            train_dataset=arguments["dataset"],
            eval_dataset=arguments.get("eval_dataset"),
        )
    assert all(word in str(error.value) for word in words), str(error.value)


def test_light_import():
    import subprocess
    import sys

    code = (
        "import sys, gd2po_trl; "
        "print([m for m in ('torch', 'vllm', 'wandb', 'sklearn', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    code = "from gd2po_trl import GD2POTrainer; import sys; print([m for m in ('vllm', 'wandb') if m in sys.modules])"
    # TRL itself imports wandb and vllm where they are installed; we must not be what pulls them in.
    theirs = "from trl import GRPOTrainer; import sys; print([m for m in ('vllm', 'wandb') if m in sys.modules])"
    outputs = [
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True).stdout
        for text in (code, theirs)
    ]
    assert outputs[0] == outputs[1]


def test_model_card(build, tmp_path):
    trainer = build(reward_weights=[1.0, 0.5])
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "run" / "README.md").read_text()
    for words in ("GD²PO-Hard", "2606.16771", "| `spread_bytes` | 0.5 |", "| `conflict_filter` | `hard` |", "gd2po"):
        assert words in card
    assert card.count("## Rewards and method") == 1
    assert card.count("## Quick start") == 1 and "## Training procedure" in card
    assert "None" not in card.split("## Training procedure")[0]
    assert "fine-tuned version of `" in card and "time machine" not in card
    # The code loads this model and asks it what it was trained on.
    (code,) = re.findall(r"## Quick start\n\n```python\n(.*?)```", card, re.DOTALL)
    assert f"prompt = {trainer.train_dataset[0]['prompt']!r}" in code
    assert f"model={trainer.args.output_dir.rpartition('/')[2]!r}" in code and "merge" not in card
    compile(code, "card", "exec")
