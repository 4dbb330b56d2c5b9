"""`gd2po recipes`."""

import argparse
import re
import shutil
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path

from ..errors import UsageError
from ..recipe.catalog import FOLDER, TEMPLATES, files_of, recipe_names, recipe_path, summary


def main(argv: list[str]) -> int:
    """Run `gd2po recipes`; the exit status."""
    parser = argparse.ArgumentParser(prog="gd2po recipes", description="The recipes that come with the package.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names and summaries")
    show = actions.add_parser("show", help="print a recipe, its bases first")
    show.add_argument("name")
    show.add_argument("--merged", action="store_true", help="print the keys after merging the bases instead")
    new = actions.add_parser("new", help="start a recipe with rewards and data of your own")
    new.add_argument("name", help="folder to make, such as my_task")
    copy = actions.add_parser("copy", help="copy a recipe and its bases, to be changed")
    copy.add_argument("name")
    copy.add_argument("destination", nargs="?", default="recipes", help="folder (default: recipes)")
    arguments = parser.parse_args(argv)

    if arguments.action == "list":
        names = recipe_names()
        width = max(map(len, names))
        for name in names:
            print(f"{name:<{width}}  {summary(recipe_path(name))}")
    elif arguments.action == "show":
        _show(recipe_path(arguments.name), merged=arguments.merged)
    elif arguments.action == "new":
        _new(arguments.name)
    else:
        print(f"Copied to {_copy(recipe_path(arguments.name), Path(arguments.destination))}")
    return 0


def _new(name: str) -> None:
    """Make a folder with a recipe, two rewards and five prompts, to be replaced by the user's own."""
    folder = Path(name)
    if folder.is_absolute() or not all(part.isidentifier() and not iskeyword(part) for part in folder.parts):
        suggestion = re.sub(r"\W+", "_", folder.name).strip("_") or "my_task"
        raise UsageError(
            f"'{name}' cannot be imported, as the rewards in it are: a name has letters, digits and _, and is below "
            f"the current folder. Take {suggestion if suggestion.isidentifier() else 'my_task'}?"
        )
    if folder.exists():
        raise UsageError(f"'{name}' exists already; take another name.")
    if not Path(folder.parts[0]).is_dir() and find_spec(folder.parts[0]) is not None:
        raise UsageError(f"There is a Python module called {folder.parts[0]}, for which the rewards would be taken.")
    files = {file.name: file.read_text(encoding="utf-8") for file in sorted(TEMPLATES.iterdir()) if file.is_file()}
    try:
        folder.mkdir(parents=True)
        for file, text in files.items():
            text = text.replace("my_task.rewards", ".".join((*folder.parts, "rewards")))
            (folder / file).write_text(text.replace("my_task", folder.as_posix()), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"Cannot write to '{name}': {error.strerror}.") from error
    print(
        f"{folder}/recipe.yaml    the recipe, every key under its explanation\n"
        f"{folder}/rewards.py     two rewards, to be replaced by yours\n"
        f"{folder}/prompts.jsonl  five prompts, with a column that a reward reads\n\n"
        f"Change them, then:  gd2po train {folder} --dry-run\n"
        f"                    gd2po train {folder}"
    )


def _show(path: Path, *, merged: bool) -> None:
    if merged:
        import yaml

        from ..recipe.files import read_recipe_file

        print(yaml.safe_dump(read_recipe_file(path), allow_unicode=True), end="")
        return
    for file in files_of(path):
        print(f"# --- {file.relative_to(FOLDER.resolve()).as_posix()}")
        print(file.read_text(encoding="utf-8"))


def _copy(path: Path, destination: Path) -> Path:
    """Copy a recipe and its bases with their folders; files that differ are not overwritten."""
    files = files_of(path)
    targets = [destination / file.resolve().relative_to(FOLDER.resolve()) for file in files]
    for file, target in zip(files, targets, strict=True):
        if target.is_file() and target.samefile(file):
            raise UsageError(f"'{destination}' is where the recipes are already; name another folder.")
        if target.is_file() and target.read_bytes() != file.read_bytes():
            raise UsageError(f"'{target}' exists and differs; move it away, or name another folder.")
    try:
        for file, target in zip(files, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    except OSError as error:
        raise UsageError(f"Cannot write to '{destination}': {error.strerror}.") from error
    return targets[-1]
