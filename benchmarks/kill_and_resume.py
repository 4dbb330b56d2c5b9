"""
Kill a training run at random moments, resume it, and compare it with one that was left alone.

    python benchmarks/kill_and_resume.py --trials 20

Every trial starts the same run in a process of its own, sends it SIGKILL at a random moment between its start and its
end (generation, reward and backward are all in there) or, every other time, while it writes a checkpoint, and lets
`resume_from_checkpoint: latest` finish it. Compared bit for bit: the final weights, and the log history but for times.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from safetensors.torch import load_file
from tiny import letters_dataset, low_bytes, save_tiny_policy, spread_bytes, tiny_args

from gd2po_trl import GD2POTrainer
from gd2po_trl.run_log import checkpoint_to_resume, find_damage


# The child processes are forks, so that none pays for the imports again.
FORK = multiprocessing.get_context("fork")
# Seconds that writing a checkpoint of the tiny policy takes, roughly.
WRITING = 0.03
TIMES = ("step_time", "update_time", "runtime", "per_second", "total_flos")


def train(policy: Path, output: Path, steps: int, started=None) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    trainer = GD2POTrainer(
        str(policy),
        [low_bytes, spread_bytes],
        tiny_args(
            output,
            max_steps=steps,
            max_completion_length=24,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            save_total_limit=3,
        ),
        train_dataset=letters_dataset(20),  # 5 steps an epoch, so that runs are resumed in later ones too
    )
    if started is not None:
        started.set()
    trainer.train(resume_from_checkpoint=checkpoint_to_resume("latest", output))
    trainer.save_state()
    trainer.save_model()


def run(
    policy: Path, output: Path, steps: int, kill_after: float | None = None, at_checkpoint: bool = False
) -> tuple[float, bool]:
    """
    Seconds from the start of training to the end, and whether the run was killed before its end.

    `kill_after` counts in seconds from the start of training or, `at_checkpoint`, from the appearance of the first
    checkpoint's folder.
    """
    started = FORK.Event()
    process = FORK.Process(target=train, args=(policy, output, steps, started))
    process.start()
    started.wait(120)
    begin = time.perf_counter()
    while at_checkpoint and process.is_alive() and not list(output.glob("checkpoint-*")):
        time.sleep(0.001)
    process.join(kill_after)
    killed = process.is_alive()
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not killed and process.exitcode != 0:
        raise RuntimeError(f"the run ended with status {process.exitcode}")
    return time.perf_counter() - begin, killed


def outcome(output: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    history = [{k: v for k, v in entry.items() if not any(word in k for word in TIMES)} for entry in history]
    # The mean loss of the whole run covers the steps since the resumption alone.
    return load_file(output / "model.safetensors"), [entry for entry in history if "train_loss" not in entry]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the counts")
    arguments = parser.parse_args(argv)
    moments = random.Random(arguments.seed)

    counts = {"killed": arguments.trials, "cut_checkpoints": 0, "equal_weights": 0, "equal_history": 0}
    with tempfile.TemporaryDirectory() as folder:
        policy = save_tiny_policy(Path(folder) / "policy")
        duration, _ = run(policy, Path(folder) / "whole", arguments.steps)
        weights, history = outcome(Path(folder) / "whole")
        for trial in range(arguments.trials):
            output = Path(folder) / f"trial_{trial}"
            killed = False
            while not killed:  # a run that was faster than the first one may end before its moment
                shutil.rmtree(output, ignore_errors=True)
                # Every other run is killed while it writes a checkpoint, which takes a small part of its time.
                at_checkpoint = trial % 2 == 1
                moment = moments.uniform(0, WRITING if at_checkpoint else duration)
                _, killed = run(policy, output, arguments.steps, moment, at_checkpoint)
            counts["cut_checkpoints"] += any(find_damage(path) for path in output.glob("checkpoint-*"))
            run(policy, output, arguments.steps)
            resumed_weights, resumed_history = outcome(output)
            counts["equal_weights"] += all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
            counts["equal_history"] += history == resumed_history
            if len(history) != len(resumed_history):
                print(f"trial {trial}: {len(resumed_history)} log entries instead of {len(history)}")
            for whole_entry, entry in zip(history, resumed_history, strict=False):
                if whole_entry != entry:
                    fields = {key for key in {**whole_entry, **entry} if whole_entry.get(key) != entry.get(key)}
                    print(f"trial {trial}, step {entry.get('step')}: different {sorted(fields)}")
            shutil.rmtree(output)
    print(
        f"{counts['killed']} runs killed, {counts['cut_checkpoints']} of them with a checkpoint cut "
        f"short; after resuming {counts['equal_weights']} have the same weights bit for bit "
        f"and {counts['equal_history']} the same log history."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(counts, indent=2) + "\n")
    return counts


if __name__ == "__main__":
    main()
