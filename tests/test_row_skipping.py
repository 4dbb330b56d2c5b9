"""Leaving out rollouts without advantage: the same gradient and the same training, from fewer rows."""

import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args
from trl import GRPOTrainer

from gd2po_trl import GD2POTrainer
from gd2po_trl.update.refusals import reason_to_train_all_rows
from gd2po_trl.update.rows import LOSS_DENOMINATORS, loss_mask


LOSS_TYPES = sorted(LOSS_DENOMINATORS)
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


class ScriptedTrainer(GD2POTrainer):
    """Takes the advantages of the n-th generation batch from `script[n]`, so that a test decides which are 0."""

    script: list[list[float]] = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            index = self._step // (self.args.steps_per_generation * self.num_iterations)
            output["advantages"] = torch.tensor(self.script[index % len(self.script)])
        return output


def build(policy: Path, folder: Path, trainer_class=GD2POTrainer, lora=False, rewards=None, **overrides):
    torch.manual_seed(0)
    return trainer_class(
        model=str(policy),
        reward_funcs=rewards or [low_bytes, spread_bytes],
        args=tiny_args(folder, **{"learning_rate": 1e-3, **overrides}),
        train_dataset=letters_dataset(32),
        peft_config=LoraConfig(**LORA) if lora else None,
    )


def random_batch(seed=0, rows=8, prompt=5, length=12, tools=False, zeros=(1, 2, 5, 6), empty=(), old=True):
    """A micro-batch as TRL buffers it: left-padded prompts, right-padded completions, advantages of 0 at `zeros`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 261, (rows, prompt + length), generator=generator)
    prompt_lengths = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    lengths = torch.randint(2, length - 2, (rows, 1), generator=generator)
    if zeros:
        lengths[zeros[0]] = length  # columns that only rows without advantage fill
    lengths[list(empty)] = 0
    advantages = torch.randn(rows, generator=generator)
    advantages[list(zeros)] = 0.0
    batch = {
        "prompt_ids": ids[:, :prompt],
        "prompt_mask": (torch.arange(prompt) >= prompt - prompt_lengths).long(),
        "completion_ids": ids[:, prompt:],
        "completion_mask": (torch.arange(length) < lengths).long(),
        "advantages": advantages,
        "num_items_in_batch": torch.tensor(100.0),
    }
    if tools:
        batch["tool_mask"] = torch.randint(0, 2, (rows, length), generator=generator)
    if old:
        batch["old_per_token_logps"] = -5.6 + 0.3 * torch.randn(rows, length, generator=generator)
    return batch


def flat_gradient(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.requires_grad])


def reduce(trainer, batches):
    # What TRL logs when it has generated; only a metric is made of it.
    trainer._metrics["train"]["completions/mean_length"].append(
        float(batches[0]["completion_mask"].sum(1).float().mean())
    )
    trainer.model.train()
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = len(batches)
    trainer._step, trainer._update._buffer, trainer._buffered_inputs = 0, None, batches
    return [trainer._update.micro_batch(batches[0]), *trainer._buffered_inputs[1:]]


def relative_error(trainer, batches) -> float:
    """Of the gradient over the trained rows, against TRL's over all rows."""
    trainer.model.train()
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    for batch in batches:
        super(GD2POTrainer, trainer)._compute_loss(trainer.model, batch).backward()
    full = flat_gradient(trainer)
    assert full.norm() > 0
    trainer.model.zero_grad()
    for slot, batch in enumerate(reduce(trainer, batches)):
        trainer._step = slot
        trainer.accelerator.gradient_state._set_sync_gradients(slot == len(batches) - 1)
        with trainer._update.slot():
            trainer.accelerator.backward(trainer._compute_loss(trainer.model, batch))
    reduced = flat_gradient(trainer)
    return float((reduced - full).norm() / full.norm())


@pytest.fixture(
    scope="module", params=[(False, True), (True, True), (True, False)], ids=["full", "lora", "padded lora"]
)
def trainer(request, tiny_policy, tmp_path_factory):
    lora, packed = request.param
    trainer = build(tiny_policy, tmp_path_factory.mktemp("trainer"), lora=lora, packed_update=packed)
    if lora:  # the B matrices start at 0, and with them the gradient of the A matrices
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return trainer


# The gradient


