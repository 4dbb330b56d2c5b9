# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "gd2po-trl",
#     "torch==2.13.0",
#     "trl==1.16.0",
#     "transformers==5.23.0",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "datasets==5.2.0",
# ]
#
# [tool.uv.sources]
# gd2po-trl = { path = "..", editable = true }
# ///
"""
GD²PO on two rewards of your own: the right number, and few words.

In a clone of this repository:

    uv run examples/two_rewards.py                                   # Qwen2.5-0.5B-Instruct, on a GPU of 16 GB
    uv run examples/two_rewards.py --model HuggingFaceTB/SmolLM2-135M-Instruct --steps 5    # on a CPU, to see it run

Change `right` and `brief`, and the questions. `gd2po analyze OUTPUT` then says how much your rewards conflict.
"""

import argparse
import random
import re

import torch
from datasets import Dataset

from gd2po_trl import GD2POConfig, GD2POTrainer


def right(completions, answer, **kwargs):
    """1 where the last number of the completion is the answer. A column of the data set arrives by its name."""
    numbers = [re.findall(r"-?\d+", completion[-1]["content"]) for completion in completions]
    return [float(bool(found) and found[-1] == wanted) for found, wanted in zip(numbers, answer, strict=True)]


def brief(completions, **kwargs):
    """From 1 for an empty completion down to 0 for 100 words and more."""
    return [max(0.0, 1 - len(completion[-1]["content"].split()) / 100) for completion in completions]


def questions(count: int, seed: int = 0) -> Dataset:
    numbers = random.Random(seed)
    pairs = [(numbers.randint(10, 99), numbers.randint(10, 99)) for _ in range(count)]
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"What is {a} + {b}? Explain."}] for a, b in pairs],
            "answer": [str(a + b) for a, b in pairs],
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct", help="folder or Hub id of the policy")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--batch", type=int, default=32, help="rollouts per step, a multiple of 8 (default: 32)")
    parser.add_argument("--length", type=int, default=256, help="longest completion in tokens (default: 256)")
    parser.add_argument("--output", default="outputs/two_rewards", help="folder of the policy and its rollouts")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    # GPUs before Ampere, such as the T4, have no bfloat16.
    has_bf16 = on_gpu and torch.cuda.get_device_capability() >= (8, 0)

    trainer = GD2POTrainer(
        model=options.model,
        reward_funcs=[right, brief],
        args=GD2POConfig(
            output_dir=options.output,
            conflict_filter="hard",  # "snr" also trains on mild conflicts, None on all of them (GDPO)
            num_generations=8,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=options.batch // 8,
            max_completion_length=options.length,
            max_steps=options.steps,
            learning_rate=2e-6,
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=2,
            save_strategy="no",
            report_to="none",
            use_cpu=not on_gpu,
            bf16=has_bf16,
            fp16=on_gpu and not has_bf16,
            gradient_checkpointing=on_gpu,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=questions(1000),
    )
    trainer.train()
    trainer.save_model()
    print(f"The policy and its rollouts are in {options.output}. Next: gd2po analyze {options.output}")


if __name__ == "__main__":
    main()
