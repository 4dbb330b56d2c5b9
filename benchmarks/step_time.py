"""
Time and peak memory of a training step: ours against TRL's `GRPOTrainer`, on the same model and completions.

Both trainers run in turn, step by step, with a controlled share of rollouts whose advantage is 0; the learning rate is
0, so that they stay the same. "Update" is a whole optimizer step less generation and scoring.

    python benchmarks/step_time.py                  # a few minutes; writes benchmarks/results/step_time-cpu.json
    python benchmarks/step_time.py --device cuda    # a larger model in bfloat16
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

import gd2po_trl
from gd2po_trl import GD2POConfig, GD2POTrainer, gd2po_trainer


SHARES = (0.0, 0.25, 0.5, 0.75)
NUM_GENERATIONS = 4
PROMPT_LENGTH = 32


@dataclass(frozen=True)
class Scale:
    """What fits the device: the size of the model and of the batch, and the completion lengths to measure."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    lengths: tuple[int, ...]
    generated_length: int


SCALES = {
    "cpu": Scale(width=128, layers=4, heads=4, vocabulary=1024, rows=16, lengths=(64, 128, 256), generated_length=128),
    "cuda": Scale(
        width=1024, layers=16, heads=16, vocabulary=32768, rows=32, lengths=(256, 1024, 2048), generated_length=512
    ),
}


class Clock:
    """Wall time and CPU time of the process, in seconds; on an accelerator once it has finished."""

    def __init__(self, device: str):
        self.device = device

    def __call__(self) -> tuple[float, float]:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


@dataclass
class Stopwatch:
    """Sums what it is started and stopped around."""

    clock: Clock
    wall: float = 0.0
    cpu: float = 0.0
    started: tuple[float, float] = field(default=(0.0, 0.0))

    def __enter__(self):
        self.started = self.clock()

    def __exit__(self, *exception):
        wall, cpu = self.clock()
        self.wall += wall - self.started[0]
        self.cpu += cpu - self.started[1]

    def take(self) -> tuple[float, float]:
        """What was summed since the last call."""
        taken, self.wall, self.cpu = (self.wall, self.cpu), 0.0, 0.0
        return taken


class ControlledShare:
    """Gives `zero_share` of the rollouts the advantage 0, and times generation and scoring apart."""

    zero_share = 0.0

    def _generate_and_score_completions(self, inputs):
        with self.generation:
            output = super()._generate_and_score_completions(inputs)
        rows = len(output["advantages"])
        advantages = torch.ones_like(output["advantages"])
        advantages[::2] = -1.0
        advantages[: round(self.zero_share * rows)] = 0.0
        output["advantages"] = advantages
        return output


class Stock(ControlledShare, GRPOTrainer):
    pass


class Ours(ControlledShare, GD2POTrainer):
    pass


class StepTimer(TrainerCallback):
    """Collects `(update, generation)` of every optimizer step, each as `(wall, cpu)` seconds."""

    def __init__(self, trainer):
        self.trainer, self.total, self.steps = trainer, Stopwatch(trainer.generation.clock), []

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.generation.take()
        self.total.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.total.__exit__()
        total, generation = self.total.take(), self.trainer.generation.take()
        self.steps.append((tuple(t - g for t, g in zip(total, generation, strict=True)), generation))


