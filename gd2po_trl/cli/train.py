"""`gd2po train`."""

import argparse
import logging

from ..errors import UsageError


USAGE = """usage: gd2po train --config RECIPE.yaml [--any_field value ...]

Trains a policy as a recipe describes. Every key of a recipe is an option, and an option wins over the recipe:

  gd2po train --config recipe.yaml --method gd2po_snr --snr_threshold 0.6 --seed 1
  accelerate launch -m gd2po_trl.cli train --config recipe.yaml

  --config RECIPE.yaml   the recipe; `gd2po recipes list` shows those that come with the package
  --help-all             every key with its meaning and default
"""


def main(argv: list[str]) -> int:
    """Run `gd2po train`; the exit status."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    from ..recipe import load_recipe, print_options

    if "--help-all" in argv:
        print_options()
        return 0
    recipe = load_recipe(*split_arguments(argv, "gd2po train"))

    from ..training import run_recipe

    show_progress()
    trainer = run_recipe(recipe)
    trainer.accelerator.print(f"The policy, its recipe and its log are in {recipe.training.output_dir}.")
    return 0


def show_progress() -> None:
    """Print what this package logs at level INFO, once for all processes."""
    from accelerate import PartialState

    logging.basicConfig(format="%(message)s")
    if PartialState().is_main_process:
        logging.getLogger("gd2po_trl").setLevel(logging.INFO)


def split_arguments(argv: list[str], command: str) -> tuple[str | None, list[str]]:
    """The recipe's path, if there is one, and the options that win over it."""
    parser = argparse.ArgumentParser(prog=command, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        known, overrides = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    if known.config is None and not overrides:
        raise UsageError("which recipe? Give --config RECIPE.yaml; `gd2po recipes list` shows some.")
    return known.config, overrides
