"""
Any combination of valid settings trains, or is refused before training by a message that names a setting.

`pytest tests/test_configurations.py --hypothesis-profile thorough` draws 1,000 of them.
"""

import torch
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import letters_dataset, low_bytes, spread_bytes, text_of, tiny_settings

from gd2po_trl import GD2POTrainer
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe


def constant(completions, **kwargs):
    return [1.0] * len(completions)


def sometimes(completions, **kwargs):
    """Scores completions with a vowel."""
    return [float(len(text_of(c))) if set(text_of(c)) & set("aeiou") else None for c in completions]


def silent(completions, **kwargs):
    return [None] * len(completions)


REWARDS = {func.__name__: func for func in (low_bytes, spread_bytes, constant, sometimes, silent)}


@st.composite
def recipes(draw) -> tuple[dict, bool]:
    """Settings of a recipe, each valid by itself, and whether to train a LoRA adapter."""
    rewards = draw(st.lists(st.sampled_from(list(REWARDS)), min_size=1, max_size=4, unique=True))
    always = {
        "reward_funcs": rewards,
        "num_generations": draw(st.sampled_from([2, 4, 8])),
        "per_device_train_batch_size": draw(st.sampled_from([2, 4, 8])),
        "gradient_accumulation_steps": draw(st.sampled_from([1, 2, 4])),
        "max_completion_length": draw(st.integers(1, 8)),
    }
    method = st.sampled_from(["grpo", "gdpo", "gd2po_hard", "gd2po_snr"])
    optional = {
        "method": method,
        "conflict_filter": st.sampled_from(["hard", "snr", None]),
        "snr_threshold": st.floats(0, 1),
        "consensus_weighting": st.sampled_from(["before_whitening", "after_whitening", None]),
        "whitening": st.sampled_from(["token", "sequence", None]),
        "whitening_shift_mean": st.booleans(),
        "skip_zero_advantage_rows": st.booleans(),
        "reward_timeout": st.sampled_from([None, 30.0]),
        "scale_rewards": st.sampled_from(["group", "batch", "none", True, False]),
        "multi_objective_aggregation": st.sampled_from(["normalize_then_sum", "sum_then_normalize"]),
        "reward_weights": st.lists(
            st.sampled_from([0.0, 0.5, 1.0, -1.0]), min_size=len(rewards), max_size=len(rewards)
        ),
        "loss_type": st.sampled_from(["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"]),
        "importance_sampling_level": st.sampled_from(["token", "sequence"]),
        "num_iterations": st.sampled_from([1, 2]),
        "steps_per_generation": st.sampled_from([1, 2, 4]),
        "beta": st.sampled_from([0.0, 0.1]),
        "epsilon_high": st.sampled_from([0.2, 0.4]),
        "delta": st.sampled_from([None, 3.0]),
        "entropy_coef": st.sampled_from([0.0, 0.01]),
        "top_entropy_quantile": st.sampled_from([1.0, 0.5]),
        "mask_truncated_completions": st.booleans(),
        "off_policy_mask_threshold": st.sampled_from([None, 0.5]),
        "disable_dropout": st.booleans(),
        "gradient_checkpointing": st.booleans(),
        "log_completions": st.booleans(),
        "num_generations_eval": st.sampled_from([1, 2]),
        "eval_strategy": st.sampled_from(["no", "steps"]),
        "temperature": st.sampled_from([0.7, 1.0]),
        "top_p": st.sampled_from([0.9, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.1]),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
    }
    return {**always, **draw(st.fixed_dictionaries({}, optional=optional))}, draw(st.booleans())


# Each trains: a third of what a profile asks for.
@settings(deadline=None, max_examples=settings.default.max_examples // 3)
@given(recipes())
def test_every_valid_combination_trains_or_is_refused_with_a_reason(tiny_policy, tmp_path_factory, drawn):
    drawn, lora = drawn
    folder = tmp_path_factory.mktemp("run")
    lines = {**tiny_settings(folder), "max_steps": 2, "num_completions_to_print": 1, **drawn}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model_name_or_path": str(tiny_policy), **lines}))
    try:
        recipe = load_recipe(folder / "recipe.yaml")
        trainer = GD2POTrainer(
            str(tiny_policy),
            [REWARDS[name] for name in recipe.arguments.reward_funcs],
            recipe.training,
            train_dataset=letters_dataset(32),
            eval_dataset=letters_dataset(4),
            peft_config=LoraConfig(r=2, target_modules="all-linear") if lora else None,
        )
    except (UsageError, ValueError, NotImplementedError) as refusal:
        event("refused")
        named = [name for name in {**lines, "generation_batch_size": 0} if name in str(refusal)]
        assert named, str(refusal)
        return
    event("trained")
    trainer.train()
    assert all(torch.isfinite(value).all() for value in trainer.model.parameters())
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 2
