"""
What an update costs: ours against TRL's `GRPOTrainer`, on the same model, rollouts and advantages.

Columns: skipping rollouts of advantage 0 alone, packing alone, and both. Rows: lengths, rollouts per prompt (64
rollouts at each), rows per micro-batch, LoRA or full fine-tuning, and the share of rollouts whose advantage is 0, even
per group or at random. The rollouts are given, so that generation costs nothing; the learning rate is 0, so that the
trainers stay the same.

    python benchmarks/step_time.py                  # writes benchmarks/results/step_time-cpu.json
    python benchmarks/step_time.py --set full --scale 0.5 --rounds 5    # every combination, at half the lengths
    python benchmarks/step_time.py --device cuda    # a larger model in bfloat16, whole lengths

Every setting runs in a fresh process, in which the trainers take steps in turn. Time is CPU time of the process
(wall time on a GPU). A ratio is the median of the ratios within a round. The cost of a step in which every rollout is
dropped is taken off both sides first.
"""

import argparse
import itertools
import json
import multiprocessing
import platform
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from peft import LoraConfig
from transformers import Qwen2Config, Qwen2ForCausalLM
from update_harness import (
    LENGTHS,
    TRAINERS,
    Ours,
    Stock,
    build,
    build_tokenizer,
    compare,
    draw_advantages,
    draw_rollouts,
    run_in_turn,
    table,
    versions,
)

from gd2po_trl import GD2POConfig


NUM_ROLLOUTS = 64
SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Size:
    """What fits the device: the size of the model, and the share of long and of short lengths that is run."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    long_scale: float
    short_scale: float


SIZES = {
    "cpu": Size(width=128, layers=4, heads=4, vocabulary=1024, long_scale=0.25, short_scale=0.5),
    "cuda": Size(width=1024, layers=16, heads=16, vocabulary=32_768, long_scale=1.0, short_scale=1.0),
}


@dataclass(frozen=True)
class Setting:
    """What is run in a process of its own; `key_heads` are the heads of keys and values."""

    lengths: str
    num_generations: int
    micro_batch: int
    lora: bool
    key_heads: int


def settings_of(name: str, heads: int) -> list[Setting]:
    """The settings of the set `name`; the first of `"short"` say most."""
    few = heads // 2
    if name == "full":
        return [
            Setting(*parts) for parts in itertools.product(LENGTHS, (4, 8, 16), (4, 1), (False, True), (few, heads))
        ]
    return [
        Setting("tool calling", 4, 4, False, few),
        Setting("tool calling", 16, 4, True, few),
        Setting("tool calling", 16, 1, False, heads),  # as many heads of keys as of queries take the most memory
        Setting("short prompts", 4, 4, True, few),
        Setting("tool calling", 8, 4, False, few),
        Setting("short prompts", 16, 4, False, few),
        Setting("uniform", 8, 4, False, few),
        Setting("tool calling", 4, 4, True, few),
        Setting("tool calling", 16, 4, False, few),
        Setting("tool calling", 8, 4, True, few),
        Setting("tool calling", 16, 1, True, heads),
    ]


def measure_setting(setting: Setting, size: Size, device: str, rounds: int) -> list[dict]:
    """All rows of a setting."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.width * 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=setting.key_heads,
        max_position_embeddings=8192,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    group = setting.num_generations
    scale = size.long_scale if setting.lengths == "tool calling" else size.short_scale
    rollouts = draw_rollouts(setting.lengths, group, size.vocabulary, scale, NUM_ROLLOUTS)

    def make(trainer_class, **overrides):
        torch.manual_seed(0)
        return build(
            trainer_class,
            Qwen2ForCausalLM(config),
            rollouts,
            build_tokenizer(size.vocabulary),
            LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if setting.lora else None,
            device,
            output_dir=folder,
            gradient_checkpointing=False,
            num_generations=group,
            per_device_train_batch_size=setting.micro_batch,
            gradient_accumulation_steps=NUM_ROLLOUTS // setting.micro_batch,
            **overrides,
        )

    patterns = [(0.0, "even"), *itertools.product(SHARES, ("even", "random"))]
    given = {pattern: draw_advantages(*pattern, group, NUM_ROLLOUTS) for pattern in patterns}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: make(Stock if name == "stock" else Ours, **keys) for name, keys in TRAINERS.items()}
        candidates = {name: (trainers[name], given[0.0, "even"]) for name in ("stock", "packed")}
        candidates["all dropped"] = (trainers["both"], torch.zeros(NUM_ROLLOUTS))
        candidates |= {
            (name, *pattern): (trainers[name], given[pattern]) for name in ("skipping", "both") for pattern in patterns
        }
        shares = (0.5, 0.25) if "update_share" in GD2POConfig.__dataclass_fields__ else ()
        candidates |= {share: (make(Ours, update_share=share), None) for share in shares}
        measured = run_in_turn(candidates, rounds)
    about = asdict(setting) | {"scale": scale, "fixed_s": round(measured["all dropped"]["update_s"], 4)}
    rows = [about | {"trainer": name} | compare(measured, name) for name in ("stock", "packed")]
    for pattern in patterns:
        is_dropped = {"dropped": pattern[0], "pattern": pattern[1]}
        alone = ("skipping", *pattern)
        rows.append(about | {"trainer": "skipping"} | is_dropped | compare(measured, alone))
        rows.append(about | {"trainer": "both"} | is_dropped | compare(measured, ("both", *pattern), alone))
    return rows + [about | {"trainer": "both", "update_share": share} | compare(measured, share) for share in shares]


