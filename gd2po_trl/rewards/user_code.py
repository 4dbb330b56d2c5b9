"""Functions of the user's own: found by a dotted path, with the keyword arguments that a recipe gives them."""

import difflib
import functools
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Collection
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import UsageError, one_line


_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
# What others write: my_rewards.py:brevity, ./rewards/my_rewards.py, my_rewards:brevity.
_FILE_AND_FUNCTION = re.compile(r"([\w./\\-]+?)(?:\.py(?::(\w+))?|:(\w+))")

# What TRL itself passes to every reward function.
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def is_dotted_path(text: str) -> bool:
    """Whether `text` may be the dotted path of a function: words, and a dot between them."""
    return _DOTTED_PATH.fullmatch(text) is not None


def path_of_file(text: str) -> str | None:
    """The dotted path that is meant by `folder/module.py:function`; `None` for text of another form."""
    match = _FILE_AND_FUNCTION.fullmatch(text)
    if match is None:
        return None
    module = re.sub(r"[\\/]+", ".", match[1].removeprefix("./"))
    return f"{module}.{match[2] or match[3] or 'NAME'}"


def as_dotted_path(text: str) -> str | None:
    """The dotted path that `text` is, or as `folder/module.py:function` stands for; `None` if it is neither."""
    path = path_of_file(text) or text
    return path if is_dotted_path(path) else None


def import_object(path: str, what: str, beside: Path | None = None) -> Any:
    """
    The function or class at a dotted path, from the current folder or an installed package.

    Args:
        path (`str`): Such as `"my_rewards.brevity"`.
        what (`str`): How messages call it, such as `"The reward 'brevity'"`.
        beside (`Path`, *optional*):
            Folder of the recipe. A module there is not imported, but told from one that is nowhere.

    Raises:
        [`UsageError`]: if there is no such module or function, or if importing the module fails.
    """
    module_name, _, attribute = path.rpartition(".")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        # As with `python -m`, a module in the current folder can be named.
        sys.path.insert(0, str(Path.cwd()))
    where = f"{what} is {path}"
    module = _import_module(path, module_name, where, beside)
    try:
        target = getattr(module, attribute)
    except AttributeError:
        names = _callables(module)
        close = difflib.get_close_matches(attribute, names, n=1)
        hint = f"Did you mean {module_name}.{close[0]}?" if close else f"It has: {', '.join(names) or 'no function'}."
        raise UsageError(f"{where}, but {_file_of(module)} has no `{attribute}`. {hint}") from None
    if not callable(target):
        listed = ", ".join(_callables(module)) or "none"
        raise UsageError(f"{where}, which is not a function or class. Those of {_file_of(module)}: {listed}.")
    return target


def build_object(
    target: Any, what: str, kwargs: dict[str, Any], reserved: Collection[str] = TRL_ARGUMENTS
) -> Callable:
    """
    An instance of a class, or a function with its keyword arguments bound.

    Args:
        target (`Callable`): The class or function.
        what (`str`): How messages call it.
        kwargs (`dict`): The keyword arguments.
        reserved (collection of `str`): Parameters of a function that its caller fills.

    Raises:
        [`UsageError`]: for an argument that `target` has no parameter for (`**kwargs`, which takes the columns of the
            data, does not count), or one that it refuses.
    """
    _check_names(target, what, kwargs, reserved)
    try:
        signature = inspect.signature(target)
        signature.bind(**kwargs) if inspect.isclass(target) else signature.bind_partial(**kwargs)
    except TypeError as error:
        raise UsageError(f"{what} does not take these keyword arguments: {error}.") from error
    except ValueError:  # some builtins have no signature
        pass
    if not inspect.isclass(target):
        return functools.partial(target, **kwargs)
    try:
        instance: Any = target(**kwargs)
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # whatever the class does
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UsageError(f"{what}: {kind}{one_line(error, 'it says nothing')}") from error
    if not callable(instance):
        raise UsageError(f"{what} is a {target.__name__}, which has no `__call__`.")
    return instance


def _check_names(target: Any, what: str, kwargs: dict[str, Any], reserved: Collection[str]) -> None:
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return
    named = [
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and (inspect.isclass(target) or parameter.name not in reserved)
    ]
    forwards = inspect.isclass(target) and any(item.kind is item.VAR_KEYWORD for item in parameters)
    for name in kwargs:
        close = difflib.get_close_matches(str(name), named, n=1)
        # The `**kwargs` of a class may be handed on to another one; what is nearly a name of its own is a slip.
        if name in named or (forwards and not close):
            continue
        hint = f" Did you mean `{close[0]}`?" if close else f" It takes: {', '.join(named) or 'none'}."
        raise UsageError(f"{what} takes no keyword argument `{name}`.{hint}")


def _import_module(path: str, module_name: str, where: str, beside: Path | None) -> ModuleType:
    missing = _missing_part(module_name)
    if missing is not None:
        raise UsageError(f"{where}, and there is no module {missing}. {_where_it_may_be(path, missing, beside)}")
    try:
        return import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{where}, and {module_name} imports {error.name}, which is not installed.") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the module does while it is imported, `exit()` included
        reason = f"{type(error).__name__}: {one_line(error, 'it says nothing')}{_line_of(error)}"
        raise UsageError(f"{where}, and importing {module_name} failed: {reason}.") from error


def _missing_part(module_name: str) -> str | None:
    """The first part of a module's dotted name that is not there."""
    parts = module_name.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        try:
            if find_spec(name) is None:
                return name
        except ModuleNotFoundError:
            return name  # its parent is no package
        except (Exception, SystemExit):
            return None  # its parent's own code fails, which importing it says better
    return None


def _where_it_may_be(path: str, missing: str, beside: Path | None) -> str:
    here, first = Path.cwd(), missing.split(".")[0]
    looked = f"Modules are looked for in the current folder, {here}, and among the installed packages."
    if beside is not None and beside.resolve() != here and (file := beside / f"{first}.py").is_file():
        folder = beside.resolve()
        inside = folder.relative_to(here).parts if folder.is_relative_to(here) else ()
        as_path = ".".join((*inside, path)) if inside and all(part.isidentifier() for part in inside) else None
        remedy = f"name it {as_path}, or run the command in {beside}" if as_path else f"run the command in {beside}"
        return f"{file} lies beside the recipe: {remedy}. {looked}"
    modules = sorted({file.stem for file in here.glob("*.py")} | {file.parent.name for file in here.glob("*/*.py")})
    close = difflib.get_close_matches(first, modules, n=1)
    hint = f"Did you mean {'.'.join((close[0], *path.split('.')[1:]))}? " if close else ""
    return f"{hint}{looked}"


def _callables(module: ModuleType) -> list[str]:
    """Names of the functions and classes that a module defines itself."""
    return sorted(
        name
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    )


def _file_of(module: ModuleType) -> str:
    return getattr(module, "__file__", None) or module.__name__


def _line_of(error: BaseException) -> str:
    """Where in the user's own code it happened."""
    if isinstance(error, SyntaxError):
        return ""  # says so itself
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    # A library that the code calls may come last: wandb wraps `sys.exit`.
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f" ({own[-1].filename}, line {own[-1].lineno})" if len(frames) > 1 else ""
