"""`gd2po train`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UsageError
from ..terminal import make_console, set_up_logging


if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Trainer


USAGE = """usage: gd2po train RECIPE [--KEY VALUE ...]

RECIPE is a YAML file, a folder with a recipe.yaml, or a name that
`gd2po recipes list` shows. Every key is an option, which wins over the recipe:

  gd2po train my_task --method gd2po_snr --learning_rate 2e-5 --seed 1
  accelerate launch -m gd2po_trl.cli train my_task         (several GPUs)

The keys that matter most:
  --model_name_or_path   folder or Hub id of the policy, or of an adapter
  --dataset_path         prompts: JSONL, JSON, CSV or parquet
  --reward_funcs A B     a label per reward; --reward_kwargs, --reward_weights
  --method               grpo, gdpo, gd2po_hard or gd2po_snr
  --num_generations      rollouts per prompt; --max_completion_length in tokens
  --per_device_train_batch_size, --gradient_accumulation_steps
  --use_peft, --lora_r, --learning_rate, --max_steps, --use_vllm
  --output_dir, --resume_from_checkpoint latest

  --dry-run              data, rewards, lengths, batches, steps and expected
                         memory, in seconds, and no training
  --completions FILE     with --dry-run: completions to score
  --help-all             every key with its meaning and default"""


def main(argv: list[str]) -> int:
    """Run `gd2po train`; the exit status."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    set_up_logging()
    from ..recipe import load_recipe, print_options

    if "--help-all" in argv:
        print_options()
        return 0
    is_dry, completions, argv = _take_dry_run(argv)
    recipe = load_recipe(*split_arguments(argv, "gd2po train"))
    if is_dry:
        from accelerate import PartialState

        from ..training.dry_run import dry_run

        PartialState().print(dry_run(recipe, completions))
        return 0

    from ..progress import RewardProgress
    from ..training import run_recipe

    shown = recipe.training.num_completions_to_print
    with RewardProgress(1 if shown is None else shown) as progress:
        trainer = run_recipe(recipe, callbacks=[progress])
    if trainer.is_world_process_zero():
        print_end(trainer)
    return 0


def print_end(trainer: "Trainer", console: "Console | None" = None) -> None:
    """Print what the training changed, where its files are, and what to do with them."""
    from ..progress import print_change

    folder, console = trainer.args.output_dir, console or make_console()
    console.print()
    print_change(trainer.state.log_history, console)
    console.print(f"The policy, its recipe and its log are in {folder}. Next:\n", soft_wrap=True)
    steps = {
        f"gd2po generate --model {folder} --prompt '…'": "read what it writes now",
        f"gd2po eval rewards --model {folder}": "its rewards, before against after",
    }
    if (Path(folder) / "completions").is_dir():
        steps[f"gd2po analyze {folder}"] = "how far the rewards conflict"
    if (Path(folder) / "adapter_config.json").is_file():
        steps[f"gd2po merge {folder}"] = "the adapter merged into its model"
    for command, purpose in steps.items():
        console.print(f"  {command}\n      {purpose}", soft_wrap=True)


def _take_dry_run(argv: list[str]) -> tuple[bool, str | None, list[str]]:
    """Whether it is a dry run, its file of completions, and the other words."""
    parser = argparse.ArgumentParser(prog="gd2po train", add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--dry-run", "--dry_run", action="store_true")
    parser.add_argument("--completions")
    try:
        known, others = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error
    if known.completions is not None and not known.dry_run:
        raise UsageError("--completions goes with --dry-run: training generates its own completions.")
    return known.dry_run, known.completions, others


def split_arguments(argv: list[str], command: str) -> tuple[str | None, list[str]]:
    """The recipe, if there is one (the first word, or `--config`), and the options that win over it."""
    parser = argparse.ArgumentParser(prog=command, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    is_option = argv and (argv[0].startswith(("-", "\N{EN DASH}", "\N{EM DASH}")) or "=" in argv[0])
    first = argv[0] if argv and not is_option else None
    try:
        known, overrides = parser.parse_known_args(argv if first is None else argv[1:])
    except argparse.ArgumentError as error:
        raise UsageError(f"{error}: give --config RECIPE, or the recipe as the first word.") from error
    if first is not None and known.config is not None:
        raise UsageError(f"two recipes, '{first}' and '{known.config}'; give one, which may name the other as `base`.")
    recipe = known.config if first is None else first
    if recipe is None and not overrides:
        raise UsageError(
            f"which recipe? `{command} RECIPE` takes a YAML file, a folder with a recipe.yaml, or a name from `gd2po "
            "recipes list`; `gd2po recipes new my_task` starts one."
        )
    return recipe, overrides
