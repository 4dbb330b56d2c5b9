"""`gd2po recipes`."""

import argparse
import shutil
from pathlib import Path

from ..errors import UsageError
from ..recipe_catalog import FOLDER, files_of, recipe_names, recipe_path, summary


def main(argv: list[str]) -> int:
    """Run `gd2po recipes`; the exit status."""
    parser = argparse.ArgumentParser(prog="gd2po recipes", description="The recipes that come with the package.")
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="names and summaries")
    show = actions.add_parser("show", help="print a recipe, its bases first")
    show.add_argument("name")
    show.add_argument("--merged", action="store_true", help="print the keys after merging the bases instead")
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
    else:
        print(f"Copied to {_copy(recipe_path(arguments.name), Path(arguments.destination))}")
    return 0


def _show(path: Path, *, merged: bool) -> None:
    if merged:
        import yaml

        from ..recipe_files import read_recipe_file

        print(yaml.safe_dump(read_recipe_file(path), allow_unicode=True), end="")
        return
    for file in files_of(path):
        print(f"# --- {file.relative_to(FOLDER.resolve()).as_posix()}")
        print(file.read_text(encoding="utf-8"))


def _copy(path: Path, destination: Path) -> Path:
    """Copy with the folders kept, so that the bases are found; refuses to overwrite what was changed."""
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