def summary(rows: list[dict]) -> list[dict]:
    """One line for each setting and share dropped."""
    lines, stock, packed, skipping = [], {}, {}, {}
    for row in rows:
        if row["trainer"] == "both":
            budget = row.get("update_share")
            dropped = (
                f"update_share {budget}"
                if budget
                else f"{row['dropped']:.0%}" + f", {row['pattern']}" * (row["dropped"] > 0)
            )
            lines.append(
                {name: row[name] for name in ("lengths", "num_generations", "micro_batch", "key_heads")}
                | {"training": "LoRA" if row["lora"] else "full", "dropped": dropped, "stock_s": stock["update_s"]}
                | {"skipping": None if budget else skipping["time"], "packed": packed["time"], "both": row["time"]}
                | {name: row[name] for name in ("tokens", "time_of_tokens", "time_of_skipping", "memory")}
                | {"forwards": f"{stock['forwards']:.0f}, {row['forwards']:.0f}"}
            )
        stock, packed, skipping = (
            row if row["trainer"] == name else last
            for name, last in (("stock", stock), ("packed", packed), ("skipping", skipping))
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(SIZES), default="cpu")
    parser.add_argument("--set", choices=("short", "full"), default="short", help="which settings are run")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the settings of the set, from 0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, help="share of the lengths that is run (cpu: 0.25, short ones 0.5; cuda: 1)"
    )
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device, size = arguments.device, SIZES[arguments.device]
    if arguments.scale:
        size = replace(size, long_scale=arguments.scale, short_scale=arguments.scale)
    settings = settings_of(arguments.set, size.heads)
    settings = settings if arguments.only is None else [settings[number] for number in arguments.only]

    rows = []
    for setting in settings:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            rows += process.submit(measure_setting, setting, size, device, arguments.rounds).result()
        print(f"measured: {setting}", flush=True)
    result = {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, 1 thread",
        "clock": "wall time" if device == "cuda" else "CPU time of the process",
        "versions": versions(),
        "size": asdict(size),
        "rounds": arguments.rounds,
        "rows": rows,
    }
    output = arguments.output or Path(__file__).parent / "results" / f"step_time-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    lines = summary(rows)
    print(table(lines, {name: name.replace("_", " ") for name in lines[0]}))


if __name__ == "__main__":
    main()