def build_tokenizer(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def length_in_characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def even_words(completions, **kwargs):
    return [float(sum(int(word[1:]) % 2 == 0 for word in completion.split())) for completion in completions]


def half_precision(device: str) -> torch.dtype:
    """What a policy on `device` is trained in: GPUs before Ampere, such as the T4, have no bfloat16."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def step_args(folder: str, device: str, **settings) -> GD2POConfig:
    """Settings of a trainer whose steps are timed: it stays as it is, and neither logs nor saves."""
    return GD2POConfig(
        output_dir=folder,
        use_cpu=device == "cpu",
        bf16=half_precision(device) is torch.bfloat16,
        fp16=half_precision(device) is torch.float16,
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        # The stock trainer reads this one too; it decides about its advantages, which are replaced.
        multi_objective_aggregation="normalize_then_sum",
        **settings,
    )


def build(trainer_class, scale: Scale, device: str, length: int, lora: bool, folder: str, **overrides):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=scale.vocabulary,
        hidden_size=scale.width,
        intermediate_size=scale.width * 11 // 4,
        num_hidden_layers=scale.layers,
        num_attention_heads=scale.heads,
        num_key_value_heads=scale.heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    prompts = [" ".join(f"w{2 + (row * 7 + i) % 1000}" for i in range(PROMPT_LENGTH)) for row in range(64)]
    args = step_args(
        folder,
        device,
        gradient_checkpointing=False,
        per_device_train_batch_size=scale.rows,
        num_generations=NUM_GENERATIONS,
        max_completion_length=length,
        generation_kwargs={"min_new_tokens": length},  # every completion has full length: trimming plays no part
        **overrides,
    )
    trainer = trainer_class(
        model=LlamaForCausalLM(config),
        reward_funcs=[length_in_characters, even_words],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=build_tokenizer(scale.vocabulary),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.generation = Stopwatch(Clock(device))
    trainer.timer = StepTimer(trainer)
    trainer.add_callback(trainer.timer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def fix_completions(trainer, scale: Scale, length: int) -> None:
    """Let `generate` return the same tokens at every step, at no cost."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, scale.vocabulary, (scale.rows, length), generator=generator)

    def generate(input_ids, **kwargs):
        return torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)

    trainer.model.generate = generate


def peak_memory(trainer, device: str) -> float | None:
    """Peak memory of a step above what is held before it, in MiB; of the process on a CPU (Linux only)."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        trainer.train()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    except OSError:
        return None
    held = resident_memory("VmRSS")
    trainer.train()
    return (resident_memory("VmHWM") - held) / 1024


def resident_memory(name: str) -> int:
    """A line of `/proc/self/status`, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def run_in_turn(candidates: dict[str, tuple], rounds: int, device: str) -> dict[str, dict]:
    """
    Medians over `rounds` in which every candidate (trainer, share of zero advantages) takes one step.

    Ratios are medians of the ratios within a round, so that a machine that slows down for a while does not count.
    """
    for trainer, share in candidates.values():
        trainer.zero_share = share
        trainer.train()
    steps = {name: [] for name in candidates}
    for turn in range(rounds):
        names = list(candidates)
        first = turn % len(names)  # none is always the first, or always behind the same other
        for name in (names[first:] + names[:first])[:: 1 if turn % 2 == 0 else -1]:
            trainer, trainer.zero_share = candidates[name][0], candidates[name][1]
            trainer.timer.steps.clear()
            trainer.train()
            steps[name].extend(trainer.timer.steps)
    results = {}
    for name, (trainer, share) in candidates.items():
        trainer.zero_share = share
        update, generation = zip(*steps[name], strict=True)
        stock = [update for update, _ in steps["stock"]]
        results[name] = {
            "update_wall_ratio": statistics.median(a[0] / b[0] for a, b in zip(update, stock, strict=True)),
            "update_cpu_ratio": statistics.median(a[1] / b[1] for a, b in zip(update, stock, strict=True)),
            "update_wall_s": statistics.median(wall for wall, _ in update),
            "update_cpu_s": statistics.median(cpu for _, cpu in update),
            "generation_wall_s": statistics.median(wall for wall, _ in generation),
            "generation_cpu_s": statistics.median(cpu for _, cpu in generation),
            "peak_memory_mib": peak_memory(trainer, device),
        }
    return results


