"""Docs that cannot go stale: code blocks run or parse, names and links exist, glossary and reference are complete."""

import argparse
import ast
import configparser
import doctest
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import textwrap
from dataclasses import dataclass, fields
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args, tiny_settings

from gd2po_trl import GD2POConfig, GD2POTrainer, compute_advantages
from gd2po_trl import cli as gd2po
from gd2po_trl.diagnostics import conflict_metrics
from gd2po_trl.gd2po_config import GD2PO_FIELDS
from gd2po_trl.recipe import RecipeArguments, load_recipe
from gd2po_trl.recipe.catalog import recipe_path
from gd2po_trl.reward_models.direction import published_direction, resolve_direction
from gd2po_trl.rewards import BUILT_IN, resolve_reward
from gd2po_trl.training.sft import load_sft_recipe


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "recipes/README.md", ROOT / "benchmarks/README.md"]
PAGES += [*sorted((ROOT / "notebooks").glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "bash", "yaml", "json", "diff", "text", "bibtex"}
FENCE = re.compile(r"( *)```(\w*)")
NOT_RUN = re.compile(r"<!-- not run: \S.* -->")
ON_CPU = ["--use_cpu", "True"]
MINIMAL = {"model_name_or_path": "some/model", "reward_funcs": ["correctness", "length"], "use_cpu": True}


@dataclass(frozen=True)
class Block:
    """A fenced code block: its page, line, language, text, and whether a comment excuses it from being run."""

    page: Path
    line: int
    language: str
    text: str
    is_excused: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    lines = page.read_text(encoding="utf-8").split("\n")
    blocks, index = [], 0
    while index < len(lines):
        opening = FENCE.fullmatch(lines[index])
        if opening is None:
            assert not lines[index].lstrip().startswith("```"), f"{page.name}:{index + 1}: what fence is this?"
            index += 1
            continue
        end = lines.index(f"{opening[1]}```", index + 1)
        text = textwrap.dedent("\n".join(lines[index + 1 : end])) + "\n"
        before = next((line.strip() for line in reversed(lines[:index]) if line.strip()), "")
        blocks.append(Block(page, index + 1, opening[2], text, bool(NOT_RUN.fullmatch(before))))
        index = end + 1
    return blocks


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def of_language(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language]


def prose_of(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_every_block_has_a_language():
    assert {str(block): block.language for block in BLOCKS if block.language not in LANGUAGES} == {}


# Python


@pytest.fixture
def tiny_training(tiny_policy, monkeypatch):
    """A block that trains does so for one step, with a tiny policy in the place of the one that it names."""
    small = {**tiny_settings(Path("outputs")), "max_steps": 1}
    del small["output_dir"], small["num_generations"]

    def config(*args, **kwargs):
        return GD2POConfig(*args, **{**kwargs, **small})

    def trainer(model, *args, **kwargs):
        return GD2POTrainer(str(tiny_policy), *args, **kwargs)

    monkeypatch.setattr("gd2po_trl.GD2POConfig", config)
    monkeypatch.setattr("gd2po_trl.GD2POTrainer", trainer)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_python_blocks_run(page, tiny_training, tmp_path, monkeypatch):
    """Those of one page one after the other, in one namespace."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "docs"}
    for block in [block for block in BLOCKS if block.page == page and block.language == "python"]:
        if block.is_excused:
            assert_names_exist(block)
        elif ">>>" in block.text:
            failures: list[str] = []
            example = doctest.DocTestParser().get_doctest(block.text, namespace, str(block), str(page), block.line)
            doctest.DocTestRunner(verbose=False).run(example, out=failures.append, clear_globs=False)
            assert not failures, "".join(failures)
            namespace.update(example.globs)
        else:
            exec(compile(block.text, str(block), "exec"), namespace)


def assert_names_exist(block: Block) -> None:
    """What a block that is not run imports from this package exists, and so do the settings that it names."""
    for node in ast.walk(ast.parse(block.text, str(block))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gd2po_trl"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{block}: {ast.unparse(node)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "GD2POConfig":
            known = {field.name for field in fields(GD2POConfig)}
            assert {keyword.arg for keyword in node.keywords} - {None} <= known, f"{block}: {ast.unparse(node)}"


# Shell


class Parsed(Exception):
    """A command line was understood; nothing of it is run."""


def commands_of(block: Block) -> list[list[str]]:
    commands = []
    for line in block.text.replace("\\\n", " ").split("\n"):
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        if words:
            commands.append(words)
    return commands


@pytest.mark.parametrize("block", of_language("bash"), ids=str)
def test_commands_parse(block, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands_of(block):
        program = Path(words[0]).name
        if program == "gd2po":
            assert_gd2po_parses(words[1:], tmp_path, monkeypatch)
        elif words[:2] == ["accelerate", "launch"]:
            from accelerate.commands.launch import launch_command_parser

            launch = launch_command_parser().parse_args(words[2:])
            assert launch.module and launch.training_script == "gd2po_trl.cli"
            assert launch.config_file is None or Path(launch.config_file).is_file(), launch.config_file
            assert_gd2po_parses(launch.training_script_args, tmp_path, monkeypatch)
        elif words[:2] == ["trl", "vllm-serve"]:
            from trl.scripts.vllm_serve import make_parser

            make_parser(prog="trl vllm-serve").parse_args_into_dataclasses(args=words[2:], look_for_args_file=False)
        elif program in ("python", "python3") and words[1].endswith(".py"):
            text = Path(words[1]).read_text(encoding="utf-8")
            assert all(word in text for word in words[2:] if word.startswith("--")), words
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), words
        elif program in ("pip", "pytest"):
            assert_pip_or_pytest(words)
        elif words[:2] == ["uv", "run"]:
            assert Path(words[2]).is_file() and "# /// script" in Path(words[2]).read_text(encoding="utf-8"), words
        elif words[:3] == ["uv", "tool", "run"]:
            assert_gd2po_parses(words[words.index("gd2po") + 1 :], tmp_path, monkeypatch)
        else:
            assert program in ("cd", "git", "bfcl", "vllm", "python", "python3", "source", "pre-commit"), words


def assert_pip_or_pytest(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    for word in words[1:]:
        if extras := re.search(r"(?:gd2po-trl|\.)\[(.+)\]", word):
            assert all(extra in setup["options.extras_require"] for extra in extras[1].split(",")), word
        if word.startswith(("tests/", "benchmarks/", "constraints")):
            assert Path(word.split("::")[0]).exists(), word


def assert_gd2po_parses(words: list[str], tmp_path: Path, monkeypatch) -> None:
    """The command goes as far as its arguments and its recipe; a mistake ends it with status 2."""

    def stand_in(load, *, stops: bool):
        def checked(path=None, overrides=()):
            if path is not None and not Path(path).is_file():
                assert not str(path).startswith("recipes/"), f"there is no {path}"
                path = None
            if path is None:
                path = tmp_path / "minimal.yaml"
                path.write_text(yaml.safe_dump(MINIMAL))
            recipe = load(path, [*overrides, *ON_CPU])
            if stops:
                raise Parsed
            return recipe

        return checked

    def parse_args(self, *args, **kwargs):
        raise Parsed(original(self, *args, **kwargs))

    def stop(*args, **kwargs):
        raise Parsed

    original = argparse.ArgumentParser.parse_args
    command = words[0]
    with monkeypatch.context() as patch:
        patch.setattr("gd2po_trl.recipe.load_recipe", stand_in(load_recipe, stops=command != "compare"))
        patch.setattr("gd2po_trl.training.sft.load_sft_recipe", stand_in(load_sft_recipe, stops=True))
        if command == "compare":
            patch.setattr("gd2po_trl.comparison.experiment._only_comparison_in", stop)
        elif command not in ("train", "sft", "quickstart"):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        if {"--help", "--help-all", "--version"} & set(words):
            assert command.startswith("-") or command in gd2po.COMMANDS
            return
        with pytest.raises(Parsed) as parsed:
            gd2po.main(words)
    if command == "recipes" and getattr(parsed.value.args[0], "action", None) in ("show", "copy"):
        recipe_path(parsed.value.args[0].name)


# Recipes


@pytest.mark.parametrize("block", of_language("yaml"), ids=str)
def test_recipe_blocks_are_recipes(block, tmp_path):
    """A block with a base names its own file in the first line; others may leave out policy and rewards."""
    content = yaml.safe_load(block.text)
    title = re.match(r"# (\S+\.yaml)\n", block.text)
    if "base" in content:
        shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
        path = tmp_path / title[1]
        path.write_text(block.text)
    else:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({**MINIMAL, **content}))
    arguments = load_recipe(path, ON_CPU).arguments
    for label in arguments.reward_funcs:
        kwargs = dict(arguments.reward_kwargs.get(label, {}))
        if kwargs.get("type") in ("reward_model", "remote_scorer", "text_scorer"):
            # Building one reads files or the Hub; its options are checked by name.
            module, name = BUILT_IN[kwargs.pop("type")]
            builder = getattr(importlib.import_module(module), name)
            inspect.signature(builder).bind(**kwargs)
            if name == "RewardModel":
                published = published_direction(kwargs["model"])
                resolve_direction(published, kwargs.get("sign"), kwargs.get("higher_is"), kwargs["model"])
        else:
            resolve_reward(label, kwargs)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_files_exist(page):
    """Recipes, benchmarks and tests that a page names; titles of YAML blocks are examples, NAME is a placeholder."""
    text = page.read_text(encoding="utf-8")
    titles = set(re.findall(r"```yaml\n# (\S+\.yaml)\n", text))
    named = set(re.findall(r"\b(?:recipes|benchmarks|tests|docs|gd2po_trl)/[\w./-]+\.(?:yaml|py|md)\b", text))
    assert [name for name in sorted(named - titles) if "NAME" not in name and not (ROOT / name).is_file()] == []


def test_architecture_names_what_exists():
    """Each file that the table names, and after a colon what it holds."""
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").partition("## Where to change what")[2]
    cells = [row.split(" | ")[1] for row in table.splitlines() if row.startswith("| ")]
    for path, names in re.findall(r"`([\w/]+\.py)`(?:: ((?:`\w+`(?:, )?)+))?", "\n".join(cells)):
        text = (ROOT / "gd2po_trl" / path).read_text(encoding="utf-8")
        defined = set(re.findall(r"^(?:def|class) (\w+)|^([A-Z_]+)\b", text, flags=re.MULTILINE))
        assert set(re.findall(r"\w+", names)) <= {name for pair in defined for name in pair}, path


def test_every_own_key_is_documented():
    documented = set(re.findall(r"`([\w.]+)`", (ROOT / "docs/recipes.md").read_text(encoding="utf-8")))
    own = {field.name for field in [*fields(RecipeArguments), *GD2PO_FIELDS]} | {"base"}
    assert own <= documented


def test_every_reward_is_documented():
    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    assert [name for name in BUILT_IN if f"| `{name}` |" not in text] == []


# Links


def slugs_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), flags=re.MULTILINE)
    texts = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-") for text in texts}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_internal_links_resolve(page):
    text = re.sub(r"`[^`\n]*`", "", prose_of(page))
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in slugs_of(path)):
            broken.append(target)
    assert broken == []


# Pictures


def test_pictures_have_a_text_and_are_small():
    for page in PAGES:
        for text, name in re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", prose_of(page)):
            assert text.strip(), f"{page.name}: {name} has no text"
            assert (page.parent / name).stat().st_size < 100_000, name


def test_pictures_are_drawn_from_committed_figures(tmp_path):
    build_figures = load_script("build_figures")
    build_figures.draw_all(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    shown = re.findall(r"\(docs/images/([\w.]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(shown) == 3 and set(shown) <= drawn
    assert drawn <= {path.name for path in build_figures.IMAGES.iterdir()}


# Glossary and reference


def glossary() -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", (ROOT / "docs/metrics.md").read_text(encoding="utf-8")))


def generic(metric: str) -> str:
    """A metric's name with the names of rewards replaced by their place."""
    metric = re.sub(r"^rewards/[^/]+/", "rewards/<name>/", metric.removeprefix("eval_"))
    metric = re.sub(r"(gd2po/(?:reward_weight|gate_open|raw))/.+", r"\1/<name>", metric)
    return re.sub(r"(gd2po/conflict_ratio)/.+_vs_.+", r"\1/<a>_vs_<b>", metric)


@pytest.fixture(scope="module")
def run(tiny_policy, tmp_path_factory) -> Path:
    """Output folder of two real steps with an evaluation."""
    output = tmp_path_factory.mktemp("run")
    args = tiny_args(
        output,
        log_completions=True,
        num_completions_to_print=0,
        eval_strategy="steps",
        eval_steps=2,
        beta=0.0,
        update_share=0.5,  # for the metrics of the budget
        reward_weight_schedules={"low_bytes": 2},  # of the weights
        reward_gates={"spread_bytes": "low_bytes >= 0"},  # and of a gate
    )
    rewards = [low_bytes, spread_bytes]
    trainer = GD2POTrainer(
        str(tiny_policy), rewards, args=args, train_dataset=letters_dataset(), eval_dataset=letters_dataset(4)
    )
    trainer.train()
    trainer.save_state()
    return output


def test_glossary_covers_what_a_run_logs(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = {generic(key) for entry in history for key in entry}
    bookkeeping = {"step", "runtime", "samples_per_second", "steps_per_second", "total_flos"}
    bookkeeping |= {f"train_{name}" for name in (*bookkeeping, "loss")}
    assert logged - bookkeeping - glossary() == set()
    # And nothing of ours is in the glossary that no run logs.
    assert {name for name in glossary() if re.fullmatch(r"gd2po/[^*]+", name)} <= logged


def test_glossary_covers_the_statistics():
    rewards = torch.rand(8, 2)
    metrics = conflict_metrics(rewards, compute_advantages(rewards, 4), ["a", "b"], 4)
    assert {generic(f"gd2po/{name}") for name in metrics} <= glossary()


def test_glossary_covers_the_completions_table(run):
    table = pd.read_parquet(next((run / "completions").glob("*.parquet")))
    columns = {re.sub("^gd2po_raw_.+", "gd2po_raw_<name>", column) for column in table.columns}
    assert columns - {"low_bytes", "spread_bytes"} <= glossary()


def load_script(name: str):
    """A script under docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_api_reference_is_up_to_date():
    build_api = load_script("build_api")
    is_current = build_api.OUTPUT.read_text(encoding="utf-8") == build_api.render()
    assert is_current, "run `python docs/build_api.py`"