@pytest.mark.parametrize("tools", [False, True], ids=["text", "tools"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_gradient_equals_that_over_all_rows(trainer, loss_type, level, tools):
    trainer.loss_type, trainer.importance_sampling_level = loss_type, level
    batches = [random_batch(1, tools=tools), random_batch(2, tools=tools, zeros=(0, 3), empty=(4,))]
    assert relative_error(trainer, batches) < 1e-5


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("zeros", [(), range(8), range(1, 8)], ids=["none", "all", "all but one"])
def test_gradient_for_extreme_shares(trainer, loss_type, zeros):
    trainer.loss_type, trainer.importance_sampling_level = loss_type, "token"
    assert relative_error(trainer, [random_batch(3, old=False), random_batch(4, zeros=tuple(zeros), old=False)]) < 1e-5


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo"])
def test_rows_without_a_token_that_counts_are_left_out(trainer, loss_type):
    """Truncated completions that TRL masks keep their advantage but have nothing to train."""
    trainer.loss_type, trainer.importance_sampling_level = loss_type, "token"
    batch = random_batch(5, zeros=(), empty=(0, 1, 2, 3, 4))
    assert len(reduce(trainer, [batch])[0]["advantages"]) == 3
    assert relative_error(trainer, [batch]) < 1e-5


def test_gradient_with_the_importance_ratio_of_vllm(trainer):
    trainer.loss_type, trainer.importance_sampling_level = "vespo", "token"
    for columns in (12, 1):  # one ratio per token, or one per sequence
        ratio = torch.rand(8, columns) + 0.5
        batch = random_batch(6)
        if columns > 1:  # TRL gives the padding a ratio of 1
            ratio = torch.where(batch["completion_mask"] != 0, ratio, 1.0)
        assert relative_error(trainer, [{**batch, "importance_sampling_ratio": ratio}]) < 1e-5


def test_lengths_keep_to_the_multiple_that_padding_uses(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "pad_to_multiple_of", 8)
    trainer.model.train()
    for used, width in ((3, 8), (9, 16)):
        batch = random_batch(7, length=24, zeros=range(1, 8))
        batch["completion_mask"][0] = (torch.arange(24) < used).long()
        assert reduce(trainer, [batch])[0]["completion_ids"].size(1) == width


# Whole runs


def train(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def largest_difference(first: dict, second: dict) -> float:
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def with_and_without_skipping(policy, folder, trainer_class=GD2POTrainer, **overrides):
    """Train twice; returns the trainer that skipped and the largest difference between the parameters."""
    stock = build(
        policy, folder / "all", trainer_class, skip_zero_advantage_rows=False, packed_update=False, **overrides
    )
    start = {name: p.detach().clone() for name, p in stock.model.named_parameters() if p.requires_grad}
    expected = train(stock)
    assert largest_difference(start, expected) > 1e-4
    skipping = build(policy, folder / "trained", trainer_class, **overrides)
    return skipping, largest_difference(expected, train(skipping))


def few_letters(completions, **kwargs):
    """A reward on which most groups agree, so that stock GRPO leaves them without advantage."""
    return [float(completion.count("a") > 0) for completion in completions]


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 2},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "loss_type": "bnpo"},
        {"num_iterations": 2, "loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"num_iterations": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 4, "lora": True},
        {"multi_objective_aggregation": "sum_then_normalize", "rewards": [few_letters], "loss_type": "dr_grpo"},
        {"conflict_filter": None, "whitening_shift_mean": False, "rewards": [few_letters]},
        {"mask_truncated_completions": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda overrides: "-".join(map(str, overrides)) or "defaults",
)
def test_training_equals_that_over_all_rows(tiny_policy, tmp_path, overrides):
    trainer, difference = with_and_without_skipping(tiny_policy, tmp_path, max_steps=4, **overrides)
    assert difference < 1e-6
    shares = [entry["gd2po/trained_rows"] for entry in trainer.state.log_history if "gd2po/trained_rows" in entry]
    assert min(shares) < 1.0


SIGNAL, NOTHING = [1.0, 0.0, 0.0, -1.0, 0.5, 0.0, 0.0, 0.0], [0.0] * 8


def count_rows(trainer) -> dict[str, list[int]]:
    """Rows of every forward pass, of the update and of what prepares it."""
    rows = {"update": [], "old": []}
    forward = trainer._get_per_token_logps_and_entropies

    def counting(model, input_ids, *args, **kwargs):
        logps = forward(model, input_ids, *args, **kwargs)
        if logps[0] is not None:
            rows["update" if kwargs.get("compute_entropy") else "old"].append(len(input_ids))
        return logps

    trainer._get_per_token_logps_and_entropies = counting
    return rows


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_empty_micro_batches_train_like_full_ones_of_zeros(tiny_policy, tmp_path, monkeypatch, lora):
    """The optimizer goes on by its momentum and decays weights, also where nothing is left to learn from."""
    monkeypatch.setattr(ScriptedTrainer, "script", [SIGNAL + NOTHING, NOTHING + NOTHING, NOTHING + SIGNAL])
    overrides = {"lora": lora, "max_steps": 6, "steps_per_generation": 2, "weight_decay": 0.1, "loss_type": "grpo"}
    trainer, difference = with_and_without_skipping(
        tiny_policy, tmp_path, ScriptedTrainer, gradient_accumulation_steps=1, **overrides
    )
    assert difference < 1e-6
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert [step["grad_norm"] for step in steps[2:4]] == [0.0, 0.0]
    assert steps[2]["gd2po/trained_rows"] == 0.0 and "entropy" not in steps[2]
    assert steps[0]["gd2po/trained_rows"] == 3 / 16


def test_empty_micro_batches_cost_no_forward(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedTrainer, "script", [SIGNAL + SIGNAL, NOTHING + NOTHING, SIGNAL + NOTHING])
    trainer = build(
        tiny_policy,
        tmp_path,
        ScriptedTrainer,
        max_steps=3,
        steps_per_generation=2,
        gradient_accumulation_steps=2,
        num_iterations=1,
    )
    rows = count_rows(trainer)
    trainer.train()
    assert rows["old"] == []
    assert sum(rows["update"]) == 9 and 3 <= len(rows["update"]) <= 4


class TrainerOfUnusedParameters(ScriptedTrainer):
    """With a part that no forward pass uses, as the image encoder of a model that trains on text."""

    def __init__(self, model, *args, **kwargs):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model)
        model.unused = torch.nn.Linear(4, 4)
        super().__init__(model, *args, **kwargs)


def test_parameters_that_no_pass_uses_do_not_decay(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainerOfUnusedParameters, "script", [SIGNAL, NOTHING])
    trainer, difference = with_and_without_skipping(
        tiny_policy, tmp_path, TrainerOfUnusedParameters, max_steps=4, weight_decay=0.5
    )
    assert difference < 1e-6
    assert trainer.model.unused.weight.grad is None


def test_trained_tokens_are_a_share_of_all_that_were_generated(tiny_policy, tmp_path):
    """Completions that were cut off, and masked for it, count in the mean length though none of them is trained."""
    trainer = build(tiny_policy, tmp_path, mask_truncated_completions=True, conflict_filter=None, max_steps=4)
    trained = []
    compute_loss = trainer._compute_loss

    def count(model, inputs):
        trained.append(int((loss_mask(inputs) * (inputs["advantages"] != 0).unsqueeze(1)).sum()))
        return compute_loss(model, inputs)

    trainer._compute_loss = count
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "gd2po/trained_tokens" in entry]
    assert any(entry["completions/clipped_ratio"] > 0 for entry in entries)
    generated = [8 * entry["completions/mean_length"] for entry in entries]
    shares = [entry["gd2po/trained_tokens"] for entry in entries]
    assert sum(trained) == pytest.approx(sum(n * share for n, share in zip(generated, shares, strict=True)))


