"""`gd2po compare`."""

import argparse
import json
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError


if TYPE_CHECKING:
    from ..comparison.curves import Curves
    from ..comparison.running import Outcome, Run
    from ..comparison.variants import Variant
    from ..recipe import Recipe

DESCRIPTION = """
Trains a recipe with several methods and seeds and tells their results apart from noise: final value and mean over
training of every reward, of their normalised sum and of the worst of them, at equal steps, trained tokens and time;
confidence intervals over the seeds and paired tests against GDPO. Started again, it goes on where it was stopped.
"""
EPILOG = """
examples:
  gd2po compare --config recipe.yaml --seeds 5 --output outputs/comparison
  gd2po compare --config recipe.yaml --seeds 5 --learning-rates 3e-4 1e-3 3e-3 --ranges correctness=-3:3 format=0:1
  gd2po compare --config recipe.yaml --methods gdpo --seeds 5 \\
    --variant snr_0.4 gd2po_snr snr_threshold=0.4 --variant snr_0.6 gd2po_snr snr_threshold=0.6
"""
# Far from any seed that a person would choose, so that learning rates are not chosen on the seeds of the comparison.
FIRST_TUNING_SEED = 1000


def main(argv: list[str]) -> int:
    """Run `gd2po compare`; the exit status, 1 if a run failed."""
    arguments = _parser().parse_args(argv)
    _check(arguments)

    from ..comparison.variants import make_variants, mask_secrets, parse_settings
    from ..gd2po_config import METHODS
    from ..recipe import load_recipe

    methods = arguments.methods if arguments.methods is not None else list(METHODS)
    variants = make_variants(
        methods, arguments.variant, match_whitening=arguments.match_whitening, known_methods=list(METHODS)
    )
    if not variants:
        raise UsageError("There is nothing to compare: name --methods or add a --variant.")
    names = [variant.name for variant in variants]
    baseline = arguments.baseline or ("gdpo" if "gdpo" in names else names[0])
    if baseline not in names:
        raise UsageError(f"--baseline '{baseline}' is none of the variants: {', '.join(names)}.")
    overrides = parse_settings(arguments.set, "--set")
    if arguments.learning_rates:
        for variant in variants:
            if "--learning_rate" in (*overrides, *variant.overrides):
                raise UsageError("--learning-rates chooses `learning_rate`: leave it out of --set and --variant.")
    # Every recipe is read before the first run starts, so that a mistake shows at once.
    recipes = {
        variant.name: load_recipe(arguments.config, (*overrides, *variant.overrides, "--method", variant.method))
        for variant in variants
    }
    comparison = _Comparison(arguments, overrides, recipes)
    caption = f"gd2po compare {shlex.join(mask_secrets(argv))}"

    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        failures = comparison.run(variants, baseline, caption)
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 1 if failures else 0


def _interrupt(*_: Any) -> None:
    """End as Ctrl-C does, so that no training goes on without its comparison."""
    raise KeyboardInterrupt


