"""The update budget in training: what it promises about the gradient, where it is refused, how a run resumes."""

import itertools
import json

import pytest
import torch
from test_row_skipping import LOSS_TYPES, build, flat_gradient, random_batch
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from gd2po_trl import GD2POConfig, GD2POTrainer
from gd2po_trl.advantages import draw_probabilities, subsample_at
from gd2po_trl.update.budget import UpdateBudget, trainable_advantages


def sampled(policy, folder, resume=None, **overrides):
    """Train on completions that the policy samples, in batches of 16 rollouts and two optimizer steps."""
    sizes = {"per_device_train_batch_size": 8, "steps_per_generation": 2, "num_generations": 8, "max_steps": 8}
    args = tiny_args(folder, **{"update_share": 0.5, **sizes, **overrides})
    trainer = GD2POTrainer(str(policy), [low_bytes, spread_bytes], args, train_dataset=letters_dataset(16))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def budget_of(trainer):
    (budget,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, UpdateBudget))
    return budget


def metric(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# What it promises


@pytest.fixture(scope="module")
def trainer(tiny_policy, tmp_path_factory):
    return build(tiny_policy, tmp_path_factory.mktemp("trainer"))


def gradient_of(trainer, batch):
    trainer.model.zero_grad()
    super(GD2POTrainer, trainer)._compute_loss(trainer.model, batch).backward()
    return flat_gradient(trainer)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_expected_gradient_is_that_of_all_rollouts(trainer, loss_type):
    """At the generating policy, over every draw there is, each by its probability; an importance ratio of vLLM too."""
    trainer.loss_type, trainer.importance_sampling_level = loss_type, "token"
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    batch = random_batch(0, zeros=(3,), empty=(5,), old=False)
    batch["importance_sampling_ratio"] = torch.rand(batch["completion_ids"].shape) + 0.5
    if loss_type != "vespo":
        batch["importance_sampling_ratio"][6] = 0.0
    try:
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        full = gradient_of(trainer, batch)
        advantages = trainable_advantages(batch, loss_type)
        assert advantages[5] == 0 and (advantages[6] == 0) == (loss_type != "vespo")
        position = draw_probabilities(advantages.double(), 0.4).cumsum(0)
        edges = torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), 1 - position.remainder(1)]).unique()
        mean, rows = torch.zeros_like(full), set()
        for low, high in itertools.pairwise(edges):
            drawn = subsample_at(advantages, 0.4, (low + high) / 2)
            rows.add(int((drawn != 0).sum()))
            mean += (high - low) * gradient_of(trainer, {**batch, "advantages": drawn})
    finally:
        trainer.use_vllm = False
    assert rows <= {3, 4}
    assert (mean - full).norm() / full.norm() < 1e-5


def test_budget_is_kept_and_logged(tiny_policy, tmp_path):
    trainer = sampled(tiny_policy, tmp_path, max_steps=4, log_completions=True, num_completions_to_print=0)
    # A generation batch of 16 rollouts: one metric per batch, over two steps each.
    assert metric(trainer, "gd2po/drawn_ratio") == pytest.approx([0.5] * 2, abs=1 / 16)
    assert metric(trainer, "gd2po/trained_rows") == pytest.approx(metric(trainer, "gd2po/drawn_ratio"))
    assert all(noise > 1 for noise in metric(trainer, "gd2po/budget_noise"))
    whole = sampled(tiny_policy, tmp_path / "whole", max_steps=4, update_share=1.0, conflict_filter=None)
    fewer = sum(metric(trainer, "gd2po/update_tokens")) / sum(metric(whole, "gd2po/update_tokens"))
    assert 0.3 < fewer < 0.8  # prompts of about the length of a completion are run for fewer rollouts
    table = trainer._logs["advantages"]
    assert len(table) == 16
    assert sum(value != 0 for value in table) == pytest.approx(8, abs=1)


@pytest.mark.parametrize("method", ["sum_then_normalize", "normalize_then_sum"])
def test_any_method_without_row_skipping(tiny_policy, tmp_path, method):
    settings = {"multi_objective_aggregation": method, "conflict_filter": None, "update_share": 0.25, "max_steps": 4}
    skipping = sampled(tiny_policy, tmp_path, **settings)
    running = sampled(tiny_policy, tmp_path, skip_zero_advantage_rows=False, **settings)
    assert metric(running, "gd2po/drawn_ratio") == pytest.approx([0.25] * 2, abs=1 / 16)
    for name, value in weights(skipping).items():
        torch.testing.assert_close(value, weights(running)[name], rtol=0, atol=1e-5)