def test_old_log_probabilities_are_computed_for_trained_rows_alone(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(ScriptedTrainer, "script", [SIGNAL, NOTHING, SIGNAL])
    trainer = build(tiny_policy, tmp_path, ScriptedTrainer, max_steps=6, num_iterations=2)
    rows = count_rows(trainer)
    trainer.train()
    assert rows == {"update": [3, 3, 3, 3], "old": [3, 3]}

    stock = build(tiny_policy, tmp_path, ScriptedTrainer, max_steps=2, num_iterations=2, beta=0.1)
    rows = count_rows(stock)
    stock.train()
    assert rows == {"update": [8, 8], "old": [8, 8]}  # of the policy and of the reference


# Where it is off


def reasons(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "are not left out" in record.getMessage()]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"beta": 0.1}, "`beta`"),
        ({"entropy_coef": 0.01}, "entropy bonus"),
        ({"top_entropy_quantile": 0.5}, "`top_entropy_quantile`"),
    ],
)
def test_says_why_every_row_is_trained(tiny_policy, tmp_path, monkeypatch, caplog, overrides, reason):
    monkeypatch.setattr(ScriptedTrainer, "script", [SIGNAL])
    with caplog.at_level(logging.WARNING):
        trainer = build(tiny_policy, tmp_path, ScriptedTrainer, **overrides)
    assert len(reasons(caplog)) == 1 and reason in reasons(caplog)[0]
    rows = count_rows(trainer)
    trainer.train()
    assert rows["update"] == [8, 8]
    assert not any("gd2po/trained_rows" in entry for entry in trainer.state.log_history)


