"""DeepSpeed ZeRO on two CPU processes against one process: `make test-deepspeed`, which installs what it takes."""

import importlib.util

import pytest
import torch
from distributed.scripted_run import CONFIGURATIONS
from test_distributed import launch, results


pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed; `make test-deepspeed` does"
)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory, tiny_policy):
    folder = tmp_path_factory.mktemp("one")
    launch(folder, tiny_policy, 1)
    return folder


@pytest.mark.parametrize("stage", ["2", "3"])
def test_zero_equals_one_process(one_process, tmp_path, tiny_policy, stage):
    launch(tmp_path, tiny_policy, 2, "--stage", stage, script="deepspeed_run.py")
    for name in CONFIGURATIONS:
        _, _, expected = results(one_process / name)
        history, _, trained = results(tmp_path / name)
        moved = {
            key: value - expected["before"][key]
            for key, value in expected["after"].items()
            if key in expected["before"]
        }
        for key in moved:
            assert torch.allclose(trained["after"][key], expected["after"][key], atol=2e-6, rtol=0), (name, key)
        assert sum(float(step.abs().sum()) for step in moved.values()) > 1e-3
        assert all(0 < entry["gd2po/update_tokens"] < 1 for entry in history if "loss" in entry)
