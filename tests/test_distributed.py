"""Several gloo processes against one, by DDP and by FSDP2: the same advantages, metrics, table and parameters."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from distributed.scripted_run import CONFIGURATIONS
from safetensors.torch import load_file


SCRIPTS = Path(__file__).parent / "distributed"
SEVERAL = (2, 3, 4)


def launch(output: Path, policy: Path, processes: int, *options: str, script="scripted_run.py", expect_failure=False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SCRIPTS / script), str(policy), str(output), *options]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
        command = [sys.executable, *launcher, *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode != 0) == expect_failure, done.stderr[-3000:]
    return done


def results(output: Path):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    tables = [pd.read_parquet(path) for path in sorted((output / "completions").glob("*.parquet"))]
    return history, pd.concat(tables), torch.load(output / "parameters.pt", weights_only=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_policy):
    """The same scripted runs on one process and on several."""
    folders = {processes: tmp_path_factory.mktemp(f"on_{processes}") for processes in (1, *SEVERAL)}
    for processes, folder in folders.items():
        launch(folder, tiny_policy, processes)
    return folders


@pytest.mark.parametrize("processes", SEVERAL)
@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_several_processes_equal_one(runs, name, processes):
    history_one, table_one, parameters_one = results(runs[1] / name)
    history_two, table_two, parameters_two = results(runs[processes] / name)

    columns = ["prompt", "completion", "low_bytes", "spread_bytes", "gd2po_kept", "gd2po_conflict"]
    key = ["step", *columns]
    table_one, table_two = (table.sort_values(key).reset_index(drop=True) for table in (table_one, table_two))
    pd.testing.assert_frame_equal(table_one[columns], table_two[columns])
    assert table_one["advantage"].tolist() == pytest.approx(table_two["advantage"].tolist(), abs=1e-6)
    if CONFIGURATIONS[name].get("conflict_filter", "hard"):
        assert not table_one["gd2po_kept"].all() and table_one["gd2po_kept"].any()

    for entry_one, entry_two in zip(history_one, history_two, strict=True):
        for metric in entry_one:
            # How long the update took, and how many rollouts of a prompt met in a forward, depends on the processes.
            if metric in ("gd2po/update_time", "gd2po/update_tokens"):
                continue
            if metric.startswith(("gd2po/", "rewards/", "reward", "frac_")):
                assert entry_two[metric] == pytest.approx(entry_one[metric], abs=1e-6), metric
    assert_trained_alike(parameters_one, parameters_two)


def assert_trained_alike(one: dict, two: dict) -> None:
    for parameter, value in one["after"].items():
        assert torch.allclose(value, two["after"][parameter], atol=1e-6, rtol=0), parameter
    assert any(not torch.equal(value, one["before"][parameter]) for parameter, value in one["after"].items())


def test_three_processes_draw_what_one_does(runs):
    history_one, _, parameters_one = results(runs[1] / "budget")
    history_three, _, parameters_three = results(runs[3] / "budget")
    for metric in ("gd2po/drawn_ratio", "gd2po/trained_rows", "gd2po/budget_noise"):
        values_one, values_three = ([entry[metric] for entry in log[:-1]] for log in (history_one, history_three))
        assert values_three == pytest.approx(values_one, abs=1e-6), metric
    assert [entry["gd2po/drawn_ratio"] for entry in history_one[:-1]] == pytest.approx([0.4] * 4, abs=1 / 24)
    assert_trained_alike(parameters_one, parameters_three)


def test_validation_counts_every_row_once(runs):
    logs, tables = {}, {}
    for processes, folder in runs.items():
        history = json.loads((folder / "validation/trainer_state.json").read_text())["log_history"]
        logs[processes] = {key: value for entry in history for key, value in entry.items() if "rewards/" in key}
        files = {path.name: pd.read_parquet(path) for path in (folder / "validation/completions").glob("eval_*")}
        tables[processes] = {name: sorted(table["prompt"] + table["completion"]) for name, table in files.items()}
        assert {name: len(texts) for name, texts in tables[processes].items()} == {
            "eval_five_00000.parquet": 5,
            "eval_three_00000.parquet": 3,
        }
        assert logs[processes]["eval_five_rewards/place_in_alphabet/mean"] == 2.0
        assert logs[processes]["eval_three_rewards/place_in_alphabet/mean"] == 1.0
    assert tables[1] == tables[2] and logs[1] == pytest.approx(logs[2])


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tiny_policy):
    """Runs whose weights, gradients and optimizer state are split over two processes; the script checks that."""
    folder = tmp_path_factory.mktemp("fsdp2")
    launch(folder, tiny_policy, 2, script="fsdp2_run.py")
    return folder


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_fsdp2_equals_one_process(runs, sharded, name):
    history_one, _, one = results(runs[1] / name)
    history_two, _, two = results(sharded / name)
    assert_trained_alike(one, two)
    for metric in ("gd2po/conflict_ratio", "gd2po/kept_ratio", "rewards/low_bytes/mean", "grad_norm"):
        values_one, values_two = ([entry[metric] for entry in log[:-1]] for log in (history_one, history_two))
        assert values_two == pytest.approx(values_one, rel=1e-5), metric


def test_fsdp2_resumes_and_saves_the_whole_policy(sharded):
    history, _, uninterrupted = results(sharded / "sampled")
    resumed_history, _, resumed = results(sharded / "resumed")
    saved = load_file(sharded / "saved" / "model.safetensors")
    assert uninterrupted["after"].keys() == saved.keys()
    for parameter, value in uninterrupted["after"].items():
        assert torch.equal(value, resumed["after"][parameter]) and torch.equal(value, saved[parameter]), parameter
    assert [entry["step"] for entry in resumed_history] == [entry["step"] for entry in history]
    assert resumed_history[3]["grad_norm"] == history[3]["grad_norm"] > 0


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path, tiny_policy):
    done = launch(tmp_path / "bad", tiny_policy, 2, "--fail", expect_failure=True)
    assert "The reward function 'fails_on_rank_1' raised SystemExit: 0" in done.stderr
    assert "Traceback" in done.stderr and "[rank0]" in done.stderr and "[rank1]" in done.stderr
