"""Help texts of configuration fields, taken from the docstring of their class, so that each is written once."""

import re
from dataclasses import fields
from types import MappingProxyType
from typing import Any


_ENTRY = re.compile(r"^ {8}(\w+(?:, \w+)*)\b.*:\n((?: {12}.*\n|\n)+)", re.MULTILINE)


def help_from_docstring(dataclass: Any) -> Any:
    """
    Class decorator: gives each field that has an entry under `Args:` that entry as its help, for `--help-all`.

    Args:
        dataclass (`type`):
            A dataclass whose docstring lists its fields in the form of this one.

    Returns:
        `type`: the same class.
    """
    helps = {
        name: " ".join(text.split()) for names, text in _ENTRY.findall(dataclass.__doc__) for name in names.split(", ")
    }
    for item in fields(dataclass):
        if item.name in helps and "help" not in item.metadata:
            # argparse formats help texts with %.
            item.metadata = MappingProxyType({**item.metadata, "help": helps[item.name].replace("%", "%%")})
    return dataclass
