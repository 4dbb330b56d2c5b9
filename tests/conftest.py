"""Shared fixtures: the folder with real data, and a tiny policy."""

import os
import signal
import sys
from pathlib import Path


# Before torch and the Hub client load: one thread is faster for models this small, and no test may reach the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import settings
from tiny import save_tiny_policy, save_tiny_reward_model


settings.register_profile("thorough", max_examples=3000)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def modules_of_one_test(tmp_path_factory):
    """Modules that a test wrote and imported are gone after it: the next one may write others of the same name."""
    before = set(sys.modules)
    yield
    written = tmp_path_factory.getbasetemp()
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).is_relative_to(written):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def ctrl_c_of_a_terminal():
    """Ctrl-C raises `KeyboardInterrupt`, also where a shell started the tests in the background, which ignores it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with golden files and real data that lies beside a checkout of this repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder `shared` with golden files and real data is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> Path:
    """Folder of a tiny Llama policy with a byte tokenizer and a chat template."""
    return save_tiny_policy(tmp_path_factory.mktemp("tiny_policy"))


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory) -> Path:
    """Folder of a tiny single-label sequence classifier."""
    return save_tiny_reward_model(tmp_path_factory.mktemp("tiny_reward_model"))
