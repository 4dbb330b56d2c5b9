"""Writes the report: to the terminal, and as HTML, PNG and JSON."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from ..errors import UsageError
from ..reporting import Table, make_table, short_number, write_json
from ..terminal import make_console, printable, shorten
from .analyzer import Report
from .evidence import Example, tables


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
ul.notes { color: var(--muted); font-size: .9rem; padding-left: 1.2rem }
img { width: 100%; min-width: 56rem; height: auto; border: 1px solid var(--line); border-radius: 6px }
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


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the report: the verdict and what to do first, then the evidence, examples and notes."""
    console = console or make_console()
    width = min(console.width, 110)

    def paragraph(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), width=width)

    console.print()
    paragraph(report.verdict.text, "bold")
    console.print()
    for warning in report.warnings:
        paragraph(f"Careful: {warning}", "bold yellow")
    if report.warnings:
        console.print()
    console.print(Text("What to do", style="bold"))
    for advice in report.recommendation.advice:
        console.print(_bullet(advice), width=width)
    console.print()
    for heading, lines in _settings(report):
        console.print(Text(f"{heading}:"))
        for line in lines:
            console.print(Text(f"    {line}"), soft_wrap=True)
        console.print()
    console.print(Text("Evidence", style="bold"))
    for sentence in [*(finding.text for finding in report.findings), *report.summary]:
        console.print(_bullet(sentence), width=width)
    console.print()
    for table in tables(report):
        console.print(make_table(table.title, table.columns, table.rows))
        console.print(Padding(Text(table.help, style="dim"), (0, 1, 1, 1)), width=width)
    if report.examples:
        console.print(Text("Rollouts on which the rewards disagree most", style="bold"))
        for example in report.examples[:3]:
            _print_example(example, console, width)
        console.print()
    if report.notes:
        console.print(Text("Notes", style="bold"))
        for note in report.notes:
            console.print(_bullet(note, "dim"), width=width)
        console.print()


def _bullet(text: str, style: str = "") -> RichTable:
    grid = RichTable.grid(padding=(0, 1))
    grid.add_row(Text("-", style=style), Text(printable(text), style=style))
    return grid


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
    image = base64.b64encode(picture).decode("ascii")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Rewards</title><style>{STYLE}</style></head><body>",
        "<h1>What the rewards do</h1>",
        f'<p class="source">{_escape(report.source)}</p>',
        f'<div class="summary"><p>{_escape(report.verdict.text)}</p>',
        *(f'<p class="down">Careful: {_escape(warning)}</p>' for warning in report.warnings),
        "</div>",
        "<h2>What to do</h2>",
        _html_list(report.recommendation.advice),
        *(
            f'<p class="label">{_escape(heading)}</p><pre>{_escape(chr(10).join(lines))}</pre>'
            for heading, lines in _settings(report)
        ),
        "<h2>Evidence</h2>",
        _html_list([*(finding.text for finding in report.findings), *report.summary]),
        f'<div class="scroll"><img alt="Figures of the report" src="data:image/png;base64,{image}"></div>'
        if picture
        else "",
        *(_html_table(table) for table in tables(report)),
    ]
    if report.examples:
        parts.append("<h2>Rollouts on which the rewards disagree most</h2>")
        parts.append(
            '<p class="help">From the last third of the steps, each from another prompt. A value, then its advantage '
            "within its group, in standard deviations times the weight.</p>"
        )
        parts += [_html_example(example) for example in report.examples]
    if report.notes:
        parts += ["<h2>Notes</h2>", _html_list(report.notes, "notes")]
    parts.append("</body></html>\n")
    return "\n".join(filter(None, parts))


def _html_list(sentences: Sequence[str], style: str = "") -> str:
    # What stands between backticks is code.
    texts = [re.sub("`([^`]+)`", r"<code>\1</code>", _escape(sentence)) for sentence in sentences]
    items = "\n".join(f"<li>{text}</li>" for text in texts)
    return f'<ul class="{style}">\n{items}\n</ul>'


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
        f'<span class="up">{_escape(example.favoured_by)} favors it</span>, '
        f'<span class="down">{_escape(example.penalised_by)} disfavors it</span></p>'
        f'<p class="help">{_escape(_values(example))}; agreement {example.agreement:+.2f}</p>'
        f'<p class="label">Prompt</p><pre>{_escape(example.prompt)}</pre>'
        f'<p class="label">Completion</p><pre>{_escape(example.completion)}</pre></div>'
    )
