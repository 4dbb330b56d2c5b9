"""`gd2po quickstart`."""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..recipe.catalog import recipe_path


if TYPE_CHECKING:
    from ..gd2po_trainer import GD2POTrainer
    from ..recipe import Recipe

RECIPE = "quickstart/tool_calling"
DEFAULT_OUTPUT = Path("outputs/quickstart")
TRAINED_FOLDER = "trained"
NUM_SAMPLES = 3

DESCRIPTION = """
Shows GD2PO at work in about a minute on a CPU: generates a small tool-calling task, teaches a policy of 0.1 M
parameters its format from careless demonstrations, trains it as the recipe quickstart/tool_calling describes, and
reports the rewards on held-out prompts before and after. Needs no download.

Any key of the recipe is an option: gd2po quickstart --method gdpo --max_steps 60

A run is never overwritten: without --output, the second one goes to outputs/quickstart-2.
"""


def main(argv: list[str]) -> int:
    """Run `gd2po quickstart`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="gd2po quickstart",
        usage="gd2po quickstart [--output DIR] [--seed N] [--warmup-steps N] [--prepare-only] [--any_field value ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        *("--output", "--output_dir", "--output-dir"),
        type=Path,
        metavar="DIR",
        help=f"(default: {DEFAULT_OUTPUT}, or the next one that is free)",
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of everything (default: %(default)s)")
    parser.add_argument(
        "--warmup-steps", type=int, default=400, metavar="N", help="of supervised training (default: %(default)s)"
    )
    parser.add_argument(
        "--prepare-only", action="store_true", help="stop after the data and the warmed-up policy are written"
    )
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.warmup_steps < 0:
        raise UsageError(f"--warmup-steps is {arguments.warmup_steps}; it must be 0 or more.")
    output = _free_folder(arguments.output)

    from ..progress import RewardProgress
    from ..quickstart.prepare import HELD_OUT_FILE, POLICY_FOLDER, TRAIN_FILE, prepare
    from ..recipe import load_recipe
    from ..training import resolve_rewards, run_recipe

    settings = {
        "model_name_or_path": output / POLICY_FOLDER,
        "dataset_path": output / TRAIN_FILE,
        "eval_dataset_path": output / HELD_OUT_FILE,
        "output_dir": output / TRAINED_FOLDER,
        "seed": arguments.seed,
    }
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    with _plain_output():
        # Before the warm-up, so that a mistake in the options shows at once.
        recipe = load_recipe(recipe_path(RECIPE), [*words, *overrides])
        rewards = dict(zip(recipe.arguments.reward_funcs, resolve_rewards(recipe), strict=True))
        prepare(output, seed=arguments.seed, num_warmup_steps=arguments.warmup_steps)
        if arguments.prepare_only:
            print(f"Data and policy are in {output}.")
            return 0
        shown = recipe.training.num_completions_to_print
        with RewardProgress(0 if shown is None else shown) as progress:
            trainer = run_recipe(recipe, callbacks=[progress])
        _report(recipe, trainer, rewards, output)
    return 0


def _free_folder(output: Path | None) -> Path:
    """`output`, or the first of the default folders without a run; refuses one that holds a run."""
    if output is None:
        output, number = DEFAULT_OUTPUT, 2
        while (output / TRAINED_FOLDER).exists():
            output, number = Path(f"{DEFAULT_OUTPUT}-{number}"), number + 1
        return output
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output '{output}' is a file; name a folder.")
    if (output / TRAINED_FOLDER).exists():
        raise UsageError(f"--output '{output}' holds a run already; name another folder, or delete that one.")
    return output


def _report(recipe: "Recipe", trainer: "GD2POTrainer", rewards: dict[str, Callable], output: Path) -> None:
    """Print completions of held-out prompts before and after, and the change of the rewards, and draw their curves."""
    from ..quickstart.prepare import HELD_OUT_FILE
    from ..quickstart.report import CURVES_FILE, REPORT_FILE, plot_curves, print_samples, sample_completions
    from ..terminal import make_console
    from .train import print_end

    with open(output / HELD_OUT_FILE, encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(NUM_SAMPLES)]
    prompts, length = [row["prompt"] for row in rows], recipe.training.max_completion_length
    folders = {"before": recipe.model.model_name_or_path, "after": recipe.training.output_dir}
    completions = {label: sample_completions(folder, prompts, length) for label, folder in folders.items()}
    curves = plot_curves(trainer.state.log_history, output / CURVES_FILE)

    console = make_console(record=True)
    print_samples(rows, completions, rewards, console)
    print_end(trainer, console)
    console.save_text(str(output / REPORT_FILE))
    print(f"\nCurves: {curves}\nThis report: {output / REPORT_FILE}")


@contextlib.contextmanager
def _plain_output() -> Iterator[None]:
    """One thread, on which so small a model is fastest, and no output but our own progress bars and report."""
    import warnings

    import datasets
    import torch
    from transformers.utils import logging as transformers_logging

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads(threads)
        transformers_logging.enable_progress_bar()
        datasets.enable_progress_bars()
