"""Instruments of the benchmarks of the update: given rollouts and advantages, trainers on them, what a step takes."""

import ctypes
import gc
import math
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import GRPOTrainer

import gd2po_trl
from gd2po_trl import GD2POConfig, GD2POTrainer


# Mean and 90th percentile of the tokens of prompts and completions, drawn log-normally, or all equal where there is no
# percentile. "tool calling" are those of the rlla data; "short prompts" spread by as much.
LENGTHS = {
    "tool calling": ((1020, 1530), (410, 575)),
    "short prompts": ((40, 60), (300, 420)),
    "uniform": ((128, None), (512, None)),
}
# Settings of `GD2POConfig`; the stock trainer reads none of them.
TRAINERS = {
    "stock": {},
    "skipping": {"packed_update": False},
    "packed": {"skip_zero_advantage_rows": False},
    "both": {},
}


@dataclass(frozen=True)
class Rollouts:
    """Token ids of every prompt and of the rollouts, those of a prompt one after the other."""

    prompts: list[list[int]]
    completions: list[list[int]]

    def __call__(self, prompts: list[str], trainer) -> dict:
        """The `rollout_func` of TRL; a prompt is the number of its ids."""
        logps = [[-5.0] * len(ids) for ids in self.completions] if trainer.use_vllm else None
        return {
            "prompt_ids": [self.prompts[int(prompt)] for prompt in prompts],
            "completion_ids": self.completions,
            "logprobs": logps,
        }


def draw_rollouts(lengths: str, num_generations: int, vocabulary: int, scale: float, total: int) -> Rollouts:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, mean: float, percentile: float | None) -> list[list[int]]:
        if percentile is None:
            sizes = [round(mean * scale)] * count
        else:
            spread = 1.2816 - math.sqrt(1.2816**2 - 2 * math.log(percentile / mean))
            normal = torch.randn(count, generator=generator)
            values = mean * scale * torch.exp(spread * normal - spread**2 / 2)
            sizes = values.round().clamp(min=2).long().tolist()
        return [torch.randint(2, vocabulary, (size,), generator=generator).tolist() for size in sizes]

    prompts, completions = LENGTHS[lengths]
    return Rollouts(draw(total // num_generations, *prompts), draw(total, *completions))


def draw_advantages(share: float, pattern: str, num_generations: int, total: int) -> torch.Tensor:
    """Advantages of 1 and -1, of which `share` are 0: as many in every group (`"even"`), or any (`"random"`)."""
    advantages = 1.0 - 2.0 * (torch.arange(total) % 2)
    generator = torch.Generator().manual_seed(1)
    for rows in torch.arange(total).split(num_generations if pattern == "even" else total):
        dropped = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]
        advantages[rows[dropped]] = 0.0
    return advantages


class Stopwatch:
    """Sums the seconds that it is entered for: CPU time of the process, or wall time of an accelerator."""

    def __init__(self, device: str):
        self.device, self.seconds, self._started = device, 0.0, 0.0

    def now(self) -> float:
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self):
        self._started = self.now()

    def __exit__(self, *exception):
        self.seconds += self.now() - self._started


class Given:
    """Trains on given advantages, and times generation and the old log-probabilities that it asks for apart."""

    given_advantages = None

    def _generate_and_score_completions(self, inputs):
        self._last_loaded_step = self.state.global_step  # where vLLM is pretended, no weights are to be sent
        self.is_generating = True
        with self.generation:
            output = super()._generate_and_score_completions(inputs)
        self.is_generating = False
        if self.given_advantages is not None:
            output["advantages"] = self.given_advantages.to(output["advantages"])
        return output

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        if not self.is_generating:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)
        with self.old_logps:
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)


class Stock(Given, GRPOTrainer):
    pass


class Ours(Given, GD2POTrainer):
    pass


class StepMeter(TrainerCallback):
    """Seconds, forward passes and tokens of the last optimizer step: old log-probabilities and update."""

    def __init__(self, trainer, device: str):
        self.trainer, self.total = trainer, Stopwatch(device)
        trainer.generation, trainer.old_logps, trainer.is_generating = Stopwatch(device), Stopwatch(device), False
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.get_input_embeddings().register_forward_pre_hook(self.count)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def count(self, module, inputs):
        if torch.is_grad_enabled():
            self.forwards += 1
            self.tokens += inputs[0].numel()

    def on_step_begin(self, args, state, control, **kwargs):
        self.forwards = self.tokens = 0
        self.total.seconds = self.trainer.generation.seconds = self.trainer.old_logps.seconds = 0.0
        self.total.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.total.__exit__()
        self.update = self.total.seconds - self.trainer.generation.seconds

    def step(self) -> dict:
        """Train one step."""
        held = reset_peak_memory(self.trainer.args.device)
        self.trainer.train()
        return {
            "update_s": self.update,
            "old_logps_s": self.trainer.old_logps.seconds,
            "forwards": self.forwards,
            "tokens": self.tokens,
            "peak_memory_mib": peak_memory(self.trainer.args.device) - held,
        }


