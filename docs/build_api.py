"""
Writes `docs/api.md`, the API reference, from the docstrings of the public functions and classes.

    python docs/build_api.py           # write
    python docs/build_api.py --check   # exit status 1 if the file is not up to date
"""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any


OUTPUT = Path(__file__).with_name("api.md")

# Module -> its public names, in the order of the page.
PUBLIC: dict[str, tuple[str, ...]] = {
    "gd2po_trl": ("GD2POTrainer", "GD2POConfig", "compute_advantages", "AdvantageBreakdown", "subsample_advantages"),
    "gd2po_trl.estimators": ("rvpo", "soft_conflicts"),
    "gd2po_trl.diagnostics": ("conflict_metrics", "pair_conflicts"),
    "gd2po_trl.recipe": ("load_recipe", "Recipe", "RecipeArguments", "DatasetArguments"),
    "gd2po_trl.training": ("run_recipe",),
    "gd2po_trl.training.sft": ("load_sft_recipe", "run_sft"),
    "gd2po_trl.progress": ("RewardProgress",),
    "gd2po_trl.rewards": ("resolve_reward",),
    "gd2po_trl.tasks.tool_calling.rewards": ("Correctness", "Format", "Length", "correctness", "format", "length"),
    "gd2po_trl.reward_models.in_process": ("RewardModel",),
    "gd2po_trl.reward_models.served": ("RemoteScorer",),
    "gd2po_trl.reward_models.text_scorer": ("TextScorer", "fit_text_scorer"),
    "gd2po_trl.reward_guard": ("RewardError",),
    "gd2po_trl.datasets": ("load_dataset_by_name", "drop_long_prompts", "truncate_prompts_left"),
    "gd2po_trl.tasks.tool_calling.api_bank": ("load_rows", "score_completion", "score_predictions", "ApiBankScore"),
    "gd2po_trl.tasks.safe_alignment.evaluation": ("load_rows", "summarize"),
    "gd2po_trl.evaluation.scoring": ("resolve_rewards", "compute_scores"),
    "gd2po_trl.analysis": ("analyze", "analyze_rewards", "Report", "VerdictCallback"),
    "gd2po_trl.analysis.diagnosis": ("Finding", "Recommendation"),
    "gd2po_trl.comparison": ("compare",),
    "gd2po_trl.run_log": ("checkpoint_to_resume", "find_damage"),
    "gd2po_trl.errors": ("UsageError",),
}
# Its signature is every field of TRL's config.
WITHOUT_SIGNATURE = {"GD2POConfig"}

SECTIONS_WITH_ENTRIES = ("Args", "Attributes", "Raises")
SECTION = re.compile(rf"({'|'.join(SECTIONS_WITH_ENTRIES)}|Returns|Examples?):")


def render() -> str:
    """The page."""
    parts = [
        "# API reference\n\nFrom the docstrings, by `python docs/build_api.py`. `B` is the number of rollouts in a "
        "batch, `K` that of reward\nfunctions.\n"
    ]
    for module_name, names in PUBLIC.items():
        module = import_module(module_name)
        parts.append(f"## `{module_name}`\n")
        for name in names:
            parts += _entry(name, getattr(module, name))
        if module_name == "gd2po_trl.datasets":
            parts += _loaders(module.DATASETS)
    return "\n".join(parts)


def _loaders(registry: dict[str, Any]) -> Iterator[str]:
    yield "### Loaders\n"
    yield "By short name; `load_dataset_by_name` takes their options as keyword arguments.\n"
    for name, loader in registry.items():
        yield f"#### `{name}`\n"
        yield to_markdown(loader.load.__doc__)


def _entry(name: str, thing: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    if name not in WITHOUT_SIGNATURE:
        yield f"```text\n{name}{_signature(thing)}\n```\n"
    yield to_markdown(thing.__doc__)
    if not inspect.isclass(thing):
        return
    for member_name, member in vars(thing).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        is_public = not member_name.startswith("_") or member_name == "__call__"
        if is_public and function.__doc__ and inspect.isfunction(function):
            yield f"#### `{name}.{member_name}{_signature(function, is_method=True)}`\n"
            yield to_markdown(function.__doc__)
        elif is_public and isinstance(member, property):
            yield f"#### `{name}.{member_name}`\n"
            yield to_markdown(member.__doc__)


def _signature(function: Callable, *, is_method: bool = False) -> str:
    """Names and defaults; the types are in the text."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # exceptions have none
        return "(message)"
    parameters = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    if is_method:
        parameters = parameters[1:]
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    if len(text) > 90 and not is_method:
        inner = ",\n".join(textwrap.wrap(text[1:-1], 100, initial_indent="    ", subsequent_indent="    "))
        text = f"(\n{inner.replace(',,', ',')}\n)"
    return text


def to_markdown(docstring: str | None) -> str:
    """A docstring in TRL's style as markdown: sections in bold, their entries as lists."""
    # [`Name`] is a link in TRL's documentation builder.
    lines = re.sub(r"\[`~?([^`]+)`\](?!\()", r"`\1`", inspect.cleandoc(docstring or "")).split("\n")
    output: list[str] = []
    index = 0
    while index < len(lines):
        section = SECTION.fullmatch(lines[index])
        if section is None:
            if lines[index].startswith("```python") and not any(">>>" in line for line in lines[index:]):
                output.append("<!-- not run: an outline -->")
            output.append(lines[index])
            index += 1
            continue
        end = index + 1
        while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
            end += 1
        body = textwrap.dedent("\n".join(lines[index + 1 : end])).strip("\n").split("\n")
        output += [f"**{section[1]}**", ""]
        output += _entries(body) if section[1] in SECTIONS_WITH_ENTRIES else body
        output.append("")
        index = end
    return re.sub(r"\n{3,}", "\n\n", "\n".join(output)).strip() + "\n"


def _entries(body: list[str]) -> Iterator[str]:
    """List items: a line that is not indented starts one, and what belongs to it is dedented to two spaces."""
    for block in re.split(r"\n(?=\S)", "\n".join(body)):
        head, _, rest = block.partition("\n")
        text = textwrap.dedent(rest).rstrip()
        name, found, kind = re.sub(r":$", "", head).partition(" (")
        if found and not name.startswith(("[", "`")):
            head = f"**{name}** ({kind}" + (":" if head.endswith(":") else "")
        yield f"- {head}"
        if text:
            yield textwrap.indent(text, "  ")


def main(argv: list[str]) -> int:
    """Write the page, or check it; the exit status."""
    page = render()
    if "--check" in argv:
        is_current = OUTPUT.is_file() and OUTPUT.read_text(encoding="utf-8") == page
        print(f"{OUTPUT.name} is {'up to date' if is_current else 'not up to date: python docs/build_api.py'}")
        return 0 if is_current else 1
    OUTPUT.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
