"""Runs of `test_distributed.py`: train on scripted rollouts, alone or as one of several processes."""

import argparse
import hashlib
import os
from pathlib import Path

import torch
from peft import LoraConfig
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args

from gd2po_trl import GD2POTrainer


GLOBAL_BATCH = 24
WORLD = int(os.environ.get("WORLD_SIZE", 1))
RANK = int(os.environ.get("RANK", 0))
# Each of two processes holds 12 of 24 rollouts, so that a group of 8 is split between them; of three, 8.
CONFIGURATIONS = {
    "groups_of_4": {"num_generations": 4},
    "groups_of_8": {"num_generations": 8},
    "one_group": {"num_generations": 24},
    "groups_of_8_all_rows": {"num_generations": 8, "skip_zero_advantage_rows": False},
    "budget": {
        "num_generations": 8,
        "conflict_filter": None,
        "update_share": 0.4,
        "estimator": "gd2po_trl.estimators.rvpo",
        "reward_weight_schedules": {"spread_bytes": {"linear": {0: 0.5, 4: 1.0}}},
    },
    # A group over two processes, or over three; every rollout has a gradient, and a reference is asked for.
    "groups_of_12_lora": {
        "num_generations": 12,
        "lora": True,
        "beta": 0.1,
        "gradient_checkpointing": True,
        "learning_rate": 0.05,
    },
}
REWARDS = [low_bytes, spread_bytes]


class ScriptedRollouts:
    """Completions that follow from their place in the global batch, not from sampling."""

    def __init__(self):
        self.batches = 0

    def __call__(self, prompts, trainer):
        completion_ids = []
        for place in range(RANK * len(prompts), (RANK + 1) * len(prompts)):
            digest = hashlib.sha256(f"{self.batches}-{place}".encode()).digest()
            completion_ids.append([5 + byte for byte in digest[1 : 3 + digest[0] % 7]])
        self.batches += 1
        prompt_ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def fails_on_rank_1(completions, **kwargs):
    if RANK == 1:
        raise SystemExit(0)  # as of a script that a code reward executes
    return low_bytes(completions)


def place_in_alphabet(prompts, completions, **kwargs):
    return [float(ord(prompt.removeprefix("say ")[0]) - ord("a")) for prompt in prompts]


def validate(policy: str, output: Path) -> None:
    """Evaluates on 5 and on 3 rows, 4 at a time: on two processes the last batches are filled up with first rows."""
    args = tiny_args(
        output,
        num_generations_eval=1,
        eval_temperature=0.0,
        per_device_eval_batch_size=4 // WORLD,
        log_completions=True,
        num_completions_to_print=0,
        ddp_backend="gloo" if WORLD > 1 else None,
    )
    sets = {"five": letters_dataset(5), "three": letters_dataset(3)}
    rewards = [place_in_alphabet, low_bytes]
    trainer = GD2POTrainer(policy, rewards, args, train_dataset=letters_dataset(), eval_dataset=sets)
    trainer.evaluate()
    trainer.save_state()


def run(policy: str, output: Path, reward_funcs, rollout_func=None, resume=None, **overrides) -> GD2POTrainer:
    adapter = None
    if overrides.pop("lora", False):
        torch.manual_seed(0)
        # B matrices that are not 0 from the start, so that a fault in the adapter's path shows.
        adapter = LoraConfig(
            r=4, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", init_lora_weights=False
        )
    trainer = GD2POTrainer(
        policy,
        reward_funcs,
        tiny_args(
            output,
            per_device_train_batch_size=GLOBAL_BATCH // 2 // WORLD,
            gradient_accumulation_steps=2,
            max_steps=4,
            log_completions=True,
            num_completions_to_print=1,
            shuffle_dataset=False,
            ddp_backend="gloo" if WORLD > 1 else None,
            # Adam would blow up rounding where a gradient is nearly 0.
            **{"optim": "sgd", "learning_rate": 0.5, **overrides},
        ),
        train_dataset=letters_dataset(),
        rollout_func=rollout_func,
        peft_config=adapter,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()
    assert trainer._update.packing_off is None
    wrapped = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    after = trainer.accelerator.get_state_dict(wrapped)
    if trainer.is_world_process_zero():
        torch.save({"before": before, "after": after}, output / "parameters.pt")
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("policy")
    parser.add_argument("output", type=Path)
    parser.add_argument("--fail", action="store_true")
    parser.add_argument("--only", choices=list(CONFIGURATIONS))
    arguments = parser.parse_args()
    if arguments.fail:
        run(arguments.policy, arguments.output, [fails_on_rank_1, spread_bytes], ScriptedRollouts(), num_generations=4)
    for name in [arguments.only] if arguments.only else CONFIGURATIONS:
        run(arguments.policy, arguments.output / name, REWARDS, ScriptedRollouts(), **CONFIGURATIONS[name])
    if not arguments.only:
        validate(arguments.policy, arguments.output / "validation")
