"""
One command, one GPU, under ten minutes, no network: what training costs there, and whether it learns.

1. Update time and peak memory of ours against TRL's `GRPOTrainer`: a model of Qwen2.5-1.5B's shape with random weights
   and a byte tokenizer, LoRA, bfloat16 (float16 where the GPU has none), gradient checkpointing; no rollout dropped,
   and half of them. "Update" is a whole optimizer step less generation and scoring; the completions are fixed.
2. The time that the advantages of a generation batch take.
3. A longer run of the quickstart's task, with GDPO and with GD²PO-Hard.

    python benchmarks/gpu.py        # writes benchmarks/results/gpu-cuda.json, and prints it

Without a GPU it runs at a reduced size, writes gpu-cpu.json, and says there that the figures of a GPU are missing.
"""

import argparse
import json
import platform
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
import transformers
import trl
from advantages import formula_of_trl, ours, seconds
from datasets import Dataset
from peft import LoraConfig
from step_time import (
    Clock,
    Ours,
    Scale,
    StepTimer,
    Stock,
    Stopwatch,
    fix_completions,
    half_precision,
    run_in_turn,
    step_args,
    table,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    TrainerCallback,
)

import gd2po_trl
from gd2po_trl.progress import RewardProgress
from gd2po_trl.quickstart.prepare import HELD_OUT_FILE, POLICY_FOLDER, TRAIN_FILE, prepare
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe_catalog import recipe_path
from gd2po_trl.run_log import held_out_change, series
from gd2po_trl.training import run_recipe


PARTS = ("update", "advantages", "learning")
METHODS = ("gdpo", "gd2po_hard")
MISSING = "The figures of a GPU are missing: there is none here. These are from a CPU, at a reduced size."


@dataclass(frozen=True)
class Size:
    """
    What fits the device.

    Args:
        shape (`dict`): Of the policy, as settings of `Qwen2Config`.
        micro_batch, accumulation, completion_length (`int`): Rollouts per pass, passes per step, tokens per rollout.
        rounds (`int`): Measured steps per setting.
        batch_sizes (`tuple[int, ...]`): Rollouts per generation batch for the advantages.
        warmup_steps, learning_steps (`int`): Of the learning runs.
        learning_seconds (`float`): After which a learning run ends early.
    """

    shape: dict
    micro_batch: int
    accumulation: int
    completion_length: int
    rounds: int
    batch_sizes: tuple[int, ...]
    warmup_steps: int
    learning_steps: int
    learning_seconds: float