def test_every_row_is_trained_without_a_word_where_asked_for(tiny_policy, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = build(tiny_policy, tmp_path, skip_zero_advantage_rows=False)
    assert reasons(caplog) == []
    assert trainer._update.skipping_off is not None


def test_reasons_that_lie_in_the_model_or_in_trl(trainer, monkeypatch):
    assert reason_to_train_all_rows(trainer) is None
    for name, value, reason in [
        ("aux_loss_enabled", True, "mixture-of-experts"),
        ("loss_type", "new_in_trl", "'new_in_trl' is unknown"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(trainer, name, value)
            assert reason in reason_to_train_all_rows(trainer)
    monkeypatch.setattr(trainer, "compute_liger_loss", lambda: None, raising=False)
    assert reason_to_train_all_rows(trainer) is None
    monkeypatch.setattr(trainer.args, "use_liger_kernel", True, raising=False)
    assert "Liger" in reason_to_train_all_rows(trainer)


class TrainerOfTokenAdvantages(GD2POTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["advantages"] = output["advantages"].unsqueeze(1).expand_as(output["completion_ids"]).contiguous()
        return output


class TrainerOfMoreThanText(GD2POTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["token_type_ids"] = None  # present, and empty: no obstacle
        output["pixel_values"] = torch.zeros(len(output["advantages"]), 3)
        return output


@pytest.mark.parametrize(
    ("trainer_class", "entry"), [(TrainerOfTokenAdvantages, "advantages"), (TrainerOfMoreThanText, "pixel_values")]
)
def test_batches_that_cannot_be_cut_are_trained_whole(
    tiny_policy, tmp_path, monkeypatch, caplog, trainer_class, entry
):
    trainer = build(tiny_policy, tmp_path, trainer_class, num_iterations=2)
    rows = []

    def compute_loss(self, model, inputs):
        assert inputs["old_per_token_logps"].shape == inputs["completion_ids"].shape
        rows.append(len(inputs["advantages"]))
        return sum(p.sum() for p in model.parameters()) * 0.0

    monkeypatch.setattr(GRPOTrainer, "_compute_loss", compute_loss)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert rows == [8, 8]
    assert [f"`{entry}`" in reason for reason in reasons(caplog)] == [True]


def test_evaluation_covers_every_row(tiny_policy, tmp_path, monkeypatch):
    trainer = build(tiny_policy, tmp_path, per_device_eval_batch_size=8)
    rows = count_rows(trainer)
    trainer.evaluate(letters_dataset(4))
    assert rows["update"] == [8, 8]


# Several processes


def test_two_processes_with_uneven_shares(tiny_policy, tmp_path):
    script = Path(__file__).parent / "distributed" / "row_skipping.py"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, *launch, str(script), str(tiny_policy), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for first, second in zip(*ranks, strict=True):
        assert first["processes"] == 2
        assert first["moved"] > 1e-4
        assert max(first["difference"], second["difference"]) < 1e-6
        # Either process has as many rows in TRL's loss as the one with more of them, and none where neither has any.
        assert first["rows"] == second["rows"]
        assert 12 <= sum(first["rows"][:2]) < 16
        assert first["trained_rows"] == second["trained_rows"]
        assert first["trained_rows"][:2] == [15 / 32, 0.0]
