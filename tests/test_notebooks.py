"""The notebooks: they run from top to bottom on a CPU, and what is committed is small and names no machine."""

import base64
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from gd2po_trl import GD2POConfig
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import recipe_path


FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# Added to each notebook's settings, so that it runs in seconds.
TINY = {
    "01_quickstart": "WARMUP_STEPS, HELD_OUT_ROWS = 2, 8\n"
    "TRAINING |= {'max_steps': 1, 'per_device_train_batch_size': 16}",
    "02_how_gd2po_works": "",
    "03_tool_calling_lora": "WARMUP_STEPS, EVALUATED_ROWS = 2, 4\n"
    "OVERRIDES |= {'max_steps': 1, 'per_device_train_batch_size': 16, 'generation_batch_size': 16}",
    "04_helpful_harmless": "WARMUP_STEPS = 5\nTRAINING |= {'max_steps': 1, 'per_device_train_batch_size': 16}",
    "05_do_my_rewards_conflict": "WARMUP_STEPS = 2\nTRAINING |= {'max_steps': 2, 'per_device_train_batch_size': 16}",
    "06_gpu_benchmark": "PARTS = ['advantages']",
}
# With a fourth reward, which gets a panel of its own before that of the conflicts.
FOURTH = {
    "01_quickstart": "rewards.append(resolve_reward('brevity', {'type': 'length', 'max_words': 3}))\n"
    "names = [reward.__name__ for reward in rewards]",
    "03_tool_calling_lora": "OVERRIDES |= {'reward_funcs': ['correctness', 'format', 'length', 'brevity']}\n"
    "OVERRIDES['reward_kwargs']['brevity'] = {'type': 'length', 'max_words': 3}",
}
PANELS = """titles = [axis.get_title() for axis in figure.axes]
assert titles == [*(f"{name} (mean)" for name in names), "share of rollouts"] and len(names) == 4, titles"""
ABSOLUTE_PATH = re.compile(r"(?<![\w./:])/(home|root|tmp|work|usr|opt|mnt|private|var|Users|content)/|\b[A-Z]:\\\\")
ON_CPU = {"use_cpu": True, "bf16": False}
IMAGE_BYTES, OUTPUT_BYTES, NOTEBOOK_BYTES = 60_000, 20_000, 300_000


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def settings_cell(notebook: nbformat.NotebookNode) -> int:
    """Index of the one cell with settings."""
    (index,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    return index


def test_every_notebook_is_tested_and_listed():
    names = [path.stem for path in NOTEBOOKS]
    assert names == sorted(TINY)
    listed = re.findall(r"\]\((\w+)\.ipynb\)", (FOLDER / "README.md").read_text(encoding="utf-8"))
    assert listed == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path):
    notebook = read(path)
    notebook.cells.insert(settings_cell(notebook) + 1, nbformat.v4.new_code_cell(TINY[path.stem]))
    if path.stem in FOURTH:
        place = [
            i
            for i, cell in enumerate(notebook.cells)
            if "resolve_reward(" in cell.source or "OVERRIDES" in cell.source
        ]
        notebook.cells.insert(place[0] + 1, nbformat.v4.new_code_cell(FOURTH[path.stem]))
        notebook.cells.append(nbformat.v4.new_code_cell(PANELS))
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for output in outputs_of(notebook) if output.output_type != "stream" or output.name != "stderr"]
    assert not any(output.output_type == "error" for output in shown)
    assert ABSOLUTE_PATH.search(json.dumps(shown)) is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_complete_small_and_clean(path):
    notebook = read(path)
    outputs = outputs_of(notebook)
    assert path.stat().st_size < NOTEBOOK_BYTES
    assert ABSOLUTE_PATH.search(path.read_text(encoding="utf-8")) is None
    assert "kernelspec" not in notebook.metadata
    drawn = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count is None
            images = [output for output in cell.outputs if "image/png" in output.get("data", {})]
            assert len(images) == cell.source.count("plt.show()"), cell.source
            drawn += len(images)
    assert drawn > 0
    for output in outputs:
        assert output.output_type != "error"
        assert output.output_type != "stream" or output.name == "stdout"
        image = output.get("data", {}).get("image/png")
        if image is not None:
            assert len(base64.b64decode(image)) <= IMAGE_BYTES
        else:
            assert len(json.dumps(output)) <= OUTPUT_BYTES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_badge_opens_this_notebook(path):
    first = read(path).cells[0].source
    target = rf"https://colab\.research\.google\.com/github/[\w.-]+/gd2po_trl/blob/main/notebooks/{path.name}"
    assert len(re.findall(rf"\[!\[Open in Colab\]\([^)]+\)\]\({target}\)", first)) == 1


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_variable_switches_to_the_gpu(path, tmp_path):
    notebook = read(path)
    source = notebook.cells[settings_cell(notebook)].source
    assert source.count("\nGPU = False\n") == 1
    settings: dict = {}
    exec(source.replace("\nGPU = False\n", "\nGPU = True\n"), settings)
    if "TRAINING" in settings:
        assert settings["TRAINING"]["use_vllm"]
        GD2POConfig(output_dir=str(tmp_path), **{**settings["TRAINING"], **ON_CPU})
    if "RECIPE" in settings:
        overrides = {**settings["OVERRIDES"], **ON_CPU}
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        recipe = load_recipe(recipe_path(settings["RECIPE"]), words)
        assert recipe.training.use_vllm
        assert recipe.model.model_name_or_path == settings["MODEL"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_installs_only_in_colab(path):
    sources = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    assert "google.colab" not in sys.modules
    assert [source for source in sources if "%pip" in source] == sources[:1]
    assert '\nif "google.colab" in sys.modules:\n    %pip install' in sources[0]