SIZES = {
    # The shape is that of the published config.json of Qwen2.5-1.5B.
    "cuda": Size(
        shape={
            "vocab_size": 151_936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
        },
        micro_batch=8,
        accumulation=4,
        completion_length=512,
        rounds=3,
        batch_sizes=(512, 4096, 65_536),
        warmup_steps=400,
        learning_steps=120,
        learning_seconds=100.0,
    ),
    "cpu": Size(
        shape={
            "vocab_size": 2048,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
        micro_batch=8,
        accumulation=2,
        completion_length=64,
        rounds=3,
        batch_sizes=(512,),
        warmup_steps=200,
        learning_steps=10,
        learning_seconds=120.0,
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def spaces(completions, **kwargs):
    return [float(completion.count(" ")) for completion in completions]


def build(trainer_class, size: Size, device: str, folder: str):
    """A trainer on a new policy, with the instruments of `step_time`."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **size.shape,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    with torch.device(device):  # the initial weights of 1.5 billion parameters take minutes on a CPU
        policy = AutoModelForCausalLM.from_config(config, dtype=half_precision(device))
    args = step_args(
        folder,
        device,
        gradient_checkpointing=True,
        per_device_train_batch_size=size.micro_batch,
        gradient_accumulation_steps=size.accumulation,
        num_generations=8,
        max_completion_length=size.completion_length,
    )
    trainer = trainer_class(
        model=policy,
        reward_funcs=[characters, spaces],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [f"{row:04d} " * 25 for row in range(64)]}),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.generation = Stopwatch(Clock(device))
    trainer.timer = StepTimer(trainer)
    trainer.add_callback(trainer.timer)
    trainer.remove_callback(PrinterCallback)
    rows = size.micro_batch * size.accumulation
    completions = Scale(
        width=0, layers=0, heads=0, vocabulary=258, rows=rows, lengths=(), generated_length=size.completion_length
    )
    fix_completions(trainer, completions, size.completion_length)
    return trainer


def measure_update(size: Size, device: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        stock, mine = build(Stock, size, device, folder), build(Ours, size, device, folder)
        settings = {
            "stock": (stock, 0.5),  # which runs every rollout, whatever is dropped
            "ours, 0 % dropped": (mine, 0.0),
            "ours, 50 % dropped": (mine, 0.5),
        }
        measured = run_in_turn(settings, size.rounds, device)
    clock = "wall" if device == "cuda" else "cpu"
    return [
        {
            "setting": name,
            "update_s": round(values[f"update_{clock}_s"], 5),
            "update_ratio": round(values[f"update_{clock}_ratio"], 4),
            "peak_memory_mib": values["peak_memory_mib"] and round(values["peak_memory_mib"], 1),
        }
        for name, values in measured.items()
    ]


def measure_advantages(size: Size, device: str) -> list[dict]:
    rows = []
    for batch_size in size.batch_sizes:
        for num_rewards in (2, 5):
            generator = torch.Generator().manual_seed(0)
            rewards = torch.randn(batch_size, num_rewards, generator=generator).to(device)
            counts = torch.randint(1, 512, (batch_size,), generator=generator).to(device)
            rows.append(
                {
                    "rollouts": batch_size,
                    "rewards": num_rewards,
                    "compute_advantages_ms": round(1e3 * seconds(ours, (rewards, counts), device), 4),
                    "formula_of_trl_ms": round(1e3 * seconds(formula_of_trl, (rewards, counts), device), 4),
                }
            )
    return rows


class StopAfter(TrainerCallback):
    """Ends a run once it has taken `limit` seconds."""

    def __init__(self, limit: float):
        self.limit = limit

    def on_train_begin(self, args, state, control, **kwargs):
        self.end = time.monotonic() + self.limit

    def on_step_end(self, args, state, control, **kwargs):
        if time.monotonic() > self.end:
            control.should_evaluate = control.should_training_stop = True


def measure_learning(size: Size, device: str) -> list[dict]:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        place = prepare(folder, num_warmup_steps=size.warmup_steps)
        for method in METHODS:
            settings = {
                "method": method,
                "model_name_or_path": place / POLICY_FOLDER,
                "dataset_path": place / TRAIN_FILE,
                "eval_dataset_path": place / HELD_OUT_FILE,
                "output_dir": place / method,
                "use_cpu": device == "cpu",
                "max_steps": size.learning_steps,
                "eval_steps": max(1, size.learning_steps // 4),
            }
            words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
            start = time.perf_counter()
            trainer = run_recipe(
                load_recipe(recipe_path("quickstart/tool_calling"), words),
                callbacks=[StopAfter(size.learning_seconds), RewardProgress()],
            )
            log = trainer.state.log_history
            results.append(
                {
                    "method": method,
                    "steps": trainer.state.global_step,
                    "wall_s": round(time.perf_counter() - start, 1),
                    "held_out": {name: [round(v, 4) for v in pair] for name, pair in held_out_change(log).items()},
                    "conflict_ratio": [round(value, 4) for value in series(log, "gd2po/conflict_ratio")[1]],
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), help="default: cuda where there is a GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all of them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here. Leave it out to run on the CPU at a reduced size.")
    size = SIZES[device]
    warnings.simplefilter("ignore", FutureWarning)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if device == "cpu":
        torch.set_num_threads(1)
        print(MISSING, flush=True)

    start = time.perf_counter()
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread",
        "gpu_figures": "present" if device == "cuda" else MISSING,
        "clock": "wall time" if device == "cuda" else "CPU time of the process",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "gd2po_trl": gd2po_trl.__version__,
        },
        "precision": str(half_precision(device)).removeprefix("torch."),
        "size": asdict(size),
    }
    for name, measure in {"update": measure_update, "advantages": measure_advantages}.items():
        if name in arguments.parts:
            result[name] = measure(size, device)
            print(table(result[name], {key: key for key in result[name][0]}), end="\n\n", flush=True)
    if "learning" in arguments.parts:
        result["learning"] = measure_learning(size, device)
    for run in result.get("learning", []):
        change = ", ".join(f"{name} {before:.2f} -> {after:.2f}" for name, (before, after) in run["held_out"].items())
        print(f"{run['method']}: {run['steps']} steps in {run['wall_s']} s; held out: {change}")
    result["total_wall_s"] = round(time.perf_counter() - start, 1)

    output = arguments.output or Path(__file__).parent / "results" / f"gpu-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    print(f"{result['total_wall_s']} s in total. Written: {output.name}")


if __name__ == "__main__":
    main()
