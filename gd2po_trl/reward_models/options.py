"""Checks of the options that a recipe gives a reward: one error that names the option and what it may be."""

import math
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError


def check_integer(name: str, value: Any, minimum: int, of: str = "") -> None:
    """Raise [`UsageError`] unless the option `name`, of a model, is a whole number of at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name}={value!r}{of and f' of {of}'} must be a whole number.")
    if value < minimum:
        raise UsageError(f"{name}={value!r}{of and f' of {of}'} must be at least {minimum}.")


def check_number(name: str, value: Any, *, positive: bool = False) -> None:
    """Raise [`UsageError`] unless the option `name` is a finite number, not negative or `positive`."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value < 0 or (positive and value == 0):
        raise UsageError(f"{name}={value!r} must be {'positive' if positive else 'a number, not negative'}.")


def check_switch(name: str, value: Any, of: str) -> None:
    """Raise [`UsageError`] unless the option `name`, of a model, is true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"{name}={value!r} of {of} must be true or false.")


def check_mapping(name: str, value: Any) -> None:
    """Raise [`UsageError`] unless the option `name` is a mapping or `None`."""
    if value is not None and not isinstance(value, Mapping):
        # Headers may hold a token, so that the value is not quoted.
        raise UsageError(f"{name} is a {type(value).__name__}; it must be a mapping of names to values.")
