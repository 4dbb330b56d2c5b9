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
Tool calling with LoRA: correct calls in the right format against long thoughts, on ToolRL's data.

In a clone of this repository, with one GPU of 24 GB:

    uv run examples/tool_calling_lora.py
    uv run examples/tool_calling_lora.py --data rlla_4k/train.parquet --model my/policy     # local files

The recipe `tool_calling/Qwen2.5-1.5B-Instruct/lora` is the same with the published batch sizes, and with vLLM, which
generates many times faster. This script has all of it in sight, to be changed.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoTokenizer

from gd2po_trl import GD2POConfig, GD2POTrainer
from gd2po_trl.datasets import drop_long_prompts, load_dataset_by_name
from gd2po_trl.rewards import resolve_reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen/Qwen2.5-1.5B-Instruct", help="folder or Hub id of the policy")
    parser.add_argument("--data", help="parquet file or Hub id (default: ToolRL's 3,920 training rows on the Hub)")
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps (default: 50)")
    parser.add_argument("--batch", type=int, default=64, help="rollouts per step, a multiple of 4 (default: 64)")
    parser.add_argument("--length", type=int, default=512, help="longest completion in tokens (default: 512)")
    parser.add_argument("--output", default="outputs/tool_calling_lora", help="folder of the adapter and its rollouts")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    # GPUs before Ampere, such as the T4, have no bfloat16.
    has_bf16 = on_gpu and torch.cuda.get_device_capability() >= (8, 0)

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    dataset, _ = drop_long_prompts(load_dataset_by_name("rlla_4k", options.data), tokenizer, 2048)
    trainer = GD2POTrainer(
        model=options.model,
        reward_funcs=[
            resolve_reward("correctness", {"max_score": 3.0}),
            resolve_reward("format"),
            resolve_reward("length", {"max_words": 256}),
        ],
        args=GD2POConfig(
            output_dir=options.output,
            conflict_filter="hard",
            num_generations=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=options.batch // 4,
            max_completion_length=options.length,
            max_steps=options.steps,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            log_completions=True,
            num_completions_to_print=2,
            save_strategy="no",
            report_to="none",
            use_cpu=not on_gpu,
            bf16=has_bf16,
            fp16=on_gpu and not has_bf16,
            gradient_checkpointing=on_gpu,
            model_init_kwargs={"dtype": "bfloat16" if has_bf16 else "float16" if on_gpu else "float32"},
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    print(f"The adapter and its rollouts are in {options.output}. Next: gd2po analyze {options.output}")


if __name__ == "__main__":
    main()
