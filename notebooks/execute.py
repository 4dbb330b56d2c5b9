"""
Runs notebooks from top to bottom on the CPU and stores their outputs, as they are committed.

    python notebooks/execute.py notebooks/01_quickstart.ipynb

Each runs in an empty folder, since a second run would find the first one's files. What differs from machine to machine
is left out: execution counts, times, progress bars, and what libraries print to the error stream. Pictures get 64
colors, which is a third of their size.
"""

import base64
import io
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image


TIME_LEFT = re.compile(r"  \d+:\d\d(:\d\d)? left$", re.MULTILINE)


def cleaned(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """The outputs that are kept. Lines that a cell printed one after the other become one output."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name != "stdout":
                continue
            output.text = TIME_LEFT.sub("", output.text)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if "execution_count" in output:
            output.execution_count = None
        if "image/png" in output.get("data", {}):
            output.data["image/png"] = small(output.data["image/png"])
        kept.append(output)
    return kept


def small(png: str) -> str:
    """The picture, in base64, with 64 colors."""
    packed = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    picture.quantize(64).save(packed, format="PNG", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = cleaned(cell.outputs)
    notebook.metadata.pop("kernelspec", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
