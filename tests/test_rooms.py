"""Imports go one way: a room, a module or package of `gd2po_trl`, knows only those before it in the architecture."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gd2po_trl


PACKAGE = Path(gd2po_trl.__file__).parent

PAGE = Path(__file__).resolve().parents[1] / "docs/architecture.md"
TABLE = PAGE.read_text(encoding="utf-8").partition("## Packages")[2].partition("## ")[0]
# The first column's names, in their order.
ROOMS = [
    name for row in re.findall(r"^\| (`.*?) \|", TABLE, re.MULTILINE) for name in re.findall(r"`(\w+)(?:\.py|/)`", row)
]


def rooms_on_disk() -> set[str]:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "_version"}
    return modules | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def imported_rooms(file: Path) -> Iterator[str]:
    """The rooms that a file imports, anywhere but for type checking."""
    package = ("gd2po_trl", *file.relative_to(PACKAGE).parts[:-1])
    todo: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("gd2po_trl."))


def test_the_table_holds_every_room():
    assert sorted(ROOMS) == sorted(rooms_on_disk())


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_knows_only_the_rooms_before_it(room):
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).rglob("*.py"))
    assert files
    known = {name for file in files for name in imported_rooms(file)} & set(ROOMS)
    assert known <= {*ROOMS[: ROOMS.index(room)], room}
