"""`gd2po analyze`."""

import argparse
from pathlib import Path

from ..errors import UsageError


DESCRIPTION = """
What is wrong with the rewards of a run, how far do they conflict, and which method would help? Reads the completions
that any TRL GRPOTrainer logs with `log_completions=True`, the rollouts that ms-swift, verl and NeMo-RL dump, or JSONL,
CSV and parquet files with the columns prompt, completion, one per reward and, where there are several steps, step. No
model is loaded.
"""


def main(argv: list[str]) -> int:
    """Run `gd2po analyze`; the exit status."""
    parser = argparse.ArgumentParser(prog="gd2po analyze", description=DESCRIPTION)
    parser.add_argument("sources", nargs="+", metavar="RUN_OR_FILES", help="output folders of runs, or files")
    parser.add_argument("--rewards", nargs="+", metavar="COLUMN", help="reward columns (default: found by themselves)")
    parser.add_argument(
        "--reward-weights",
        nargs="+",
        type=float,
        metavar="W",
        help="in their order (default: of the run's recipe.yaml or log, else 1 each)",
    )
    parser.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        default=[0.2, 0.4, 0.6, 0.8],
        metavar="TAU",
        help="thresholds at which to judge the SNR filter, in [0, 1] (default: 0.2 0.4 0.6 0.8)",
    )
    parser.add_argument(
        "--num-generations", type=int, metavar="G", help="rollouts per group (default: found by prompt and step)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="write report.html, report.png and report.json here"
    )
    arguments = parser.parse_args(argv)
    if arguments.output is not None and arguments.output.exists() and not arguments.output.is_dir():
        raise UsageError(f"--output '{arguments.output}' is a file; name a folder.")

    from ..analysis import analyze

    report = analyze(
        arguments.sources,
        rewards=arguments.rewards,
        reward_weights=arguments.reward_weights,
        num_generations=arguments.num_generations,
        thresholds=arguments.thresholds,
    )
    # First, so that the files are complete even if the terminal's reader (`| head`) leaves.
    paths = report.save(arguments.output) if arguments.output is not None else []
    report.print()
    if paths:
        print(f"Written: {', '.join(map(str, paths))}")
    else:
        print("--output DIR writes this as HTML, PNG and JSON.")
    return 0
