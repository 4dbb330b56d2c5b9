"""Two gloo processes against one: the same advantages, metrics, table and parameters, and no hang on an error."""

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


SCRIPT = Path(__file__).parent / "distributed" / "scripted_run.py"


def launch(output: Path, policy: Path, processes: int, *options: str, expect_failure: bool = False):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SCRIPT), str(policy), str(output), *options]
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
    """The same scripted runs on one process and on two."""
    folders = {processes: tmp_path_factory.mktemp(f"on_{processes}") for processes in (1, 2)}
    for processes, folder in folders.items():
        launch(folder, tiny_policy, processes)
    return folders


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_two_processes_equal_one(runs, name):
    history_one, table_one, parameters_one = results(runs[1] / name)
    history_two, table_two, parameters_two = results(runs[2] / name)

    columns = ["prompt", "completion", "low_bytes", "spread_bytes", "gd2po_kept", "gd2po_conflict"]
    key = ["step", *columns]
    table_one, table_two = (table.sort_values(key).reset_index(drop=True) for table in (table_one, table_two))
    pd.testing.assert_frame_equal(table_one[columns], table_two[columns])
    assert table_one["advantage"].tolist() == pytest.approx(table_two["advantage"].tolist(), abs=1e-6)
    assert not table_one["gd2po_kept"].all() and table_one["gd2po_kept"].any()

    for entry_one, entry_two in zip(history_one, history_two, strict=True):
        for metric in entry_one:
            if metric.startswith(("gd2po/", "rewards/", "reward", "frac_")) and metric != "gd2po/update_time":
                assert entry_two[metric] == pytest.approx(entry_one[metric], abs=1e-6), metric
    moved = 0.0
    for parameter, value in parameters_one["after"].items():
        assert torch.allclose(value, parameters_two["after"][parameter], atol=1e-6, rtol=0), parameter
        moved += (value - parameters_one["before"][parameter]).abs().sum().item()
    assert moved > 0


def test_a_reward_that_fails_on_one_process_ends_all(tmp_path, tiny_policy):
    done = launch(tmp_path / "bad", tiny_policy, 2, "--fail", expect_failure=True)
    assert "The reward function 'fails_on_rank_1' raised ZeroDivisionError" in done.stderr
    assert "Traceback" in done.stderr and "[rank0]" in done.stderr and "[rank1]" in done.stderr
