"""The recipes that come with the package."""

import difflib
from pathlib import Path

from ..errors import UsageError


PACKAGE = Path(__file__).resolve().parents[1]
# The folder of recipes is inside the package in a wheel, and beside it in a clone.
FOLDER = PACKAGE / "_recipes" if (PACKAGE / "_recipes").is_dir() else PACKAGE.parent / "recipes"

# Files that `gd2po recipes new` copies.
TEMPLATES = PACKAGE / "templates"


def find_recipe(name: str | Path) -> Path:
    """
    The recipe that a command is given: a file, a folder with a `recipe.yaml`, or a name that comes with the package.

    Raises:
        [`UsageError`]: if there is none, with the one that may have been meant.
    """
    path = Path(name).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        return path / "recipe.yaml"
    if path.exists() and not path.is_dir():
        return path
    known = recipe_names()
    packaged = path.as_posix().removeprefix("recipes/").removesuffix(".yaml")
    if packaged in known:
        return recipe_path(packaged)
    folder = path if path.is_dir() else path.parent
    files = [file.as_posix() for pattern in ("*.yaml", "*.yml", "*/recipe.yaml") for file in folder.glob(pattern)]
    files += [Path(file).parent.as_posix() for file in files if file.endswith("/recipe.yaml")]
    close = difflib.get_close_matches(path.as_posix(), files, n=1) or difflib.get_close_matches(packaged, known, n=1)
    hint = f"Did you mean '{close[0]}'?" if close else "`gd2po recipes list` shows those that come with the package."
    where = "the folder holds no recipe.yaml" if path.is_dir() else f"there is no such file in {folder.resolve()}"
    raise UsageError(f"Cannot read recipe '{name}': {where}, and no recipe of the package has this name. {hint}")


def recipe_names() -> list[str]:
    """Names of all recipes that can be run: their paths below `recipes/`, without `.yaml`."""
    return sorted(
        path.relative_to(FOLDER).with_suffix("").as_posix()
        for path in FOLDER.rglob("*.yaml")
        # Files whose name starts with an underscore are bases of others; accelerate's files are not recipes.
        if not path.name.startswith("_") and "accelerate_configs" not in path.parts
    )


def recipe_path(name: str) -> Path:
    """
    File of the recipe called `name`, with or without `.yaml`.

    Raises:
        [`UsageError`]: if there is no such recipe.
    """
    path = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file() or FOLDER not in path.resolve().parents:
        close = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.4)
        hint = f" Did you mean '{close[0]}'?" if close else " `gd2po recipes list` shows all."
        raise UsageError(f"There is no recipe '{name}'.{hint}")
    return path


def summary(path: Path) -> str:
    """First comment line of a recipe."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def files_of(path: Path) -> list[Path]:
    """A recipe's file and those of its bases, each once, bases first."""
    import yaml

    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    bases = content.get("base") or []
    files: list[Path] = []
    for base in [bases] if isinstance(bases, str) else bases:
        files += [file for file in files_of((path.parent / base).resolve()) if file not in files]
    return [*files, path]
