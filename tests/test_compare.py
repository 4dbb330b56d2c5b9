"""`gd2po compare`: runs that are killed or fail, the command line, and one real comparison."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import FileLock

from gd2po_trl.cli.compare import main
from gd2po_trl.comparison import compare
from gd2po_trl.comparison.presentation import Display
from gd2po_trl.comparison.running import Run, launched_processes, run_all
from gd2po_trl.comparison.variants import (
    LADDER,
    MATCHED_WHITENING,
    Variant,
    mask_secrets,
    option_words,
    parse_settings,
)
from gd2po_trl.errors import UsageError
from gd2po_trl.terminal import make_console


# Runs

# Counts its starts and writes what a training writes; what its first argument says happens before that.
STUB = """
import json, sys, time
from pathlib import Path
action, folder = sys.argv[1], Path(sys.argv[2])
with (folder / "starts").open("a") as starts:
    starts.write("x")
if action == "fail":
    print("it broke")
    sys.exit(1)
if action == "usage":
    print("gd2po train: there is no such model")
    sys.exit(2)
if action == "wait":
    while not (folder / "go").exists():
        time.sleep(0.02)
(folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1}]}))
"""


@pytest.fixture
def stub_run(tmp_path):
    script = tmp_path / "stub.py"
    script.write_text(STUB)

    def build(name: str, action: str = "ok", **settings) -> Run:
        folder = tmp_path / name / "seed-1"
        return Run(Variant(name, name), 1, folder, (sys.executable, str(script), action, str(folder)), settings)

    return build


def starts(run: Run) -> int:
    path = run.folder / "starts"
    return len(path.read_text()) if path.exists() else 0


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_finished_runs_are_not_repeated_and_failed_ones_are_tried_again(stub_run):
    lines = []
    good, bad = stub_run("good"), stub_run("bad", "fail")
    outcomes = run_all([good, bad], report=lines.append)
    assert outcomes[0].state is not None
    assert outcomes[1].state is None
    assert outcomes[1].failure == "ended with status 1: it broke"
    assert any("FAILED" in line for line in lines)

    mended = stub_run("bad")
    outcomes = run_all([good, mended], report=lines.append)
    assert [outcome.failure for outcome in outcomes] == ["", ""]
    assert (starts(good), starts(mended)) == (1, 2)
    assert "1 of 2 runs are already finished." in lines


def test_a_run_that_was_cut_off_is_repeated(stub_run):
    run = stub_run("gdpo")
    run_all([run], report=lambda line: None)
    (run.folder / "trainer_state.json").write_text('{"log_history": [{"st')
    assert run_all([run], report=lambda line: None)[0].state is not None
    assert starts(run) == 2


def test_runs_share_the_devices(stub_run, tmp_path):
    runs = [stub_run(f"run{index}") for index in range(3)]
    environment = tmp_path / "environment.py"
    environment.write_text(
        "import os, sys\nopen(sys.argv[2] + '/device', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    runs = [Run(r.variant, r.seed, r.folder, (sys.executable, str(environment), *r.command[2:]), {}) for r in runs]
    outcomes = run_all(runs, devices=["3", "5"], report=lambda line: None)
    assert {(run.folder / "device").read_text() for run in runs} == {"3", "5"}
    assert outcomes[0].failure == "ended without a trainer_state.json"


def test_runs_of_other_settings_are_refused(stub_run):
    run_all([stub_run("gdpo", learning_rate=0.1)], report=lambda line: None)
    with pytest.raises(UsageError, match=r"`learning_rate` 0.1 -> 0.2.*--output"):
        run_all([stub_run("gdpo", learning_rate=0.2)], report=lambda line: None)


def test_wrong_input_ends_the_comparison_and_its_other_runs(stub_run):
    waiting, wrong, never = stub_run("waiting", "wait"), stub_run("wrong", "usage"), stub_run("never")
    with pytest.raises(UsageError, match="there is no such model"):
        run_all([waiting, wrong, never], jobs=2, report=lambda line: None)
    assert starts(never) == 0
    (waiting.folder / "go").touch()
    time.sleep(0.2)
    assert not (waiting.folder / "trainer_state.json").exists()


COMPARE = """
import sys
from pathlib import Path
from gd2po_trl.comparison.running import Run, run_all
from gd2po_trl.comparison.variants import Variant
run_all([Run(Variant("gdpo", "gdpo"), 1, Path(sys.argv[1]), tuple(sys.argv[2:]), {})])
"""


def test_a_comparison_that_was_killed_with_its_runs_goes_on(stub_run):
    run = stub_run("gdpo", "wait")
    comparison = subprocess.Popen([sys.executable, "-c", COMPARE, str(run.folder), *run.command])
    wait_for(lambda: starts(run) == 1)
    (child,) = psutil.Process(comparison.pid).children()
    for process in (comparison, child):
        process.kill()
        process.wait()
    assert (run.folder / "run.json").exists() and not (run.folder / "trainer_state.json").exists()
    (run.folder / "go").touch()
    assert run_all([run], report=lambda line: None)[0].state is not None
    assert starts(run) == 2


def test_an_interrupted_comparison_ends_what_its_runs_started(stub_run):
    run = stub_run("gdpo", "wait")
    script = run.folder.parent / "parent.py"
    script.parent.mkdir(parents=True)
    script.write_text(f"import subprocess; subprocess.run({list(run.command)!r})")
    comparison = subprocess.Popen([sys.executable, "-c", COMPARE, str(run.folder), sys.executable, str(script)])
    wait_for(lambda: starts(run) == 1)
    children = psutil.Process(comparison.pid).children(recursive=True)
    assert len(children) == 2
    comparison.send_signal(signal.SIGINT)
    assert comparison.wait(timeout=60) != 0
    wait_for(lambda: not any(child.is_running() for child in children))


def test_a_terminal_shows_how_far_the_runs_are(stub_run, tmp_path):
    run = stub_run("gdpo")
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time; print('step 3/10 ', flush=True); time.sleep(1); sys.argv = sys.argv[1:]\n" + STUB
    )
    run = Run(run.variant, 1, run.folder, (sys.executable, str(script), *run.command[1:]), {})
    screen = io.StringIO()
    with Display(make_console(file=screen, force_terminal=True, width=100)) as display:
        run_all([run], report=display.line, watch=display.watch)
    shown = screen.getvalue()
    assert "step 3 of 10" in shown and "1 of 1" in shown and "[1/1] gdpo, seed 1" in shown


# Variants and the command line


def test_variants_and_settings():
    settings = parse_settings(["reward_weights=1 0.5", 'reward-kwargs={"a": {"b": 1}}', "beta=none"], "--set")
    assert settings == {"reward_weights": ["1", "0.5"], "reward_kwargs": '{"a": {"b": 1}}', "beta": ["none"]}
    listed = parse_settings(["reward_weights=[1, 0.5]", "reward_funcs=[a, b]"], "--set")
    assert option_words(listed, "--set") == ("--reward_weights", "1", "0.5", "--reward_funcs", "a", "b")
    assert option_words(settings, "--set") == (
        *("--reward_weights", "1", "0.5", "--reward_kwargs", '{"a": {"b": 1}}', "--beta", "none"),
    )
    names = {variant.name for variant in MATCHED_WHITENING} | {"gdpo", "gd2po_hard"}
    assert {c.variant for c in LADDER} | {c.against for c in LADDER} <= names


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["--set", "learning_rate=0.1", "reward_weights=1 0.5"],
            ["--set", "learning_rate=0.1", "reward_weights=1 0.5"],
        ),
        (['reward_kwargs={"a":  {"b": [1, 2]}}'], ['reward_kwargs={"a":  {"b": [1, 2]}}']),
        (["eos_token=x", "hub_token=s3cret"], ["eos_token=x", "hub_token=***"]),
        (["--set=hub-token=s3cret", "--seeds", "5"], ["--set=hub-token=***", "--seeds", "5"]),
        (["--hub_token", "s3cret", "more", "--seed", "1"], ["--hub_token", "***", "***", "--seed", "1"]),
        (
            ['reward_kwargs={"judge": {"model": "m", "headers": {"Authorization": "s3cret"}}}'],
            ['reward_kwargs={"judge": {"model": "m", "headers": "***"}}'],
        ),
        (
            [
                "--reward_kwargs",
                '{"judge": {"list": [{"api_key": "s3cret"}], "inner": "{\\"password\\": \\"s3cret\\"}"}}',
            ],
            ["--reward_kwargs", '{"judge": {"list": [{"api_key": "***"}], "inner": "{\\"password\\": \\"***\\"}"}}'],
        ),
        (["--reward_kwargs", '{"judge": {"headers": s3cret'], ["--reward_kwargs", "***"]),
    ],
)
def test_secrets_are_masked_in_what_is_written(words, expected):
    assert mask_secrets(words) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gdpoo"], "no method 'gdpoo'"),
        (["--methods"], "nothing to compare"),
        (["--methods", "gdpo", "gdpo"], "Two variants are called 'gdpo'"),
        (["--variant", "../x", "gdpo"], r"'\.\./x'"),
        (["--variant", "x", "gdpo", "--variant", "x", "grpo"], "Two variants are called 'x'"),
        (["--variant", "x"], "give a name, a method"),
        (["--set", "seed=3"], "sets `seed` itself"),
        (["--set", "learning_rate"], "write key=value"),
        (["--set", "learning_rat=1"], "Did you mean `learning_rate`"),
        (["--set", "learning_rate=1", "--learning-rates", "0.1"], "leave it out of --set"),
        (["--learning-rates", "-1"], "a learning rate is positive"),
        (["--seeds", "0"], "must be at least 1"),
        (["--baseline", "grpoo"], "none of the variants"),
        (["--ranges", "low=1:0"], "the range is empty"),
        (["--ranges", "lo=0:1"], "none of the rewards"),
        (["--ranges", "low=0-1"], "write REWARD=LOW:HIGH"),
        (["--devices", "0", "0"], "names a device twice"),
        (["--launch", "--num_proceses 2 --multi_gpu"], "--num_proceses"),
        (["--launch=--multi_gpu"], "--num_processes N, or --config_file FILE"),
        (["--launch", "--config_file missing.yaml"], "missing.yaml"),
        (["--launch", "--num_processes 2 -m gd2po_trl.cli train"], "names a script"),
        (["--measure", "eval"], "grpo: `eval_strategy` is 'no'"),
        (["--measure", "eval", "--set", 'eval_dataset={"hh_rlhf": {}}'], r"holds several sets \(hh_rlhf\)"),
        (["--variant", "x", "gdpo", "reward_funcs=low"], r"x has the rewards low, and grpo has low, spread"),
    ],
)
def test_mistakes_are_found_before_the_first_run(recipe, tmp_path, arguments, message):
    with pytest.raises(UsageError, match=message):
        main(["--config", str(recipe), "--output", str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def recipe(tmp_path, tiny_policy, monkeypatch) -> Path:
    """A recipe of two steps whose reward functions are those of `tiny`."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {letter}: "}}\n' for letter in "abcdefgh"))
    content = {
        "model_name_or_path": str(tiny_policy),
        "dataset": "prompts",
        "dataset_path": str(tmp_path / "prompts.jsonl"),
        "reward_funcs": ["low", "spread"],
        "reward_kwargs": {"low": {"type": "tiny.low_bytes"}, "spread": {"type": "tiny.spread_bytes"}},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_real_comparison(recipe, tmp_path, capsys):
    output = tmp_path / "out"
    command = ["--config", str(recipe), "--methods", "gdpo", "gd2po_hard", "--seeds", "1", "--output", str(output)]
    command += ["--set", "learning_rate=0.01", "--ranges", "low=0:1"]
    command += ["--set", "hub_token=s3cret", "--variant", "other", "gdpo", "hub_token=s3cret", "reward_weights=1 -1"]
    assert main(command) == 0
    assert "`reward_weights` say which rewards" in (output / "report.md").read_text()
    for file in (path for path in output.rglob("*") if path.suffix in (".md", ".json", ".log")):
        assert "s3cret" not in file.read_text(), file
    for name in ("report.md", "curves.png", "trade_off.png"):
        assert (output / name).stat().st_size > 0
    document = json.loads((output / "results.json").read_text())
    assert document["ranges"]["low"] == [0, 1]
    state = json.loads((output / "runs/gdpo/seed-1/trainer_state.json").read_text())
    logged = [entry["rewards/low/mean"] for entry in state["log_history"] if "rewards/low/mean" in entry]
    gdpo, hard = document["runs"][:2]
    # The last of two entries holds from the middle of the run to its end.
    assert gdpo["values"]["steps"]["final"]["low"] == pytest.approx(logged[1])
    assert gdpo["values"]["steps"]["area"]["low"] == pytest.approx((logged[0] + 3 * logged[1]) / 4)
    # A rollout without advantage is not trained, and all rollouts are as long as they may be or shorter.
    assert 0 < hard["total"]["tokens"] <= gdpo["total"]["tokens"] <= 2 * 8 * 8

    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 runs are already finished." in shown
    assert "One seed" in shown

    # The same in Python, which finds the runs of the command line.
    results = compare(
        recipe,
        ["gdpo", "gd2po_hard"],
        seeds=1,
        settings={"learning_rate": 0.01, "hub_token": "s3cret"},
        ranges={"low": (0, 1)},
        output=output,
    )
    assert "2 of 2 runs are already finished." in capsys.readouterr().out
    frame = results.to_frame()
    assert frame[(frame.method == "gdpo") & (frame.quantity == "low")]["mean"].item() == pytest.approx(logged[1])
    assert results.verdict in results.report and results._repr_markdown_() == results.report


def test_runs_of_several_processes(recipe, tmp_path):
    """`--multi_gpu` starts gloo processes where there is no GPU."""
    command = ["--config", str(recipe), "--methods", "gdpo", "--seeds", "1", "--set", "per_device_train_batch_size=4"]
    command += ["--launch", "--multi_gpu --num_processes 2 --mixed_precision no"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    (run,) = json.loads((tmp_path / "out/results.json").read_text())["runs"]
    folder = tmp_path / "out/runs/gdpo/seed-1"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    # Two processes of 4 rollouts, 2 steps.
    assert run["total"]["rollouts"] == 16 if "rollouts" in run["total"] else run["total"]["tokens"] > 0
    assert "accelerate.commands.launch" in (folder / "run.json").read_text()


def test_how_many_processes_are_launched():
    files = Path(__file__).resolve().parents[1] / "recipes" / "accelerate_configs"
    assert launched_processes([]) == 1
    assert launched_processes(["--config_file", str(files / "fsdp2.yaml")]) == 8
    assert launched_processes(["--config_file", str(files / "fsdp2.yaml"), "--num_processes", "2"]) == 2


def test_python_and_the_command_line_give_the_same_words():
    settings = {"reward_weights": [1, 0.5], "reward_kwargs": {"a": {"b": 1}}, "beta": None, "bf16": False}
    assert option_words(settings, "settings") == (
        *("--reward_weights", "1", "0.5", "--reward_kwargs", '{"a": {"b": 1}}', "--beta", "none", "--bf16", "False"),
    )
    with pytest.raises(UsageError, match="sets `seed` itself"):
        option_words({"seed": 3}, "settings")


def test_a_second_comparison_in_a_folder_is_refused(recipe, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UsageError, match="at work in"):
        compare(recipe, ["gdpo"], seeds=1, output=folder)
    assert not (folder / "runs").exists()