def measure_update(
    scale: Scale, device: str, length: int, lora: bool, rounds: int, shares: tuple[float, ...] = SHARES
) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        stock = build(Stock, scale, device, length, lora, folder)
        ours = build(Ours, scale, device, length, lora, folder)
        off = build(Ours, scale, device, length, lora, folder, skip_zero_advantage_rows=False)
        for trainer in (stock, ours, off):
            fix_completions(trainer, scale, length)
        candidates = {"stock": (stock, 0.5), "skipping off": (off, 0.5)}
        candidates |= {f"{share:.0%} zero": (ours, share) for share in shares}
        measured = run_in_turn(candidates, rounds, device)
    return [
        {
            "method": "LoRA" if lora else "full",
            "completion_length": length,
            "setting": name,
            **{name: round(value, 6) for name, value in values.items() if value is not None},
        }
        for name, values in measured.items()
    ]


def measure_step(scale: Scale, device: str, rounds: int) -> list[dict]:
    """Whole steps with real generation, and what the advantages take of them."""
    length = scale.generated_length
    advantages = Stopwatch(Clock(device))
    compute_advantages = gd2po_trainer.compute_advantages

    def timed(*args, **kwargs):
        with advantages:
            return compute_advantages(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        stock = build(Stock, scale, device, length, False, folder)
        ours = build(Ours, scale, device, length, False, folder)
        candidates = {"stock": (stock, 0.5)} | {f"{share:.0%} zero": (ours, share) for share in SHARES}
        gd2po_trainer.compute_advantages = timed
        try:
            measured = run_in_turn(candidates, rounds, device)
        finally:
            gd2po_trainer.compute_advantages = compute_advantages
    clock = "wall" if device == "cuda" else "cpu"
    calls = (rounds + 2) * len(SHARES)  # one to warm up, one for the memory
    advantage_time = dict(zip(("wall", "cpu"), advantages.take(), strict=True))[clock] / calls

    def step(values: dict) -> float:
        return values[f"update_{clock}_s"] + values[f"generation_{clock}_s"]

    return [
        {
            "completion_length": length,
            "setting": name,
            "step_s": round(step(values), 6),
            "generation_s": round(values[f"generation_{clock}_s"], 6),
            "update_s": round(values[f"update_{clock}_s"], 6),
            "step_ratio": round(step(values) / step(measured["stock"]), 4),
            "advantages_percent": None if name == "stock" else round(100 * advantage_time / step(values), 5),
        }
        for name, values in measured.items()
    ]


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table of `columns` (key: heading)."""
    lines = ["| " + " | ".join(columns.values()) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [row.get(key) for key in columns]
        cells = ["-" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SCALES), default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--lengths", type=int, nargs="*", help="completion lengths instead of the device's own")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.set_verbosity_error()
    device, scale = arguments.device, SCALES[arguments.device]

    updates = []
    for length in arguments.lengths or scale.lengths:
        for lora in (False, True):
            updates += measure_update(scale, device, length, lora, arguments.rounds)
            print(f"measured: completion length {length}, {updates[-1]['method']}", flush=True)
    # Where the work is least, what we add to it shows most.
    overhead = measure_update(scale, device, scale.lengths[0], False, 6 * arguments.rounds, shares=(0.0,))
    steps = measure_step(scale, device, arguments.rounds)

    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": arguments.threads,
        "clock": "wall time" if device == "cuda" else "CPU time of the process",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "gd2po_trl": gd2po_trl.__version__,
        },
        "scale": scale.__dict__,
        "update": updates,
        "overhead": overhead,
        "step": steps,
    }
    output = arguments.output or Path(__file__).parent / "results" / f"step_time-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")

    columns = {
        "method": "method",
        "completion_length": "completion length",
        "setting": "setting",
        "update_wall_s": "update, s",
        "update_wall_ratio": "of stock",
        "update_cpu_s": "CPU time, s",
        "update_cpu_ratio": "of stock",
        "peak_memory_mib": "peak memory, MiB",
    }
    print(table(updates, columns), end="\n\n")
    print(table(overhead, columns), end="\n\n")
    columns = {
        "setting": "setting",
        "step_s": "step, s",
        "generation_s": "generation, s",
        "update_s": "update, s",
        "step_ratio": "step of stock",
        "advantages_percent": "advantages, % of step",
    }
    print(table(steps, columns))


if __name__ == "__main__":
    main()
