"""`gd2po compare`: statistics, curves, runs that are killed or fail, and one real comparison."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gd2po_trl.cli.compare import main
from gd2po_trl.comparison.curves import Curves, mean_between, quantity_values, read_curves
from gd2po_trl.comparison.learning_rates import choose_learning_rates, search_table
from gd2po_trl.comparison.report import markdown, write_json
from gd2po_trl.comparison.results import evaluate
from gd2po_trl.comparison.running import Outcome, Run, run_all
from gd2po_trl.comparison.statistics import holm, mean_interval, paired_test, sign_flip_test
from gd2po_trl.comparison.variants import LADDER, MATCHED_WHITENING, Contrast, Variant, make_variants, parse_settings
from gd2po_trl.errors import UsageError


FIVE = st.lists(st.floats(-10, 10), min_size=5, max_size=5)


# Statistics


@settings(deadline=None)
@given(FIVE)
def test_interval_is_students_t(values):
    interval = mean_interval(values)
    assert interval.count == 5
    assert interval.mean == pytest.approx(np.mean(values))
    if np.std(values) > 1e-6:
        low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx((low, high))
        assert interval.half_width == pytest.approx((high - low) / 2)


def test_interval_of_too_few_values():
    assert mean_interval([3.0]).mean == 3.0
    assert math.isnan(mean_interval([3.0]).low)
    assert math.isnan(mean_interval([]).mean)


@settings(deadline=None)
@given(FIVE, FIVE)
def test_paired_t_test_agrees_with_scipy(values, baseline):
    if np.std(np.subtract(values, baseline)) > 1e-3:
        expected = stats.ttest_rel(values, baseline).pvalue
        assert paired_test(values, baseline).p_t == pytest.approx(expected)


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=2, max_size=6))
def test_sign_flip_test_agrees_with_scipy(differences):
    pairs = (np.array(differences), np.zeros(len(differences), dtype=int))
    exact = stats.permutation_test(pairs, lambda x, y: np.sum(x - y), permutation_type="samples")
    assert sign_flip_test(differences) == pytest.approx(exact.pvalue)


def test_sign_flip_by_hand():
    # 1 + 2 - 3 = 0: every pattern reaches it. 1 + 2 + 4 = 7: only the two extreme ones do.
    assert sign_flip_test([1.0, 2.0, -3.0]) == 1.0
    assert sign_flip_test([1.0, 2.0, 4.0]) == 2 / 8
    # Too many for all patterns: the random ones come close to the t-test of normal data.
    many = np.random.default_rng(1).normal(0.4, 1.0, size=30)
    assert sign_flip_test(many) == pytest.approx(stats.ttest_1samp(many, 0.0).pvalue, abs=0.01)


def test_equal_values_are_no_difference():
    test = paired_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (test.difference.mean, test.p_t, test.p_sign_flip) == (0.0, 1.0, 1.0)


def test_pairs_must_match():
    with pytest.raises(ValueError, match="2 and 1 values"):
        paired_test([1.0, 2.0], [1.0])


def test_holm_by_hand():
    corrected = holm([0.04, 0.01, math.nan, 0.03])
    assert corrected[:2] == pytest.approx([0.06, 0.03])
    assert math.isnan(corrected[2])
    assert corrected[3] == pytest.approx(0.06)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_only_raises_and_keeps_the_order(p_values):
    corrected = holm(p_values)
    assert all(p <= c <= 1 for p, c in zip(p_values, corrected, strict=True))
    by_p = [c for _, c in sorted(zip(p_values, corrected, strict=True))]
    assert by_p == sorted(by_p)


# Curves


def trainer_state(a: list[float], b: list[float], every: int = 1, share: float = 1.0) -> dict:
    entries = [
        {
            "step": every * (index + 1),
            "step_time": 2.0,
            "gd2po/update_time": 0.5,
            "completions/mean_length": 10.0,
            "gd2po/trained_tokens": share,
            "gd2po/trained_rows": share,
            "rewards/a/mean": x,
            "rewards/b/mean": y,
        }
        for index, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    return {"log_history": [*entries, {"step": entries[-1]["step"], "train_runtime": 9.0}]}


def curves_of(a: list[float], b: list[float], share: float = 1.0) -> Curves:
    return read_curves(trainer_state(a, b, share=share), ["a", "b"], rollouts_per_step=4, held_out=False)


def test_curves_are_placed_where_their_rollouts_were_sampled():
    curves = read_curves(trainer_state([1, 2], [3, 4], every=5, share=0.5), ["a"], rollouts_per_step=4, held_out=False)
    assert curves.rewards["a"].tolist() == [1, 2]
    # The first entry averages the rollouts of steps 1 to 5, sampled after 0 to 4 updates: 2 in the middle.
    assert curves.spent["steps"].tolist() == [2, 7]
    # 4 rollouts of 10 tokens a step, half of them trained.
    assert curves.total == {"steps": 10, "tokens": 200, "update seconds": 5, "seconds": 20}
    assert curves.trained_rows == 0.5


def test_held_out_rewards_are_placed_at_their_step():
    state = trainer_state([1, 2], [3, 4], every=5)
    state["log_history"] += [{"step": 0, "eval_rewards/a/mean": 7.0}, {"step": 10, "eval_rewards/a/mean": 8.0}]
    curves = read_curves(state, ["a"], rollouts_per_step=4, held_out=True)
    assert curves.rewards["a"].tolist() == [7, 8]
    assert curves.spent["tokens"].tolist() == [0, 400]
    values = quantity_values(curves, {"a": (0, 10)}, {"a": 1.0}, {"steps": 10})
    assert values["steps"] == {
        "final": {"a": 8, "sum": 0.8, "worst": 0.8},
        "area": {"a": 7.5, "sum": 0.75, "worst": 0.75},
    }
    with pytest.raises(UsageError, match="eval_strategy"):
        read_curves(state, ["b"], rollouts_per_step=4, held_out=True)


def test_mean_between_is_the_area_over_the_width():
    spent, values = np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 2.0])
    assert mean_between(spent, values, 0, 4) == pytest.approx((2 + 4) / 4)
    assert mean_between(spent, values, 1, 3) == pytest.approx((1.5 + 2) / 2)
    assert mean_between(spent, values, 0, 8) == pytest.approx((2 + 12) / 8)  # the last value holds on
    assert mean_between(spent, values, 1, 1) == 1


def test_sum_and_worst_refer_to_ranges_and_weights():
    curves = curves_of([0, 5, 10, 10, 10], [1, 1, 1, 1, 1])
    ranges, budgets = {"a": (0, 20), "b": (0, 2)}, {"steps": 4, "tokens": 160}
    values = quantity_values(curves, ranges, {"a": 1.0, "b": 1.0}, budgets)
    assert values["steps"]["final"] == pytest.approx({"a": 10, "b": 1, "sum": 1.0, "worst": 0.5})
    assert values["steps"]["area"]["a"] == pytest.approx((2.5 + 7.5 + 10 + 10) / 4)
    assert values["steps"]["area"]["worst"] == pytest.approx((0.125 + 0.375 + 0.5 + 0.5) / 4)
    assert values["tokens"] == values["steps"]
    # A monitor is in neither; a negative weight makes low values good.
    assert quantity_values(curves, ranges, {"a": 0.0, "b": 1.0}, budgets)["steps"]["final"]["sum"] == 0.5
    turned = quantity_values(curves, {**ranges, "a": (0, 40)}, {"a": -1.0, "b": 1.0}, budgets)["steps"]["final"]
    assert (turned["sum"], turned["worst"]) == pytest.approx((0.75 + 0.5, 0.5))


# Results


def make_run(tmp_path: Path, name: str, seed: int, command: tuple[str, ...] = (), **settings) -> Run:
    return Run(Variant(name, name), seed, tmp_path / name / f"seed-{seed}", command, settings)


def finished(run: Run, offset: float, share: float = 1.0) -> tuple[Outcome, Curves]:
    return Outcome(run, {}, seconds=1.0), curves_of([0, 1, 2 + offset], [0, 2, 3 + offset], share)


def test_a_failed_seed_is_shown_and_its_pair_left_out(tmp_path):
    outcomes = {
        "gdpo": [finished(make_run(tmp_path, "gdpo", seed), 0.1 * seed) for seed in (1, 2, 3)],
        "gd2po_hard": [
            finished(make_run(tmp_path, "gd2po_hard", 1), 0.6, share=0.5),
            (Outcome(make_run(tmp_path, "gd2po_hard", 2), None, "ended with status 1: out of memory"), None),
            finished(make_run(tmp_path, "gd2po_hard", 3), 0.4, share=0.5),
        ],
    }
    variants = [Variant("gdpo", "gdpo"), Variant("gd2po_hard", "gd2po_hard")]
    contrast = Contrast("the method", "gd2po_hard", "gdpo")
    results = evaluate(
        outcomes,
        variants,
        [1, 2, 3],
        baseline="gdpo",
        weights={"a": 1.0, "b": 1.0},
        ranges={"b": (0.0, 10.0)},
        contrasts=[contrast, Contrast("absent", "nowhere", "gdpo")],
    )
    assert results.budgets == {"steps": 3, "tokens": 60, "update seconds": 1.5, "seconds": 6}
    assert results.ranges == {"a": (0, 2.6), "b": (0, 10)}
    row = results.tables["steps", "final"][0]
    assert (row.variant, row.quantity, row.test.difference.count) == ("gd2po_hard", "a", 2)
    # Every seed's last point lies at 2 of 3 steps: seed 1 differs by 0.5, seed 3 by 0.1.
    assert row.test.difference.mean == pytest.approx(0.3)
    assert [c.label for c in results.contrasts] == ["the method", "the method"]
    # At the tokens that Hard needs for its whole run, GDPO is only half way.
    at_tokens = results.interval("gdpo", "tokens", "final", "a").mean
    assert at_tokens < results.interval("gdpo", "steps", "final", "a").mean

    text = markdown(results, "gd2po compare", {})
    assert "1 of 6 runs failed" in text
    assert "gd2po_hard, seed 2: ended with status 1: out of memory" in text
    assert "| gd2po_hard | 2 | FAILED |" in text
    assert "| gd2po_hard | 3 (1 failed) |" in text
    write_json(tmp_path / "results.json", results, "gd2po compare", {}, [])
    document = json.loads((tmp_path / "results.json").read_text())
    assert [run["failure"] for run in document["runs"]].count("") == 5


def test_a_run_without_gain_is_marked(tmp_path):
    run = make_run(tmp_path, "gdpo", 1)
    flat = (Outcome(run, {}), curves_of([1, 2, 1], [1, 2, 0.5]))
    results = evaluate({"gdpo": [flat]}, [run.variant], [1], baseline="gdpo", weights={"a": 1.0, "b": 1.0}, ranges={})
    assert not results.runs["gdpo"][0].gained
    assert "finished, no gain" in markdown(results, "", {})


def test_a_comparison_in_which_everything_failed_is_reported(tmp_path):
    run = make_run(tmp_path, "gdpo", 1)
    outcomes = {"gdpo": [(Outcome(run, None, "ended with status 1"), None)]}
    results = evaluate(outcomes, [run.variant], [1], baseline="gdpo", weights={"a": 1.0}, ranges={})
    assert "1 of 1 runs failed" in markdown(results, "", {})
    write_json(tmp_path / "results.json", results, "", {}, [])
    json.loads((tmp_path / "results.json").read_text())


def test_learning_rates_that_fail_are_not_chosen():
    good, better = curves_of([0, 1, 1], [0, 1, 1]), curves_of([0, 2, 2], [0, 2, 2])
    curves = {"gdpo": {1e-3: [good, good], 1e-2: [better, better], 1e-1: [better, None]}}
    chosen, search = choose_learning_rates(curves, {"a": 1.0, "b": 1.0}, {})
    assert chosen == {"gdpo": 1e-2}
    assert not any(entry["at_edge"] for entry in search)
    assert "| gdpo | 1.000 | **2.000** | failed |" in search_table(search, [1000, 1001])
    del curves["gdpo"][1e-3]
    _, search = choose_learning_rates(curves, {"a": 1.0, "b": 1.0}, {})
    assert "At the edge of what was tried: gdpo" in search_table(search, [1000])


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
        return make_run(tmp_path, name, 1, (sys.executable, str(script), action, str(folder)), **settings)

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


def test_a_killed_comparison_goes_on(stub_run):
    run = stub_run("gdpo", "wait")
    comparison = subprocess.Popen([sys.executable, "-c", COMPARE, str(run.folder), *run.command])
    wait_for(lambda: (run.folder / "run.json").exists() and starts(run) == 1)
    comparison.send_signal(signal.SIGKILL)
    comparison.wait()
    # Its training was not killed; it must be waited for and not be started a second time in the same folder.
    second = subprocess.Popen([sys.executable, "-c", COMPARE, str(run.folder), *run.command])
    time.sleep(1.0)
    assert second.poll() is None
    (run.folder / "go").touch()
    assert second.wait(timeout=60) == 0
    assert starts(run) == 1
    assert run_all([run], report=lambda line: None)[0].state is not None

    # Killed together with its training, it starts that again.
    run = stub_run("gd2po_hard", "wait")
    comparison = subprocess.Popen([sys.executable, "-c", COMPARE, str(run.folder), *run.command])
    wait_for(lambda: (run.folder / "run.json").exists() and starts(run) == 1)
    comparison.kill()
    comparison.wait()
    os.kill(json.loads((run.folder / "run.json").read_text())["pid"], signal.SIGKILL)
    (run.folder / "go").touch()
    wait_for(lambda: run_all([run], report=lambda line: None)[0].state is not None)
    assert starts(run) == 2


# Variants and the command line


def test_variants_and_settings():
    variants = make_variants(
        ["gdpo"], [["snr_0.5", "gd2po_snr", "snr_threshold=0.5"]], match_whitening=True, known_methods=KNOWN
    )
    assert variants[1] == Variant("snr_0.5", "gd2po_snr", ("--snr_threshold", "0.5"))
    assert variants[2:] == list(MATCHED_WHITENING)
    assert {c.variant for c in LADDER} | {c.against for c in LADDER} <= {v.name for v in variants} | {"gd2po_hard"}
    assert parse_settings(["reward_weights=1 0.5", 'reward_kwargs={"a": {"b": 1}}'], "--set") == (
        "--reward_weights",
        "1",
        "0.5",
        "--reward_kwargs",
        '{"a": {"b": 1}}',
    )


KNOWN = ["grpo", "gdpo", "gd2po_hard", "gd2po_snr"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "gdpoo"], "no method 'gdpoo'"),
        (["--methods"], "nothing to compare"),
        (["--methods", "gdpo", "gdpo"], "Two variants are called 'gdpo'"),
        (["--variant", "../x", "gdpo"], "is no name"),
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
    assert main(command) == 0
    for name in ("report.md", "curves.png", "trade_off.png"):
        assert (output / name).stat().st_size > 0
    document = json.loads((output / "results.json").read_text())
    assert document["ranges"]["low"] == [0, 1]
    state = json.loads((output / "runs/gdpo/seed-1/trainer_state.json").read_text())
    logged = [entry["rewards/low/mean"] for entry in state["log_history"] if "rewards/low/mean" in entry]
    gdpo, hard = document["runs"]
    # The last of two entries holds from the middle of the run to its end.
    assert gdpo["values"]["steps"]["final"]["low"] == pytest.approx(logged[1])
    assert gdpo["values"]["steps"]["area"]["low"] == pytest.approx((logged[0] + 3 * logged[1]) / 4)
    # A rollout without advantage is not trained, and all rollouts are as long as they may be or shorter.
    assert 0 < hard["total"]["tokens"] <= gdpo["total"]["tokens"] <= 2 * 8 * 8

    capsys.readouterr()
    assert main(command) == 0
    assert "2 of 2 runs are already finished." in capsys.readouterr().out
