"""What is compared: a method with overrides, under a name."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..errors import UsageError
from ..recipe.values import without_secrets
from ..rewards.user_code import as_dotted_path


MASK = "***"
# Keys that the comparison itself sets for every run.
RESERVED = ("config", "method", "seed", "output_dir", "resume_from_checkpoint")


@dataclass(frozen=True)
class Variant:
    """
    A method as it is trained.

    Args:
        name (`str`): Name in tables and of its folder.
        method (`str`): Key of `METHODS`.
        overrides (`tuple[str, ...]`): Options of `gd2po train`, such as `("--snr_threshold", "0.5")`.
    """

    name: str
    method: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contrast:
    """Two variants that differ in one thing, which `label` names."""

    label: str
    variant: str
    against: str


# Between neighbors of this ladder one thing changes, and filter and weighting are compared without any whitening.
MATCHED_WHITENING = (
    Variant("gdpo_unwhitened", "gdpo", ("--whitening", "none")),
    Variant("filter_unwhitened", "gd2po_hard", ("--consensus_weighting", "none", "--whitening", "none")),
    Variant("filter_weighting_unwhitened", "gd2po_hard", ("--whitening", "none")),
    Variant("gd2po_hard_scaled", "gd2po_hard", ("--whitening_shift_mean", "false")),
)
LADDER = (
    Contrast("filter, without whitening", "filter_unwhitened", "gdpo_unwhitened"),
    Contrast("consensus weight, without whitening", "filter_weighting_unwhitened", "filter_unwhitened"),
    Contrast("scaling by whitening, under GD²PO-Hard", "gd2po_hard_scaled", "filter_weighting_unwhitened"),
    Contrast("mean shift of whitening, under GD²PO-Hard", "gd2po_hard", "gd2po_hard_scaled"),
    Contrast("whitening, under GDPO", "gdpo", "gdpo_unwhitened"),
)


def make_variant(method: str, name: str | None = None, overrides: tuple[str, ...] = ()) -> Variant:
    """
    A variant of a preset or, for the dotted path of an estimator, of GDPO with that in the place of its sum.

    Args:
        method (`str`): Preset, or path such as `"gd2po_trl.estimators.rvpo"`.
        name (`str`, *optional*): By default the preset's, or the last word of the path.
        overrides (`tuple[str, ...]`): Options of `gd2po train`.
    """
    path = as_dotted_path(method)
    if path is None:
        return Variant(name or method, method, overrides)
    return Variant(name or path.rpartition(".")[2], "gdpo", ("--estimator", path, *overrides))


def check_variants(variants: Sequence[Variant]) -> None:
    """
    Check names and methods.

    Raises:
        [`UsageError`]: for no variant, an unknown method, or a name that is used twice or cannot be that of a folder.
    """
    from ..gd2po_config import METHODS

    if not variants:
        raise UsageError("There is nothing to compare: name --methods or add a --variant.")
    names = [variant.name for variant in variants]
    for variant in variants:
        if variant.method not in METHODS:
            raise UsageError(
                f"There is no method '{variant.method}'; choose from {', '.join(METHODS)}, or give an estimator's "
                "dotted path."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", variant.name):
            raise UsageError(f"'{variant.name}' cannot name a variant; use letters, digits, '.', '_' and '-'.")
        if names.count(variant.name) > 1:
            raise UsageError(f"Two variants are called '{variant.name}'.")


def option_words(settings: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Options of `gd2po train` for recipe keys and their values; `where` they are from is named in an error."""
    words: list[str] = []
    for key, value in settings.items():
        if key in RESERVED:
            raise UsageError(f"{where}: the comparison sets `{key}` itself.")
        if isinstance(value, Mapping):
            value = json.dumps(value)
        values = value if isinstance(value, (list, tuple)) else ["none" if value is None else value]
        words += [f"--{key}", *map(str, values)]
    return tuple(words)


def parse_settings(settings: Sequence[str], option: str) -> dict[str, Any]:
    """Recipe keys and their values from `key=value` words; a list is written with spaces or as in a recipe."""
    parsed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"{option} {setting}: write key=value.")
        key = key.lstrip("-").replace("-", "_")
        parsed[key] = value if value.startswith("{") else _words_of(value)
    return parsed


def _words_of(value: str) -> Any:
    if not value.startswith("["):
        return shlex.split(value)
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def mask_secrets(words: Sequence[str]) -> list[str]:
    """`words` of a command line for a file: what a recipe's record leaves out as a secret is masked."""
    masked, after_secret = [], False
    for word in words:
        if word.startswith("--"):
            after_secret = "=" not in word and _is_secret(word)
        elif after_secret:
            word = MASK
        masked.append(_mask_secrets_in_word(word))
    return masked


def _is_secret(key: str) -> bool:
    return not without_secrets({key.lstrip("-").replace("-", "_"): ""})


def _mask_secrets_in_word(word: str) -> str:
    """For `key=value`, `--option=key=value` and JSON."""
    if word.startswith(("{", "[")):
        try:
            value = json.loads(word)
        except ValueError:
            return MASK if _is_secret(word) or "_token" in word else word
        masked = _mask_secrets_in_json(value)
        return word if masked == value else json.dumps(masked)
    key, equals, value = word.partition("=")
    if not equals:
        return word
    return f"{key}={MASK if _is_secret(key) else _mask_secrets_in_word(value)}"


def _mask_secrets_in_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: MASK if _is_secret(key) else _mask_secrets_in_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mask_secrets_in_json(item) for item in value]
    return _mask_secrets_in_word(value) if isinstance(value, str) else value