class _Comparison:
    """The steps of a comparison, from runs to reports."""

    def __init__(self, arguments: argparse.Namespace, overrides: Sequence[str], recipes: "dict[str, Recipe]"):
        self.arguments, self.overrides, self.recipes = arguments, overrides, recipes
        _check_recipes(recipes, measure=arguments.measure)
        first, *others = recipes
        labels = recipes[first].arguments.reward_funcs
        self.weights = _weights(recipes[first])
        self.weights_note = ""
        differing = [name for name in others if _directions(_weights(recipes[name])) != _directions(self.weights)]
        if differing:
            self.weights_note = (
                f"`reward_weights` say which rewards `sum` and `worst` are made of, and that low is good where one is "
                f"negative. Those of {first} are used for all; {', '.join(differing)} trained with others."
            )
        self.ranges = _parse_ranges(arguments.ranges, labels)
        if not any(self.weights.values()):
            raise UsageError("All `reward_weights` are 0: there is nothing to compare.")

    def run(self, variants: "list[Variant]", baseline: str, caption: str) -> int:
        """Train, evaluate, write; the number of failed runs."""
        from ..comparison.figures import draw_curves, draw_trade_off
        from ..comparison.learning_rates import search_table
        from ..comparison.report import markdown, write_json
        from ..comparison.results import evaluate
        from ..comparison.variants import LADDER

        output, seeds = self.arguments.output, list(range(1, self.arguments.seeds + 1))
        rates, search = self._choose_learning_rates(variants) if self.arguments.learning_rates else ({}, [])
        runs = {
            variant.name: [
                self._make_run(variant, seed, output / "runs" / variant.name, rates.get(variant.name))
                for seed in seeds
            ]
            for variant in variants
        }
        outcomes = self._train([runs[variant.name][index] for index in range(len(seeds)) for variant in variants])
        results = evaluate(
            {variant.name: [outcomes[run.folder] for run in runs[variant.name]] for variant in variants},
            variants,
            seeds,
            baseline=baseline,
            weights=self.weights,
            ranges=self.ranges,
            contrasts=LADDER if self.arguments.match_whitening else (),
        )
        text = markdown(results, caption, rates)
        if self.weights_note:
            text += f"\n{self.weights_note}\n"
        if search:
            text += f"\n{search_table(search, self._tuning_seeds())}\n"
        (output / "report.md").write_text(text, encoding="utf-8")
        write_json(output / "results.json", results, caption, rates, search)
        written = ["report.md", "results.json"]
        if len(results.failures) < len(variants) * len(seeds):
            draw_curves(results, self.weights, output / "curves.png")
            draw_trade_off(results, output / "trade_off.png")
            written += ["curves.png", "trade_off.png"]
        print(f"\n{text}\nWritten to {output}: {', '.join(written)}.")
        return len(results.failures)

    def _choose_learning_rates(self, variants: "list[Variant]") -> tuple[dict[str, float], list[dict[str, Any]]]:
        from ..comparison.learning_rates import choose_learning_rates

        runs = {
            variant.name: {
                rate: [
                    self._make_run(variant, seed, self.arguments.output / "tuning" / variant.name / f"{rate:g}", rate)
                    for seed in self._tuning_seeds()
                ]
                for rate in self.arguments.learning_rates
            }
            for variant in variants
        }
        print(f"Choosing learning rates on seeds {', '.join(map(str, self._tuning_seeds()))}.")
        outcomes = self._train([run for by_rate in runs.values() for rate in by_rate for run in by_rate[rate]])
        curves = {
            name: {rate: [outcomes[run.folder][1] for run in some] for rate, some in by_rate.items()}
            for name, by_rate in runs.items()
        }
        rates, search = choose_learning_rates(curves, self.weights, self.ranges)
        for variant in variants:
            if variant.name not in rates:
                folder = self.arguments.output / "tuning" / variant.name
                raise UsageError(f"{variant.name} fails at every learning rate tried; the logs are in '{folder}'.")
            print(f"Learning rate of {variant.name}: {rates[variant.name]:g}")
        return rates, search

    def _tuning_seeds(self) -> list[int]:
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.arguments.tuning_seeds))

    def _make_run(self, variant: "Variant", seed: int, parent: Path, learning_rate: float | None) -> "Run":
        from ..comparison.running import Run, train_command

        settings = {**self.recipes[variant.name].settings, "seed": seed}
        settings = {
            key: value for key, value in settings.items() if key not in ("output_dir", "resume_from_checkpoint")
        }
        overrides = list(self.overrides)
        if learning_rate is not None:
            settings["learning_rate"] = learning_rate
            overrides += ["--learning_rate", repr(learning_rate)]
        folder = parent / f"seed-{seed}"
        command = train_command(self.arguments.config, variant, seed, folder, overrides)
        return Run(variant, seed, folder, command, json.loads(json.dumps(settings, default=str)))

    def _train(self, runs: "list[Run]") -> "dict[Path, tuple[Outcome, Curves | None]]":
        from ..comparison.curves import read_curves
        from ..comparison.running import run_all

        def report(line: str) -> None:
            print(line, flush=True)

        outcomes = run_all(runs, jobs=self.arguments.jobs, devices=self.arguments.devices, report=report)
        result = {}
        for outcome in outcomes:
            training = self.recipes[outcome.run.variant.name].training
            rollouts = training.per_device_train_batch_size * training.gradient_accumulation_steps
            curves = None
            if outcome.state is not None:
                try:
                    curves = read_curves(
                        outcome.state, list(self.weights), rollouts, held_out=self.arguments.measure == "eval"
                    )
                except UsageError as error:
                    raise UsageError(f"{outcome.run.label}: {error}") from error
            result[outcome.run.folder] = (outcome, curves)
        return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gd2po compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="RECIPE", help="the recipe to train")
    parser.add_argument("--methods", nargs="*", metavar="METHOD", help="presets to train (default: all four)")
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
        help="range that a reward is normalised by (default: lowest and highest batch mean of all runs)",
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
        "--output",
        type=Path,
        default=Path("outputs/comparison"),
        metavar="DIR",
        help="folder of the runs and the report (default: outputs/comparison)",
    )
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("tuning_seeds", 1), ("jobs", 1)):
        if getattr(arguments, name) < least:
            raise UsageError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; it must be at least {least}.")
    if arguments.seeds >= FIRST_TUNING_SEED:
        raise UsageError(f"--seeds is {arguments.seeds}; it must be below {FIRST_TUNING_SEED}.")
    if len(set(arguments.devices)) < len(arguments.devices):
        raise UsageError("--devices names a device twice; each has one run at a time.")
    for rate in arguments.learning_rates:
        if not 0 < rate < float("inf"):
            raise UsageError(f"--learning-rates has {rate:g}; a learning rate is positive.")
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UsageError(f"--output '{arguments.output}' is a file; name a folder.")


