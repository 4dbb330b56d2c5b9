"""Two CPU processes under DeepSpeed ZeRO-2 and ZeRO-3 against one process: parameters, metrics, resuming, saving."""

import pytest
import torch
from distributed.scripted_run import CONFIGURATIONS
from safetensors.torch import load_file
from test_distributed import assert_trained_alike, launch, results


pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: `make test-deepspeed` runs these tests")

STAGES = (2, 3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_policy):
    """The scripted runs on one process, without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")
    launch(folder, tiny_policy, 1)
    return folder


@pytest.fixture(scope="module", params=STAGES, ids=lambda stage: f"zero{stage}")
def split(request, tmp_path_factory, tiny_policy):
    """The same with what ZeRO splits, split; the script checks that."""
    folder = tmp_path_factory.mktemp(f"zero{request.param}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        launch(folder, tiny_policy, 2, "--zero", str(request.param), script="deepspeed_run.py")
    return folder


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_deepspeed_equals_one_process(alone, split, name):
    history_one, _, one = results(alone / name)
    history_two, _, two = results(split / name)
    assert_trained_alike(one, two)
    assert [entry.get("step") for entry in history_two] == [entry.get("step") for entry in history_one]
    for metric in ("gd2po/conflict_ratio", "gd2po/kept_ratio", "rewards/low_bytes/mean", "loss"):
        values_one, values_two = ([entry[metric] for entry in log[:-1]] for log in (history_one, history_two))
        assert values_two == pytest.approx(values_one, rel=1e-4, abs=1e-6), metric
    assert all(0 < entry["gd2po/update_tokens"] < 1 for entry in history_two if "loss" in entry)


def test_deepspeed_resumes_and_saves_the_whole_policy(split):
    history, _, uninterrupted = results(split / "sampled")
    resumed_history, _, resumed = results(split / "resumed")
    saved = load_file(split / "saved" / "model.safetensors")
    assert uninterrupted["after"].keys() == saved.keys()
    for parameter, value in uninterrupted["after"].items():
        assert torch.equal(value, resumed["after"][parameter]), parameter
        assert torch.equal(value, saved[parameter]), parameter
    assert [entry["step"] for entry in resumed_history] == [entry["step"] for entry in history]
    assert resumed_history[3]["loss"] == history[3]["loss"]


def test_deepspeed_saves_the_adapter(split):
    saved = load_file(split / "saved_adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_B.weight") and bool(value.any()) for name, value in saved.items())
