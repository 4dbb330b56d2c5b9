"""What a command line and a recipe say of the data and the rewards of an evaluation."""

from pathlib import Path
from typing import Any

import yaml

from ..datasets.sources import data_suffix
from ..errors import UsageError
from ..user_input import as_mapping


Options = dict[str, dict[str, Any]]


def data_options(words: list[str]) -> Options:
    """Arguments of [`~datasets.load_dataset_by_name`] by label, from words such as `alpaca` and `rows.jsonl`."""
    options: Options = {}
    for word in words:
        if Path(word).is_file():
            label, value = Path(word).stem, {"name": "prompts", "path": word}
        elif "=" not in word and ("/" in word or data_suffix(Path(word))):
            raise UsageError(f"--data is {word}, and there is no such file; NAME=PATH reads another data set.")
        else:
            label, value = _labelled(word, "--data", "path")
        if label in options:
            raise UsageError(
                f"--data names {label!r} twice; give one of them a label: 'LABEL={{name: ..., path: ...}}'."
            )
        options[label] = value
    return options


def reward_options(words: list[str]) -> Options:
    """Arguments of rewards by label, from words such as `format`, `size=my_rewards.size` and `recipe.yaml`."""
    options: Options = {}
    for word in words:
        if "=" not in word and word.endswith((".yaml", ".yml")):
            from ..recipe.files import read_recipe_file  # and with it TRL, for seconds

            found = rewards_of(read_recipe_file(Path(word)))
        else:
            found = dict([_labelled(word, "--reward", "type")])
        if twice := options.keys() & found.keys():
            raise UsageError(f"--reward names {sorted(twice)[0]!r} twice.")
        options |= found
    return options


def _labelled(word: str, option: str, key: str) -> tuple[str, dict[str, Any]]:
    """`LABEL`, `LABEL=TEXT` (short for `LABEL={key: TEXT}`) or `LABEL={...}` in YAML."""
    label, given, text = word.partition("=")
    if not given:
        return label, {}
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{option} {word!r} is not valid YAML after '=': {error}") from None
    if not isinstance(value, dict):
        return label, {key: text}
    if not all(isinstance(name, str) for name in value):
        raise UsageError(f"{option} {word!r}: the keys after '=' must be text.")
    return label, value


def rewards_of(recipe: dict[str, Any]) -> Options:
    """The rewards of a recipe by label; none where it names none."""
    labels, kwargs = recipe.get("reward_funcs") or [], as_mapping("reward_kwargs", recipe.get("reward_kwargs"))
    labels = [labels] if isinstance(labels, str) else labels
    return {label: as_mapping(f"reward_kwargs.{label}", kwargs.get(label)) for label in labels}


def data_of(recipe: dict[str, Any]) -> Options:
    """
    The data of a recipe by label: `eval_dataset`, or else `dataset`.

    Raises:
        [`UsageError`]: if it names neither.
    """
    key = "eval_dataset" if recipe.get("eval_dataset") else "dataset"
    if not recipe.get(key) and not recipe.get(f"{key}_path"):
        raise UsageError("which prompts? There is no recipe that names any; give --data or --config.")
    split = recipe.get(f"{key}_split") or ("test" if key == "eval_dataset" else None)
    if isinstance(recipe.get(key), dict):
        return {label: {"name": label, "split": split, **options} for label, options in recipe[key].items()}
    options = {"name": recipe.get(key) or "prompts", "path": recipe.get(f"{key}_path"), "split": split}
    label = "held out" if key == "eval_dataset" else "training data"
    return {label: {**options, **as_mapping(f"{key}_kwargs", recipe.get(f"{key}_kwargs"))}}