def test_whole_share_changes_nothing(tiny_policy, tmp_path):
    whole = sampled(tiny_policy, tmp_path, update_share=1.0, max_steps=2)
    plain = sampled(tiny_policy, tmp_path, update_share=1, max_steps=2)
    assert not metric(whole, "gd2po/drawn_ratio")
    assert "UpdateBudget" not in whole.state.stateful_callbacks
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(whole).items())


def test_evaluation_draws_nothing(tiny_policy, tmp_path):
    args = tiny_args(tmp_path, update_share=0.5, per_device_eval_batch_size=8)
    dataset = letters_dataset(8)
    trainer = GD2POTrainer(
        str(tiny_policy), [low_bytes, spread_bytes], args, train_dataset=dataset, eval_dataset=dataset
    )
    assert "eval_gd2po/drawn_ratio" not in trainer.evaluate()
    assert budget_of(trainer).batches == 0


# Resuming


@pytest.mark.parametrize("restore_callbacks", [False, True])
def test_a_resumed_run_draws_what_the_uninterrupted_one_does(tiny_policy, tmp_path, restore_callbacks):
    saving = {
        "save_strategy": "steps",
        "save_steps": 4,
        "num_iterations": 2,
        "max_steps": 16,
        "restore_callback_states_from_checkpoint": restore_callbacks,
    }
    whole = sampled(tiny_policy, tmp_path, **saving)
    saved = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["UpdateBudget"]["args"] == {"batches": 2}
    resumed = sampled(tiny_policy, tmp_path, tmp_path / "checkpoint-8", **saving)
    assert budget_of(whole).batches == budget_of(resumed).batches == 4
    assert all(torch.equal(value, weights(resumed)[name]) for name, value in weights(whole).items())


def test_a_run_without_a_budget_can_be_resumed_with_one(tiny_policy, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    sampled(tiny_policy, tmp_path, update_share=1.0, **saving)
    resumed = sampled(tiny_policy, tmp_path, tmp_path / "checkpoint-2", **saving)
    assert budget_of(resumed).batches == 1


def test_draws_depend_on_seed_and_batch_alone():
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first, again, other = UpdateBudget(), UpdateBudget(), UpdateBudget()
    draws = [first.draw(values, 0.5, seed=1) for _ in range(4)]
    torch.manual_seed(2)
    assert all(torch.equal(draw, again.draw(values, 0.5, seed=1)) for draw in draws)
    assert any(not torch.equal(draws[0], draw) for draw in draws[1:])
    assert any(not torch.equal(draw, other.draw(values, 0.5, seed=2)) for draw in draws)
    assert torch.equal(draws[3], UpdateBudget(batches=3).draw(values, 0.5, seed=1))
    state = torch.get_rng_state()
    UpdateBudget().draw(values, 0.5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


# Refusals


@pytest.mark.parametrize("share", [0, -1, 1.5, "half", None, True, float("nan")])
def test_other_shares_are_refused(tmp_path, share):
    with pytest.raises(ValueError, match="update_share"):
        tiny_args(tmp_path, update_share=share)


@pytest.mark.parametrize(
    ("key", "value"),
    [("beta", 0.1), ("top_entropy_quantile", 0.5), ("entropy_coef", 0.01), ("use_adaptive_entropy", True)],
)
def test_settings_that_train_every_rollout_are_refused(tmp_path, key, value):
    if key not in GD2POConfig.__dataclass_fields__:
        pytest.skip(f"this version of TRL has no `{key}`")
    with pytest.raises(ValueError, match=rf"(?s)update_share.*{key}"):
        tiny_args(tmp_path, update_share=0.5, **{key: value})
    assert tiny_args(tmp_path, update_share=1.0, **{key: value}).update_share == 1


def test_a_budget_that_saves_nothing_is_said(tmp_path):
    (message,) = tiny_args(tmp_path, update_share=0.5, skip_zero_advantage_rows=False).ineffective_settings()
    assert "update_share" in message and "skip_zero_advantage_rows" in message
    assert not tiny_args(tmp_path, update_share=0.5).ineffective_settings()


def test_auxiliary_loss_of_a_mixture_of_experts_is_refused(tiny_policy, tmp_path):
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=261,
            hidden_size=16,
            intermediate_size=16,
            moe_intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            num_experts=2,
            num_experts_per_tok=1,
        )
    )
    from transformers import AutoTokenizer

    arguments = {"processing_class": AutoTokenizer.from_pretrained(tiny_policy), "train_dataset": letters_dataset()}
    with pytest.raises(ValueError, match=r"(?s)update_share.*router_aux_loss_coef"):
        GD2POTrainer(model, low_bytes, tiny_args(tmp_path, update_share=0.5), **arguments)
    free = tiny_args(tmp_path, update_share=0.5, router_aux_loss_coef=0.0)
    assert GD2POTrainer(model, low_bytes, free, **arguments).args.update_share == 0.5
