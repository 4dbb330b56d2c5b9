"""What the package says it needs is what it imports, and every place names the same Python."""

import ast
import configparser
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from gd2po_trl.cli import COMMANDS


ROOT = Path(__file__).parents[1]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def declared(text: str) -> set[str]:
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {re.match(r"[\w.-]+", line.strip())[0].lower().replace("_", "-") for line in lines}


def imported() -> dict[str, set[str]]:
    """Top-level modules that the package imports from elsewhere, each with the files that do."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "gd2po_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                found.setdefault(name.split(".")[0], set()).add(path.name)
    return {name: files for name, files in found.items() if name not in {*sys.stdlib_module_names, "gd2po_trl"}}


def test_every_import_is_declared():
    required = declared(SETUP["options"]["install_requires"])
    optional = set().union(*(declared(text) for text in SETUP["options.extras_require"].values()))
    distributions = packages_distributions()
    for module, files in imported().items():
        names = {name.lower().replace("_", "-") for name in distributions.get(module, [module])}
        assert names & (required | optional), f"{module} ({', '.join(sorted(files))}) is not in setup.cfg"


@pytest.mark.parametrize("path", ["README.md", "Makefile"])
def test_one_python_everywhere(path):
    versions = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    oldest = versions[0]
    assert SETUP["options"]["python_requires"] == f">={oldest}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    assert tools["mypy"]["python_version"] == oldest
    named = re.findall(r"Python (3\.\d+)", (ROOT / path).read_text(encoding="utf-8"))
    assert named and set(named) == {oldest}


def test_the_wheel_holds_every_package():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "gd2po_trl").rglob("__init__.py")}
    elsewhere = re.findall(r"^(\S+) = ", SETUP["options"]["package_dir"], flags=re.MULTILINE)
    assert set(SETUP["options"]["packages"].split()) == found | set(elsewhere)
    assert all((ROOT / folder).is_dir() for folder in re.findall(r" = (\S+)$", SETUP["options"]["package_dir"], re.M))


def test_workflow_covers_every_python_and_runs_what_exists():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    pythons = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python-version"] == pythons
    commands = "\n".join(step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"])
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    made = set(re.findall(r"^make (\S+)", commands, flags=re.MULTILINE))
    assert {"lint", "test"} <= made <= set(targets)
    assert all((ROOT / name).is_file() for name in re.findall(r"constraints\S*\.txt", commands))
    used = set(re.findall(r"bin/gd2po ([a-z]\S*)", commands))
    assert used and used <= set(COMMANDS)
