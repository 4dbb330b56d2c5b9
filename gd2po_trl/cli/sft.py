"""`gd2po sft`."""

from ..terminal import set_up_logging
from .train import split_arguments


USAGE = """usage: gd2po sft --config RECIPE.yaml [--any_field value ...]

Warms a policy up on demonstrations with TRL's SFTTrainer, so that RL starts from a policy that knows the format.
Every key of a recipe is an option, and an option wins over the recipe:

  gd2po sft --config recipe.yaml --dataset_path rlla_sft.json --learning_rate 5e-5

  --config RECIPE.yaml   the recipe; `gd2po recipes list` shows those that come with the package
  --help-all             every key with its meaning and default
"""


def main(argv: list[str]) -> int:
    """Run `gd2po sft`; the exit status."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    set_up_logging()
    from ..progress import RewardProgress
    from ..recipe import print_options
    from ..sft import KINDS, load_sft_recipe, run_sft

    if "--help-all" in argv:
        print_options(KINDS, "gd2po sft")
        return 0
    recipe = load_sft_recipe(*split_arguments(argv, "gd2po sft"))
    progress = RewardProgress()
    try:
        trainer = run_sft(recipe, progress=progress)
    finally:
        progress.close()
    folder = recipe.training.output_dir
    trainer.accelerator.print(
        f"The policy, its recipe and its log are in {folder}. Next: gd2po train --config RECIPE --model_name_or_path "
        f"{folder}"
    )
    return 0