def reset_peak_memory(device: torch.device) -> float:
    """Forget the peak memory so far, of the process on a CPU (Linux only); what is held now, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return math.nan
    return resident_memory("VmRSS")


def peak_memory(device: torch.device) -> float:
    """The peak memory since then, in MiB; not a number where the system does not tell."""
    return torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_memory("VmHWM")


def resident_memory(name: str) -> float:
    """A line of `/proc/self/status`, in MiB."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return math.nan
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def build_tokenizer(size: int) -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<eos>": 1, **{f"w{index}": index for index in range(2, size)}}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def characters(completions, **kwargs):
    return [float(len(completion)) for completion in completions]


def even_letters(completions, **kwargs):
    return [float(sum(ord(letter) % 2 == 0 for letter in completion)) for completion in completions]


def half_precision(device: str) -> torch.dtype:
    """What a policy on `device` is trained in: GPUs before Ampere, such as the T4, have no bfloat16."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16


def build(trainer_class, model, rollouts: Rollouts, tokenizer, lora: LoraConfig | None, device: str, **settings):
    """A trainer whose steps are measured: it stays as it is, and neither logs nor saves."""
    args = GD2POConfig(
        use_cpu=device == "cpu",
        bf16=half_precision(device) is torch.bfloat16,
        fp16=half_precision(device) is torch.float16,
        max_steps=1,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        conflict_filter=None,  # every advantage is given, or not 0
        max_completion_length=max(map(len, rollouts.completions)),
        **settings,
    )
    trainer = trainer_class(
        model=model,
        reward_funcs=[characters, even_letters],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": [str(number) for number in range(len(rollouts.prompts))]}),
        processing_class=tokenizer,
        peft_config=lora,
        rollout_func=rollouts,
    )
    trainer.meter = StepMeter(trainer, device)
    return trainer


def run_in_turn(candidates: dict, rounds: int) -> dict:
    """
    Measure candidates, each a trainer and its advantages. All take one step in each round, in an order that changes,
    so that none is always first or behind the same other.

    Returns:
        For each, what a step took (medians) and `rounds`, the seconds of the update in every round.
    """
    for trainer in {id(trainer): trainer for trainer, _ in candidates.values()}.values():
        trainer.meter.step()  # warms up
    steps: dict = {key: [] for key in candidates}
    for turn in range(rounds):
        names = list(candidates)
        first = turn * len(names) // rounds
        for key in (names[first:] + names[:first])[:: 1 if turn % 2 == 0 else -1]:
            trainer, trainer.given_advantages = candidates[key]
            steps[key].append(trainer.meter.step())
    return {
        key: {name: statistics.median(step[name] for step in taken) for name in taken[0]}
        | {"rounds": [step["update_s"] for step in taken]}
        for key, taken in steps.items()
    }


def ratio(values: dict, others: dict, fixed: float) -> float:
    """Median ratio of the update within a round, less the seconds `fixed`."""
    pairs = zip(values["rounds"], others["rounds"], strict=True)
    return statistics.median((a - fixed) / (b - fixed) for a, b in pairs)


def compare(measured: dict, key, alone=None) -> dict:
    """What the candidate `key` took as shares of `"stock"`, and of `alone`, the key of row skipping alone."""
    values, stock = measured[key], measured["stock"]
    fixed = statistics.median(measured["all dropped"]["rounds"])
    time_share, token_share = ratio(values, stock, fixed), values["tokens"] / stock["tokens"]
    row = {
        "update_s": values["update_s"],
        "time": time_share,
        "tokens": token_share,
        "time_of_tokens": time_share / token_share,
        "time_of_skipping": None if alone is None else ratio(values, measured[alone], fixed),
        "forwards": values["forwards"],
        "peak_memory_mib": values["peak_memory_mib"],
        "memory": values["peak_memory_mib"] / stock["peak_memory_mib"],
    }
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}


def table(rows: list[dict], columns: dict[str, str]) -> str:
    """A Markdown table of `columns` (key: heading)."""
    lines = ["| " + " | ".join(columns.values()) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in rows:
        cells = [row.get(key) for key in columns]
        cells = ["-" if c is None else f"{c:.3g}" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    modules = {"torch": torch, "transformers": transformers, "trl": trl, "gd2po_trl": gd2po_trl}
    return {"python": platform.python_version()} | {name: module.__version__ for name, module in modules.items()}
