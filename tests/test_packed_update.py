"""The packed update: the optimizer step of padded training, from every prompt once and no padding."""

import hashlib
import logging
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig
from tiny import low_bytes, spread_bytes, tiny_args, varied_dataset

from gd2po_trl import GD2POTrainer
from gd2po_trl.update.rows import LOSS_DENOMINATORS


class Rollouts:
    """Completions of 1 to 12 tokens that follow from their place in the batch, not from sampling."""

    def __init__(self, tools=False, rank=0):
        self.batches, self.tools, self.rank = 0, tools, rank

    def __call__(self, prompts, trainer):
        completion_ids = []
        for place in range(self.rank * len(prompts), (self.rank + 1) * len(prompts)):
            digest = hashlib.sha256(f"{self.batches}-{place}".encode()).digest()
            ids = [5 + byte for byte in digest[1 : 2 + digest[0] % 12]]
            completion_ids.append([*ids[:-1], 1] if digest[13] % 2 else ids)  # 1 ends a completion
        self.batches += 1
        output = {
            "prompt_ids": [trainer.processing_class(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": completion_ids,
            "logprobs": [[-5.5 + (token % 7) / 9 for token in ids] for ids in completion_ids],
        }
        if self.tools:
            output["env_mask"] = [[int(n % 5 not in (2, 3)) for n, _ in enumerate(ids)] for ids in completion_ids]
        return output


def run(policy, folder, lora=False, tools=False, trainer_class=GD2POTrainer, **overrides):
    """Train; returns the trainer and how far its parameters moved, flat."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 3, "max_grad_norm": 0.0, "conflict_filter": "hard"}
    trainer = trainer_class(
        model=policy if isinstance(policy, torch.nn.Module) else str(policy),
        reward_funcs=[low_bytes, spread_bytes],
        args=tiny_args(folder, **{**settings, **overrides}),
        train_dataset=varied_dataset(32),
        rollout_func=Rollouts(tools),
        peft_config=config if lora else None,
    )
    if lora:
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [(p.detach() - start[name]).flatten() for name, p in trainer.model.named_parameters() if name in start]
    return trainer, torch.cat(moved)


def both_ways(policy, folder, **overrides):
    """The packed trainer, the padded one, and the relative difference between their steps."""
    padded, expected = run(policy, folder / "padded", packed_update=False, **overrides)
    packed, moved = run(policy, folder / "packed", **overrides)
    assert expected.norm() > 1e-3
    return packed, padded, float((moved - expected).norm() / expected.norm())


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", sorted(LOSS_DENOMINATORS))
def test_step_equals_padded_training(tiny_policy, tmp_path, loss_type, level):
    packed, padded, difference = both_ways(
        tiny_policy,
        tmp_path,
        loss_type=loss_type,
        importance_sampling_level=level,
        gradient_accumulation_steps=2,
        steps_per_generation=4,
        per_device_train_batch_size=4,
    )
    assert difference < 2e-5
    assert packed._update.packing_off is None
    for key in ("loss", "entropy", "grad_norm"):
        assert logged(packed, key) == pytest.approx(logged(padded, key), rel=1e-5, abs=1e-6)
    assert max(logged(packed, "gd2po/update_tokens")) < 0.9 * min(logged(padded, "gd2po/update_tokens"))


@pytest.mark.parametrize(
    "overrides",
    [
        {"lora": True},
        {"lora": True, "gradient_checkpointing": True},
        {"gradient_checkpointing": True},
        {"tools": True},
        {"beta": 0.1},
        {"beta": 0.1, "lora": True},
        {"entropy_coef": 0.01, "loss_type": "bnpo"},
        {"top_entropy_quantile": 0.5},
        {"num_iterations": 2},
        {"num_iterations": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
        {"gradient_accumulation_steps": 3, "steps_per_generation": 4, "num_iterations": 2},
        {"gradient_accumulation_steps": 3, "num_train_epochs": 1, "max_steps": -1},
        {"skip_zero_advantage_rows": False},
        {"per_device_train_batch_size": 1, "num_generations": 8, "gradient_accumulation_steps": 8},
        {"off_policy_mask_threshold": 0.5},
        {"keep_prompts_together": False},
        {"mask_truncated_completions": True, "max_completion_length": 12},
    ],
    ids=lambda overrides: "-".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_step_equals_padded_training_with(tiny_policy, tmp_path, overrides):
    defaults = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    packed, padded, difference = both_ways(tiny_policy, tmp_path, **{**defaults, **overrides})
    assert difference < 2e-5
    assert packed._update.packing_off is None
    for key in ("loss", "entropy", "kl", "policy_loss", "clip_ratio/region_mean", "clip_ratio/low_min"):
        assert logged(packed, key) == pytest.approx(logged(padded, key), rel=1e-5, abs=1e-6)


LIKE_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 261, "pad_token_id": 0}
LIKE_LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 1, "bos_token_id": None}
# Random-init models of many families: what packs exactly, and what must be noticed.
EXACT = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": None},
    "Olmo": {},
    "SmolLM3": {},
    "GPTNeoX": {},
    "OPT": {"dropout": 0.0, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 128},
}
REFUSED = {
    "StableLm": ({}, "keyword"),
    "Mistral": ({"sliding_window": 8}, "window"),
    "Phi3": (
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 16,
            },
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 64,
        },
        "longrope",
    ),
    "Qwen3Moe": ({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}, "experts"),
}


def family(name, settings):
    import transformers

    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**{**LIKE_LLAMA, **settings})
    return getattr(transformers, f"{name}ForCausalLM")(config)


def policy_of(folder, name, settings):
    from tiny import byte_tokenizer

    family(name, settings).save_pretrained(folder / "policy")
    byte_tokenizer().save_pretrained(folder / "policy")
    return folder / "policy"


@pytest.mark.parametrize("name", EXACT)
def test_families_that_pack(tmp_path, name):
    policy = policy_of(tmp_path, name, EXACT[name])
    packed, _, difference = both_ways(policy, tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=4)
    assert packed._update.packing_off is None
    assert difference < 2e-5


@pytest.mark.parametrize("name", REFUSED)
def test_families_that_are_padded(tmp_path, caplog, name):
    settings, reason = REFUSED[name]
    policy = policy_of(tmp_path, name, settings)
    with caplog.at_level(logging.WARNING):
        _, _, difference = both_ways(policy, tmp_path)
    assert difference == 0.0
    said = [record.getMessage() for record in caplog.records if "not packed" in record.getMessage()]
    assert len(said) == 1 and reason in said[0]


def test_activated_lora_is_padded(tiny_policy, tmp_path, caplog):
    """Its weights act from an invocation token on: a token in the shared prompt would not know of the others."""
    config = LoraConfig(
        r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8]
    )
    with caplog.at_level(logging.WARNING):
        trainer = GD2POTrainer(
            str(tiny_policy), [low_bytes, spread_bytes], tiny_args(tmp_path), varied_dataset(32), peft_config=config
        )
    assert "aLoRA" in trainer._update.packing_off
    assert sum("not packed" in record.getMessage() for record in caplog.records) == 1


def test_a_missing_attribute_of_trl_trains_everything_padded(tiny_policy, tmp_path, monkeypatch):
    from gd2po_trl.update import refusals

    trainer, _ = run(tiny_policy, tmp_path)
    assert refusals.reason_to_train_all_rows(trainer) is None and refusals.reason_not_to_pack(trainer) is None
    monkeypatch.delattr(trainer, "aux_loss_enabled")
    assert "aux_loss_enabled" in refusals.reason_to_train_all_rows(trainer)
    assert "aux_loss_enabled" in refusals.reason_not_to_pack(trainer)


class LeakingAttention:
    """What the self-check is for: packed attention that lets a branch see another one."""

    def __init__(self):
        from gd2po_trl.update import layout

        self.rectangle = layout.AttentionLayout._rectangle

    def __call__(self, layout, group):
        rectangle = self.rectangle(layout, group)
        return replace(rectangle, keys=rectangle.keys.roll(1, dims=0), mask=None)


def test_the_self_check_finds_a_leak(tiny_policy, tmp_path, monkeypatch, caplog):
    from gd2po_trl.update import layout

    leak = LeakingAttention()
    monkeypatch.setattr(layout.AttentionLayout, "_rectangle", lambda self, group: leak(self, group))
    with caplog.at_level(logging.WARNING):
        _, _, difference = both_ways(tiny_policy, tmp_path)
    assert difference == 0.0
    assert sum("differ by more than rounding" in record.getMessage() for record in caplog.records) == 1


def test_the_self_check_leaves_the_random_state_and_the_mode(tiny_policy, tmp_path):
    trainer, _ = run(tiny_policy, tmp_path)
    update = trainer._update
    from gd2po_trl.update.rows import describe_rows

    ids = torch.randint(5, 200, (4, 6))
    table = describe_rows(ids[:, :3], torch.ones(4, 3).long(), torch.ones(4, 3))
    trainer.model.train()
    state = torch.get_rng_state()
    update._check(trainer.model, ids[:, :3], ids[:, 3:], table)
    assert torch.equal(state, torch.get_rng_state())
    assert trainer.model.training and update.packing_off is None
    assert trainer.model.config._attn_implementation != "gd2po_packed"


def test_bfloat16_differs_by_rounding(tiny_policy, tmp_path):
    """As far as two padded runs of different padding differ."""
    settings = {"bf16": True, "max_steps": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    packed, _, difference = both_ways(tiny_policy, tmp_path, **settings)
    _, repadded = run(tiny_policy, tmp_path / "more", packed_update=False, pad_to_multiple_of=32, **settings)
    _, expected = run(tiny_policy, tmp_path / "again", packed_update=False, **settings)
    rounding = float((repadded - expected).norm() / expected.norm())
    assert packed._update.packing_off is None
    assert 0 < difference < 3 * rounding


class ScriptedAdvantages(GD2POTrainer):
    advantages: list[float] = []

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            output["advantages"] = torch.tensor(self.advantages)
        return output


@pytest.mark.parametrize("kept", [0, 1, 2, 8])
def test_few_rollouts_with_a_gradient(tiny_policy, tmp_path, monkeypatch, kept):
    monkeypatch.setattr(ScriptedAdvantages, "advantages", ([1.0, -0.5] * 4)[:kept] + [0.0] * (8 - kept))
    settings = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    packed, _, difference = both_ways(tiny_policy, tmp_path, trainer_class=ScriptedAdvantages, **settings)
    assert difference < 2e-5
    assert logged(packed, "gd2po/trained_rows") == [kept / 8] * 3
    if kept == 0:
        assert logged(packed, "gd2po/update_tokens") == [0.0] * 3


class Observations(Rollouts):
    """Prompts that an environment has extended, for each rollout by another observation."""

    def __call__(self, prompts, trainer):
        output = super().__call__(prompts, trainer)
        output["prompt_ids"] = [[*ids, *[9] * (n % 3)] for n, ids in enumerate(output["prompt_ids"])]
        return output


def test_rollouts_of_a_group_with_prompts_of_their_own(tiny_policy, tmp_path, monkeypatch):
    monkeypatch.setattr("test_packed_update.Rollouts", Observations)
    packed, _, difference = both_ways(tiny_policy, tmp_path, gradient_accumulation_steps=2)
    assert difference < 2e-5 and packed._update.packing_off is None


def test_old_reference_and_evaluation_passes_are_packed(tiny_policy, tmp_path):
    trainer, _ = run(tiny_policy, tmp_path, num_iterations=2, beta=0.1)
    padded = []
    trainer._update.padded_logps = lambda *args, **kwargs: padded.append(1)
    trainer.evaluate(varied_dataset(4))
    assert trainer.state.log_history[-1]["eval_loss"] == trainer.state.log_history[-1]["eval_loss"]
    assert not padded
