"""The packed update: the optimizer step of padded training, from every prompt once and no padding."""

import hashlib
import logging

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
