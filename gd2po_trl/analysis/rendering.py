"""Writes the report: to the terminal, and as HTML, PNG and JSON."""

import base64
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ..errors import UsageError
from ..reporting import make_table, short_number, write_json
from ..terminal import make_console, printable, shorten
from .analyzer import Report
from .evidence import Example, tables


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report: the verdict and what to do first, then the evidence, examples and notes."""
    console = console or make_console()
    width = min(console.width, 110)

    def paragraph(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), width=width)

    def section(title: str, sentences: list[str], style: str = "") -> None:
        console.print(Text(title, style="bold"))
        for sentence in sentences:
            bullet = RichTable.grid(padding=(0, 1))
            bullet.add_row(Text("-", style=style), Text(printable(sentence), style=style))
            console.print(bullet, width=width)
        console.print()

    console.print()
    paragraph(report.verdict.text, "bold")
    console.print()
    for warning in report.warnings:
        paragraph(f"Careful: {warning}", "bold yellow")
    if report.warnings:
        console.print()
    section("What to do", report.recommendation.advice)
    for heading, lines in _settings(report):
        console.print(Text("\n    ".join([f"{heading}:", *lines])), soft_wrap=True)
        console.print()
    section("Evidence", _evidence(report))
    for table in tables(report):
        console.print(make_table(table.title, table.columns, table.rows))
        console.print(Padding(Text(table.help, style="dim"), (0, 1, 1, 1)), width=width)
    if report.examples:
        console.print(Text("Rollouts on which the rewards disagree most", style="bold"))
        for example in report.examples[:3]:
            _print_example(example, console, width)
        console.print()
    if report.notes:
        section("Notes", report.notes, "dim")


def _evidence(report: Report) -> list[str]:
    return [*(finding.text for finding in report.findings), *report.summary]


def _settings(report: Report) -> list[tuple[str, list[str]]]:
    """What to paste into a recipe: a heading, and lines of YAML."""
    settings = dict(report.recommendation.settings)
    blocks = []
    if settings:
        blocks.append(("Recommended settings", _yaml(settings, report)))
    if "reward_weights" not in settings and sum(reward.spread > 0 for reward in report.rewards) > 1:
        equal = {"scale_rewards": "none", "reward_weights": report.equalizing_weights}
        blocks.append(("Weights of 1 / spread, which make the rewards equally loud", _yaml(equal, report)))
    return blocks


def _yaml(settings: dict[str, Any], report: Report) -> list[str]:
    lines = []
    for key, value in settings.items():
        if key != "reward_weights":
            lines.append(f"{key}: {value}")
            continue
        width = max(len(f"{weight:g}") for weight in value)
        lines.append(f"{key}:")
        for weight, reward in zip(value, report.rewards, strict=True):
            lines.append(f"  - {f'{weight:g}'.ljust(width)}  # {' '.join(printable(reward.name).split())}")
    return lines


def _print_example(example: Example, console: Console, width: int) -> None:
    line = Text(f"\nstep {example.step}: ")
    line.append(f"{printable(example.favoured_by)} favors it", style="green")
    line.append(", ")
    line.append(f"{printable(example.penalised_by)} disfavors it", style="red")
    line.append(f"  ({printable(_values(example))})", style="dim")
    console.print(line, width=width)
    for label, text, length in (("prompt", example.prompt, 200), ("completion", example.completion, 300)):
        if not text:
            continue
        body = Text(f"{label}: ", style="dim")
        body.append(printable(shorten(" ".join(text.split()), length)), style="not dim")
        console.print(Padding(body, (0, 0, 0, 2)), width=width)


def _values(example: Example) -> str:
    return ", ".join(
        f"{name} {short_number(value)} → {example.advantages[name]:+.2f}" for name, value in example.rewards.items()
    )


def write_report(folder: Path, report: Report) -> list[Path]:
    """Write `report.html`, `report.png` and `report.json` into `folder`, which is made; the paths written."""
    from .figure import draw  # matplotlib is slow to load, and only needed here

    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("report.html", "report.png", "report.json")]
        draw(report, paths[1])
        page = render_html(report, paths[1].read_bytes())
        paths[0].write_text(page, encoding="utf-8", errors="backslashreplace")  # a lone surrogate in a completion
        write_json(paths[2], report.to_dict())
    except OSError as error:
        raise UsageError(f"the report cannot be written to '{folder}': {error}. Choose another --output.") from error
    return paths


def render_html(report: Report, picture: bytes = b"") -> str:
    """The report as one HTML page that needs nothing else; all text of the data is escaped."""
    from jinja2 import Environment, PackageLoader

    page = Environment(
        loader=PackageLoader("gd2po_trl.analysis", ""),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # not what is escaped already
    )
    page.filters["values"] = _values
    return page.get_template("report.html").render(
        report=report,
        settings=_settings(report),
        sentences=_evidence(report),
        image=base64.b64encode(picture).decode("ascii"),
        tables=tables(report),
    )
