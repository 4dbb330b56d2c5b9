"""
Runs notebooks from top to bottom on the CPU and stores their outputs, as they are committed.

    python notebooks/execute.py notebooks/01_quickstart.ipynb

Each runs in an empty folder, since a second run would find the first one's files. What differs from machine to machine
is left out: execution counts, times, progress bars, and what libraries print to the error stream.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def is_kept(output: nbformat.NotebookNode) -> bool:
    if output.output_type == "stream":
        return output.name == "stdout"
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=1800, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = None
    notebook.metadata.pop("kernelspec", None)
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        execute(Path(name))
