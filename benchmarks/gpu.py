"""
One command, one GPU, under ten minutes, no network: what training costs there, and whether it learns.

1. Update time and peak memory of ours against TRL's `GRPOTrainer`: skipping rollouts of advantage 0 alone, packing
   alone, and both; no rollout dropped, and half of them. A model of Qwen2.5-1.5B's shape with random weights, LoRA,
   bfloat16 (float16 where the GPU has none), gradient checkpointing, half the lengths of the tool-calling data. Once
   without and once with the old log-probabilities of vLLM's importance correction; vLLM itself is only pretended.
2. The time that the advantages of a generation batch take.
3. A longer run of the quickstart's task, with GDPO and with GD²PO-Hard.

    python benchmarks/gpu.py        # writes benchmarks/results/gpu-cuda.json, and prints it

Without a GPU it runs at a reduced size, writes gpu-cpu.json, and says there that the figures of a GPU are missing.
"""

import argparse
import copy
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
from advantages import formula_of_trl, ours, seconds
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config, TrainerCallback
from update_harness import (
    TRAINERS,
    Ours,
    Stock,
    build,
    build_tokenizer,
    compare,
    draw_advantages,
    draw_rollouts,
    half_precision,
    run_in_turn,
    table,
    versions,
)

from gd2po_trl.progress import RewardProgress
from gd2po_trl.quickstart.prepare import HELD_OUT_FILE, POLICY_FOLDER, TRAIN_FILE, prepare
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import recipe_path
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
        micro_batch, accumulation, num_generations (`int`): Rollouts per pass, passes per step, rollouts per prompt.
        scale (`float`): Share of the lengths of the tool-calling data that is run.
        rounds (`int`): Measured steps per setting.
        batch_sizes (`tuple[int, ...]`): Rollouts per generation batch for the advantages.
        warmup_steps, learning_steps (`int`): Of the learning runs.
        learning_seconds (`float`): After which a learning run ends early.
    """

    shape: dict
    micro_batch: int
    accumulation: int
    num_generations: int
    scale: float
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
        num_generations=8,
        scale=0.5,
        rounds=2,
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
        num_generations=4,
        scale=0.125,
        rounds=3,
        batch_sizes=(512,),
        warmup_steps=200,
        learning_steps=10,
        learning_seconds=120.0,
    ),
}


def measure_update(size: Size, device: str) -> list[dict]:
    config = Qwen2Config(
        **size.shape,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    total, group = size.micro_batch * size.accumulation, size.num_generations
    tokenizer = build_tokenizer(1000)
    rollouts = draw_rollouts("tool calling", group, 1000, size.scale, total)
    all_kept, half = (draw_advantages(share, "even", group, total) for share in (0.0, 0.5))

    torch.manual_seed(0)
    with torch.device(device):  # the initial weights of 1.5 billion parameters take minutes on a CPU
        policy = AutoModelForCausalLM.from_config(config, dtype=half_precision(device))
    shared = {id(weight): weight for weight in policy.parameters()}

    def make(name: str):
        torch.manual_seed(0)
        return build(
            Stock if name == "stock" else Ours,
            # The frozen weights are shared, or a small GPU would not hold them four times.
            copy.deepcopy(policy, dict(shared)),
            rollouts,
            tokenizer,
            LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
            device,
            output_dir=folder,
            gradient_checkpointing=True,
            num_generations=group,
            per_device_train_batch_size=size.micro_batch,
            gradient_accumulation_steps=size.accumulation,
            vllm_importance_sampling_mode="token_truncate",
            **TRAINERS[name],
        )

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(name) for name in TRAINERS}
        candidates = {name: (trainers[name], all_kept) for name in TRAINERS}
        candidates |= {f"{name}, half dropped": (trainers[name], half) for name in ("skipping", "both")}
        candidates["all dropped"] = (trainers["both"], torch.zeros(total))
        for old_logps in (False, True):
            for trainer in trainers.values():
                trainer.use_vllm = trainer.vllm_importance_sampling_correction = old_logps
            measured = run_in_turn(candidates, size.rounds)
            for key in candidates:
                alone = key.replace("both", "skipping") if key.startswith("both") else None
                seconds_of_logps = [values["old_logps_s"] for values in (measured[key], measured["stock"])]
                rows.append(
                    {"trainer": key, "vllm_old_logps": old_logps}
                    | {name: value for name, value in compare(measured, key, alone).items() if name != "forwards"}
                    | {"forwards": int(measured[key]["forwards"]), "old_logps_s": round(seconds_of_logps[0], 5)}
                    | {"old_logps": round(seconds_of_logps[0] / seconds_of_logps[1], 4) if old_logps else None}
                )
    return rows


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
        "versions": versions(),
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