def _check_recipes(recipes: "dict[str, Recipe]", *, measure: str) -> None:
    first = next(iter(recipes))
    rewards = recipes[first].arguments.reward_funcs
    for name, recipe in recipes.items():
        if set(recipe.arguments.reward_funcs) != set(rewards):
            raise UsageError(
                f"{name} has the rewards {', '.join(recipe.arguments.reward_funcs)}, and {first} has "
                f"{', '.join(rewards)}; only runs with the same rewards can be compared. A reward of weight 0 "
                "(`reward_weights`) is logged and not trained on."
            )
        if measure == "eval" and recipe.training.eval_strategy == "no":
            raise UsageError(
                f"--measure eval: {name}: `eval_strategy` is 'no'. Set it to 'steps' with `eval_steps`, and "
                "`eval_dataset`, in the recipe or with --set."
            )


def _weights(recipe: "Recipe") -> dict[str, float]:
    labels = recipe.arguments.reward_funcs
    return dict(zip(labels, recipe.training.reward_weights or [1.0] * len(labels), strict=True))


def _directions(weights: dict[str, float]) -> dict[str, int]:
    """Per reward 1, -1, or 0 where it has no weight."""
    return {name: (weight > 0) - (weight < 0) for name, weight in weights.items()}


def _parse_ranges(texts: Sequence[str], labels: Sequence[str]) -> dict[str, tuple[float, float]]:
    ranges = {}
    for text in texts:
        name, _, bounds = text.rpartition("=")
        low, _, high = bounds.partition(":")
        if name not in labels:
            raise UsageError(f"--ranges {text}: '{name}' is none of the rewards ({', '.join(labels)}).")
        try:
            ranges[name] = (float(low), float(high))
        except ValueError:
            raise UsageError(f"--ranges {text}: write REWARD=LOW:HIGH, such as format=0:1.") from None
        if not ranges[name][0] < ranges[name][1]:
            raise UsageError(f"--ranges {text}: the range is empty.")
    return ranges
