"""
Time of the advantages of one generation batch: `compute_advantages` against loops and against TRL's formula.

    python benchmarks/advantages.py                 # a few minutes; writes benchmarks/results/advantages-cpu.json
    python benchmarks/advantages.py --device cuda

The loops compute the same GD²PO-Hard advantages (checked before timing). TRL's formula is that of its
`normalize_then_sum` (GDPO): no conflicts, no consensus weight, no token weights, so it does less.
"""

import argparse
import json
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import trl
from trl.trainer.utils import nanstd

import gd2po_trl
from gd2po_trl import compute_advantages


BATCH_SIZES = (64, 256, 1024, 2048, 4096, 16384, 65536)
NUM_REWARDS = (2, 3, 5, 8)
NUM_GENERATIONS = 8


def loop_over_rollouts(rewards, token_counts):
    """As training code is often written: scores gathered per prompt in a dictionary, every rollout by itself."""
    rollouts, num_rewards = rewards.shape
    per_reward = torch.zeros_like(rewards)
    for k in range(num_rewards):
        scores = defaultdict(list)
        for i in range(rollouts):
            scores[i // NUM_GENERATIONS].append(rewards[i, k])
        mean, std = {}, {}
        for group, values in scores.items():
            stacked = torch.stack(values)
            mean[group], std[group] = stacked.mean(), stacked.std()
        for i in range(rollouts):
            group = i // NUM_GENERATIONS
            per_reward[i, k] = (rewards[i, k] - mean[group]) / (std[group] + 1e-6)
    kept = torch.ones(rollouts, dtype=torch.bool)
    for i in range(rollouts):
        kept[i] = not (bool((per_reward[i] > 1e-8).any()) and bool((per_reward[i] < -1e-8).any()))
    kept_of_group = defaultdict(int)
    for i in range(rollouts):
        kept_of_group[i // NUM_GENERATIONS] += int(kept[i])
    combined = torch.zeros(rollouts, dtype=rewards.dtype)
    for i in range(rollouts):
        if kept[i]:
            combined[i] = per_reward[i].sum() * (kept_of_group[i // NUM_GENERATIONS] / NUM_GENERATIONS)
    return whiten(combined, kept, token_counts)


def loop_over_groups(rewards, token_counts):
    """One pass of tensor operations per prompt."""
    combined, kept = [], []
    for group in rewards.split(NUM_GENERATIONS):
        normalized = (group - group.mean(0)) / (group.std(0) + 1e-6)
        group_kept = ~((normalized > 1e-8).any(1) & (normalized < -1e-8).any(1))
        combined.append(normalized.sum(1) * group_kept * group_kept.float().mean())
        kept.append(group_kept)
    return whiten(torch.cat(combined), torch.cat(kept), token_counts)


def whiten(values, kept, token_counts):
    counts = token_counts * kept
    mean = (counts * values).sum() / counts.sum()
    variance = (counts * (values - mean) ** 2).sum() / (counts.sum() - 1)
    return torch.where(kept, (values - mean) / (variance + 1e-8).sqrt(), 0.0)


def formula_of_trl(rewards, token_counts):
    grouped = rewards.view(-1, NUM_GENERATIONS, rewards.size(1))
    normalized = (grouped - torch.nanmean(grouped, dim=1, keepdim=True)) / (
        nanstd(grouped, dim=1, keepdim=True) + 1e-4
    )
    summed = normalized.view(-1, rewards.size(1)).nansum(dim=1)
    return (summed - torch.nanmean(summed)) / (nanstd(summed) + 1e-4)


def ours(rewards, token_counts):
    return compute_advantages(rewards, NUM_GENERATIONS, token_counts=token_counts).advantages


CANDIDATES = {
    "compute_advantages": ours,
    "TRL's formula": formula_of_trl,
    "loop over groups": loop_over_groups,
    "loop over rollouts": loop_over_rollouts,
}


def seconds(function, arguments: tuple, device: str, at_least: float = 0.3, repeats: int = 5) -> float:
    """Median time of a call over `repeats` blocks, or over fewer where a single call takes long."""
    clock = time.perf_counter if device == "cuda" else time.process_time

    def block(calls: int) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            function(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - start) / calls

    first = block(1)
    if first > at_least:
        return first
    first = min(first, block(1))  # the first call also pays for what it sets up
    calls = max(1, int(at_least / repeats / max(first, 1e-6)))
    return statistics.median(block(calls) for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = arguments.device

    rows = []
    print("| rollouts | rewards | " + " | ".join(f"{name}, ms" for name in CANDIDATES) + " | rollout loop / ours |")
    print("| --- | --- | " + "--- | " * len(CANDIDATES) + "--- |")
    for batch_size in BATCH_SIZES:
        for num_rewards in NUM_REWARDS:
            generator = torch.Generator().manual_seed(0)
            rewards = torch.randn(batch_size, num_rewards, generator=generator)
            counts = torch.randint(1, 512, (batch_size,), generator=generator)
            if batch_size <= 1024:
                for loop in (loop_over_groups, loop_over_rollouts):
                    torch.testing.assert_close(loop(rewards, counts), ours(rewards, counts), atol=1e-4, rtol=1e-3)
            times = {}
            for name, function in CANDIDATES.items():
                at = "cpu" if name.startswith("loop") else device
                times[name] = seconds(function, (rewards.to(at), counts.to(at)), at)
            rows.append({"rollouts": batch_size, "rewards": num_rewards, "seconds": times})
            factor = times["loop over rollouts"] / times["compute_advantages"]
            cells = " | ".join(f"{1e3 * value:.3g}" for value in times.values())
            print(f"| {batch_size:,} | {num_rewards} | {cells} | {factor:,.0f} |", flush=True)

    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU",
        "threads": arguments.threads,
        "clock": "wall time" if device == "cuda" else "CPU time of the process",
        "num_generations": NUM_GENERATIONS,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "trl": trl.__version__,
            "gd2po_trl": gd2po_trl.__version__,
        },
        "results": rows,
    }
    output = arguments.output or Path(__file__).parent / "results" / f"advantages-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
