"""The values of a recipe's keys: what YAML and the command line mean by them, and which of them are possible."""

import types
import typing
from typing import Any

from ..errors import UsageError
from ..user_input import RANGES, as_mapping, check_ranges  # noqa: F401 (the checks of values in one place)


# Types as a user of YAML calls them.
TYPE_NAMES = {
    list: "a list",
    dict: "a mapping",
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
# The meaning of null for keys whose fields do not take it. `max_grad_norm: null` means no clipping.
NULL_MEANS = {"max_grad_norm": 0.0, "report_to": "none"}
# Words for null in text: of YAML and JSON, of the command line, and of Python.
NULL_WORDS = ("null", "none")
# Their type hints allow null, and TRL fails with it.
TAKES_NO_NULL = ("num_generations", "max_completion_length")


def accepted_types(hint: Any) -> set[Any]:
    """The types that a field's hint names, without their parameters."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {typing.get_origin(member) or member for member in members}


def as_meant(key: str, value: Any, default: Any) -> Any:
    """`value` in the type and unit of its field, where YAML, a command line or vLLM write it in another way."""
    is_nullable = default is None or key in NULL_MEANS
    if value is None or value == [None] or (is_nullable and str(value).lower() in NULL_WORDS):
        return NULL_MEANS.get(key)
    if key == "scale_rewards" and isinstance(value, bool):
        return "group" if value else "none"
    if key.endswith("_strategy") and value is False:  # YAML's reading of `no`
        return "no"
    if key == "resume_from_checkpoint" and isinstance(value, bool):
        return "latest" if value else None
    if key == "top_k" and value in (-1, "-1"):  # off, as vLLM and verl say it
        return 0
    if key == "lora_target_modules" and isinstance(value, str):  # PEFT takes all-linear as text
        return [value]
    if key == "generation_kwargs" and isinstance(value, dict) and value.get("top_k") == -1:
        return {**value, "top_k": 0}
    return value


def check_value(key: str, value: Any, hint: Any, default: Any, source: str) -> None:
    """
    Refuse a value of another type than its field holds: argparse converts text, and nothing else.

    Args:
        key (`str`): Its key.
        value (`Any`): The value.
        hint (`Any`): Type hint of the key's field.
        default (`Any`): Default of the field.
        source (`str`): Where the key stands, for messages.

    Raises:
        [`UsageError`]: if the field does not take it.
    """
    accepted = accepted_types(hint)
    if value is None:
        if default is not None and (type(None) not in accepted or key in TAKES_NO_NULL):
            shown = getattr(default, "value", default)
            raise UsageError(
                f"`{key}` in {source} is null, which it does not take; leave the key out for its default, {shown!r}."
            )
        return
    if (
        (isinstance(value, str) and not accepted <= {list, type(None)})
        or type(value) in accepted
        or (isinstance(value, int) and not isinstance(value, bool) and float in accepted)
        or not accepted <= {str, int, float, bool, list, dict, type(None)}
    ):
        return
    names = " or ".join(sorted(TYPE_NAMES.get(kind, kind.__name__) for kind in accepted if kind is not type(None)))
    raise UsageError(f"`{key}` in {source} is {value!r} ({type(value).__name__}); it must be {names}.")


def plain(value: Any) -> Any:
    """`value` in the types that YAML and JSON know; enumerations become their values."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    return plain(value.value) if hasattr(value, "value") else str(value)


_REMOTE_CODE = (
    "`{key}` in {source} would run code from the Hub, which a recipe cannot ask for. If you trust the model, give "
    "--{option} on the command line."
)


def refuse_remote_code(settings: dict[str, Any], source: str) -> None:
    """Refuse keys of a file, which may come from anyone, that would run code from a model's repository."""
    model_kwargs = as_mapping("model_init_kwargs", settings.get("model_init_kwargs"))
    places = {"": settings, "model_init_kwargs.": model_kwargs}
    for prefix, mapping in places.items():
        for key in ("trust_remote_code", "use_kernels"):
            if mapping.get(key):
                option = "model_init_kwargs '{\"use_kernels\": true}'" if key == "use_kernels" else key
                raise UsageError(_REMOTE_CODE.format(key=prefix + key, source=source, option=option))
        if "/" in str(mapping.get("attn_implementation") or ""):
            key = "attn_implementation"
            raise UsageError(_REMOTE_CODE.format(key=prefix + key, source=source, option=key))


_SECRET_WORDS = ("password", "secret", "api_key", "apikey", "headers", "authorization")
_TOKENS_OF_THE_VOCABULARY = ("eos_token", "pad_token")


def without_secrets(settings: Any) -> Any:
    """`settings` without passwords, tokens and the like, in nested mappings and lists too."""
    if isinstance(settings, (list, tuple)):
        return [without_secrets(item) for item in settings]
    if not isinstance(settings, dict):
        return settings
    return {key: without_secrets(value) for key, value in settings.items() if not _is_secret(str(key).lower())}


def _is_secret(key: str) -> bool:
    is_token = key == "token" or key.endswith("_token")
    return (is_token and key not in _TOKENS_OF_THE_VOCABULARY) or any(word in key for word in _SECRET_WORDS)
