"""`gd2po compare`."""

import argparse
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError


DESCRIPTION = """
Trains a recipe with several methods and seeds and tells their results apart from noise: final value and mean over
training of every reward, of their normalized sum and of the worst of them, at equal steps, trained tokens and time;
confidence intervals over the seeds and paired tests against GDPO. Started again, it goes on where it was stopped.
"""
EPILOG = """
examples:
  gd2po compare --config recipe.yaml --seeds 5 --output outputs/comparison
  gd2po compare --config recipe.yaml --seeds 5 --learning-rates 3e-4 1e-3 3e-3 --ranges correctness=-3:3 format=0:1
  gd2po compare --config recipe.yaml --methods gdpo --seeds 5 \\
    --variant snr_0.4 gd2po_snr snr_threshold=0.4 --variant snr_0.6 gd2po_snr snr_threshold=0.6
  gd2po compare --config recipe.yaml --methods gdpo gd2po_trl.estimators.rvpo my_estimators.minimum
"""


def main(argv: list[str]) -> int:
    """Run `gd2po compare`; the exit status, 1 if a run failed."""
    arguments = vars(_parser().parse_args(argv))

    from ..comparison import compare
    from ..comparison.presentation import print_results
    from ..comparison.variants import mask_secrets, parse_settings
    from ..terminal import set_up_logging

    set_up_logging()
    variants: dict[str, dict[str, Any]] = {}
    for words in arguments.pop("variant"):
        if len(words) < 2:
            raise UsageError(f"--variant {' '.join(words)}: give a name, a method and key=value settings.")
        if words[0] in variants:
            raise UsageError(f"Two variants are called '{words[0]}'.")
        variants[words[0]] = {"method": words[1], **parse_settings(words[2:], "--variant")}
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        results = compare(
            settings=parse_settings(arguments.pop("set"), "--set"),
            variants=variants,
            ranges=_parse_ranges(arguments.pop("ranges")),
            caption=f"gd2po compare {shlex.join(mask_secrets(argv))}",
            **arguments,
        )
    finally:
        signal.signal(signal.SIGTERM, previous)
    print_results(results)
    return 1 if results.failures else 0


def _interrupt(*_: Any) -> None:
    """End as Ctrl-C does, so that no training goes on without its comparison."""
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gd2po compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="the recipe to train")
    parser.add_argument(
        "--methods",
        nargs="*",
        metavar="METHOD",
        help="presets, or dotted paths of estimators (default: all four presets)",
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="train with seeds 1 to N (default: 5)")
    parser.add_argument(
        "--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="recipe keys, for every run"
    )
    parser.add_argument(
        "--variant",
        nargs="+",
        default=[],
        action="append",
        metavar="WORD",
        help="NAME METHOD KEY=VALUE ...: a further variant to train, such as a method with another threshold",
    )
    parser.add_argument(
        "--match-whitening",
        action="store_true",
        help="add variants that tell filter, consensus weight and whitening apart, one at a time",
    )
    parser.add_argument("--baseline", metavar="NAME", help="what the others are compared with (default: gdpo)")
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="choose each variant's learning rate from these, on seeds of their own",
    )
    parser.add_argument(
        "--tuning-seeds", type=int, default=2, metavar="N", help="seeds per learning rate tried (default: 2)"
    )
    parser.add_argument(
        "--ranges",
        nargs="+",
        default=[],
        metavar="REWARD=LOW:HIGH",
        help="range that a reward is normalized by (default: lowest and highest batch mean of all runs)",
    )
    parser.add_argument(
        "--measure",
        choices=("train", "eval"),
        default="train",
        help="rewards of the training rollouts, or of the recipe's evaluations (default: train)",
    )
    at_once = parser.add_mutually_exclusive_group()
    at_once.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at the same time (default: 1)")
    at_once.add_argument(
        "--devices", nargs="+", default=[], metavar="ID", help="CUDA devices: one run at a time on each of them"
    )
    parser.add_argument(
        "--launch",
        default="",
        metavar="WORDS",
        help="start each run by `accelerate launch WORDS`, as --launch='--config_file fsdp2.yaml'",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/comparison"),
        metavar="DIR",
        help="folder of the runs and the report (default: outputs/comparison)",
    )
    return parser


def _parse_ranges(texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    ranges = {}
    for text in texts:
        name, _, bounds = text.rpartition("=")
        low, _, high = bounds.partition(":")
        try:
            ranges[name] = (float(low), float(high))
        except ValueError:
            raise UsageError(f"--ranges {text}: write REWARD=LOW:HIGH, such as format=0:1.") from None
    return ranges
