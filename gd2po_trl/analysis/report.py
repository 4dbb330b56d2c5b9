"""Writes the report: to the terminal, and as HTML, PNG and JSON."""

import base64
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ..errors import UsageError
from ..terminal import printable, shorten
from .examples import Example
from .statistics import Analysis
from .tables import Table, number, tables


# Nothing in the file may load or run anything, whatever a completion holds.
CONTENT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

STYLE = """
:root { --ink: #1f2933; --muted: #5b6774; --line: #dde2e8; --soft: #f5f7f9; --accent: #0a6ebd; --warn: #b34a08 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 78rem; padding: 2rem 1.5rem 4rem; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7rem; margin: 0 0 .2rem } h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem }
.source, .help, footer { color: var(--muted); font-size: .9rem; overflow-wrap: anywhere }
.summary { border-left: 4px solid var(--accent); background: var(--soft); padding: .9rem 1.3rem; margin: 1.3rem 0 }
.summary p { margin: .45rem 0 } .summary p:first-child { font-size: 1.1rem; font-weight: 600 }
.summary p:last-child { font-weight: 600 }
ul.notes { color: var(--muted); font-size: .9rem; padding-left: 1.2rem }
img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th { vertical-align: bottom; white-space: normal; font-weight: 600 }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
.example { border: 1px solid var(--line); border-radius: 6px; margin: 1rem 0; padding: .9rem 1.2rem }
.example p { margin: 0 0 .5rem } .up, .down { font-weight: 600 }
.up { color: var(--accent) } .down { color: var(--warn) }
.label { color: var(--muted); font-size: .8rem; margin: .6rem 0 .2rem }
pre { margin: 0; padding: .6rem .8rem; background: var(--soft); border-radius: 4px; max-height: 22rem; overflow: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.5 ui-monospace, SFMono-Regular, Consolas, monospace }
"""


def print_report(
    analysis: Analysis, summary: Sequence[str], examples: Sequence[Example], console: Console | None = None
) -> None:
    """Print the report: the sentences first, then tables, examples and notes."""
    console = console or Console(highlight=False)
    width = min(console.width, 110)
    console.print()
    for index, sentence in enumerate(summary):
        style = "bold" if index in (0, len(summary) - 1) else ""
        console.print(Text(printable(sentence), style=style), width=width)
        console.print()
    for table in tables(analysis):
        console.print(_rich_table(table))
        console.print(Padding(Text(table.help, style="dim"), (0, 1, 1, 1)), width=width)
    if examples:
        console.print(Text("Rollouts on which the rewards disagree most", style="bold"))
        for example in examples[:3]:
            _print_example(example, console, width)
        console.print()
    if analysis.notes:
        console.print(Text("Notes", style="bold"))
        for note in analysis.notes:
            console.print(Text(f"- {printable(note)}", style="dim"), width=width)
        console.print()


def _rich_table(table: Table) -> RichTable:
    grid = RichTable(
        title=table.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    for index, column in enumerate(table.columns):
        left = index == 0
        grid.add_column(
            Text(printable(column)),
            justify="left" if left else "right",
            vertical="top",
            overflow="fold",
        )
    for row in table.rows:
        grid.add_row(*(Text(printable(shorten(cell, 60))) for cell in row))
    return grid


def _print_example(example: Example, console: Console, width: int) -> None:
    line = Text(f"\nstep {example.step}: ")
    line.append(f"{printable(example.favoured_by)} favours it", style="green")
    line.append(", ")
    line.append(f"{printable(example.penalised_by)} penalises it", style="red")
    line.append(f"  ({printable(_values(example))})", style="dim")
    console.print(line, width=width)
    for label, text, length in (("prompt", example.prompt, 200), ("completion", example.completion, 300)):
        body = Text(f"{label}: ", style="dim")
        body.append(printable(shorten(" ".join(text.split()), length)), style="not dim")
        console.print(Padding(body, (0, 0, 0, 2)), width=width)


def _values(example: Example) -> str:
    return ", ".join(
        f"{name} {number(value)} → {example.pushes[name]:+.2f}" for name, value in example.rewards.items()
    )


def write_report(
    folder: Path, analysis: Analysis, summary: Sequence[str], examples: Sequence[Example], source: str
) -> list[Path]:
    """
    Write `report.html`, `report.png` and `report.json` into `folder`; the paths written.

    Args:
        folder (`Path`):
            Made if it does not exist. Reports of before are replaced.
        analysis ([`Analysis`]), summary (sequence of `str`), examples (sequence of [`Example`]):
            What to write.
        source (`str`):
            What was analysed, for the heading.
    """
    from .figure import draw  # matplotlib is slow to load, and only needed here

    try:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / name for name in ("report.html", "report.png", "report.json")]
        draw(analysis, paths[1])
        paths[0].write_text(
            render_html(analysis, summary, examples, source, paths[1].read_bytes()),
            encoding="utf-8",
            errors="backslashreplace",  # a lone surrogate in a completion
        )
        document = {
            "source": source,
            "summary": list(summary),
            **analysis.to_dict(),
            "examples": [vars(example) for example in examples],
        }
        paths[2].write_text(json.dumps(_without_nan(document), indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the report cannot be written to '{folder}': {error}. Choose another --output.") from error
    return paths


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_html(
    analysis: Analysis, summary: Sequence[str], examples: Sequence[Example], source: str, picture: bytes
) -> str:
    """The report as one HTML page that needs nothing else; all text of the data is escaped."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Conflict of rewards</title><style>{STYLE}</style></head><body>",
        "<h1>Do the rewards conflict?</h1>",
        f'<p class="source">{_escape(source)}</p>',
        '<div class="summary">',
        *(f"<p>{_escape(sentence)}</p>" for sentence in summary),
        "</div>",
        f'<img alt="Figures of the report" src="data:image/png;base64,{base64.b64encode(picture).decode("ascii")}">',
        *(_html_table(table) for table in tables(analysis)),
    ]
    if examples:
        parts.append("<h2>Rollouts on which the rewards disagree most</h2>")
        parts.append(
            '<p class="help">From the last third of the steps, each from another prompt. A value, then what the '
            "normalisation makes of it within its group, in standard deviations times the weight.</p>"
        )
        parts += [_html_example(example) for example in examples]
    if analysis.notes:
        parts += ["<h2>Notes</h2>", '<ul class="notes">']
        parts += [f"<li>{_escape(note)}</li>" for note in analysis.notes]
        parts.append("</ul>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _escape(text: str) -> str:
    return html.escape(printable(text), quote=True)


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{_escape(column)}</th>" for column in table.columns)
    body = "\n".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return (
        f'<h2>{_escape(table.title)}</h2>\n<div class="scroll"><table><thead><tr>{head}</tr></thead>\n'
        f'<tbody>{body}</tbody></table></div>\n<p class="help">{_escape(table.help)}</p>'
    )


def _html_example(example: Example) -> str:
    return (
        f'<div class="example"><p>Step {example.step}: '
        f'<span class="up">{_escape(example.favoured_by)} favours it</span>, '
        f'<span class="down">{_escape(example.penalised_by)} penalises it</span></p>'
        f'<p class="help">{_escape(_values(example))}; agreement {example.agreement:+.2f}</p>'
        f'<p class="label">Prompt</p><pre>{_escape(example.prompt)}</pre>'
        f'<p class="label">Completion</p><pre>{_escape(example.completion)}</pre></div>'
    )
