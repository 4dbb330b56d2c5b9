"""`gd2po sft`."""

from ..terminal import set_up_logging
from .train import split_arguments


USAGE = """usage: gd2po sft RECIPE [--KEY VALUE ...]

Trains a policy on demonstrations with TRL's SFTTrainer, so that RL starts from
one that knows the format. RECIPE is a YAML file, a folder with a recipe.yaml,
or a name from `gd2po recipes list`. Every key is an option and wins over it:

  gd2po sft recipe.yaml --dataset_path rlla_sft.json --learning_rate 5e-5

The keys that matter most:
  --model_name_or_path   folder or Hub id of the policy, or of an adapter
  --dataset, --dataset_path   loader, and file with `prompt` and `completion`
  --max_length           longest example in tokens; longer ones are left out
  --per_device_train_batch_size, --gradient_accumulation_steps
  --use_peft, --lora_r, --learning_rate, --num_train_epochs, --max_steps
  --output_dir, --resume_from_checkpoint latest

  --help-all             every key with its meaning and default"""


def main(argv: list[str]) -> int:
    """Run `gd2po sft`; the exit status."""
    if "-h" in argv or "--help" in argv:
        print(USAGE)
        return 0
    set_up_logging()
    from ..progress import RewardProgress
    from ..recipe import print_options
    from ..training.sft import KINDS, load_sft_recipe, run_sft

    if "--help-all" in argv:
        print_options(KINDS, "gd2po sft")
        return 0
    recipe = load_sft_recipe(*split_arguments(argv, "gd2po sft"))
    with RewardProgress() as progress:
        trainer = run_sft(recipe, progress=progress)
    folder = recipe.training.output_dir
    trainer.accelerator.print(
        f"The policy, its recipe and its log are in {folder}. Next: gd2po train --config RECIPE --model_name_or_path "
        f"{folder}"
    )
    return 0
