"""The guard around reward functions: exits, interrupts, cancellations, signatures, and what rewards log."""

import asyncio
import inspect
import math
import os
import signal
import threading
import time
from collections import defaultdict, deque
from functools import partial, wraps
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import letters_dataset, low_bytes, save_tiny_policy, spread_bytes, tiny_args
from transformers import AutoModelForCausalLM

from gd2po_trl import GD2POTrainer
from gd2po_trl.cli import main
from gd2po_trl.diagnostics import SilentRewards
from gd2po_trl.reward_guard import RewardError, RewardGuard
from gd2po_trl.trl_workarounds import fill_missing_columns, make_writable


PROMPTS = ["p"] * 3


def call(reward_func, name="culprit", timeout=None, **kwargs):
    result = RewardGuard(timeout=timeout).wrap(reward_func, name)(prompts=PROMPTS, completions=["c"] * 3, **kwargs)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


LEFT = [SystemExit(0), SystemExit("bye"), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]


class OwnExit(BaseException):
    """As pytest's and trio's outcomes are."""


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("reason", [*LEFT, OwnExit("own")], ids=repr)
def test_whatever_a_reward_lets_out_is_one_error(reason, timeout):
    def leaves(**kwargs):
        raise reason

    async def leaves_async(**kwargs):
        raise reason

    async def leaves_in_a_task(**kwargs):
        await asyncio.gather(asyncio.sleep(0), leaves_async())
        return [1.0] * 3

    async def leaves_later(**kwargs):
        await asyncio.sleep(0.01)
        raise reason

    for culprit in (leaves, leaves_async, leaves_in_a_task, leaves_later):
        if culprit is leaves_in_a_task and isinstance(reason, GeneratorExit):
            continue  # asyncio's own tasks end silently on it
        with pytest.raises(RewardError, match=f"'culprit' raised {type(reason).__name__}"):
            call(culprit, timeout=timeout)
    # None of them ended the loop that the next one runs in.

    async def scores(**kwargs):
        return [1.0, None, 2.0]

    assert call(scores, timeout=timeout) == [1.0, None, 2.0]


def test_a_script_that_exits():
    def runs(completions, **kwargs):
        for _ in completions:
            exec("import sys\nsys.exit(0)", {})

    with pytest.raises(RewardError, match="'culprit' raised SystemExit"):
        call(runs)


def test_an_async_reward_may_cancel_what_it_likes():
    async def cancels_itself(**kwargs):
        asyncio.current_task().cancel()
        await asyncio.sleep(1)

    async def cancels_all(**kwargs):
        for task in asyncio.all_tasks():
            task.cancel()
        await asyncio.sleep(1)

    for culprit in (cancels_itself, cancels_all):
        with pytest.raises(RewardError, match="'culprit' raised CancelledError"):
            call(culprit)


def test_an_async_reward_that_blocks_its_loop_runs_into_the_timeout():
    released = threading.Event()

    async def blocks(**kwargs):
        released.wait(60)

    with pytest.raises(RewardError, match=r"did not return within reward_timeout=0\.2"):
        call(blocks, timeout=0.2)
    assert not released.is_set()
    released.set()


def test_async_rewards_share_a_loop_over_calls():
    loops = []

    async def notes(**kwargs):
        loops.append(asyncio.get_running_loop())
        return [1.0] * 3

    call(notes), call(notes, timeout=5.0)
    assert loops[0] is loops[1]


def test_what_an_exception_says_is_one_line_if_anything():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no text")

    for error, said in (
        (ValueError("a\n b"), "raised ValueError: a b. "),
        (AssertionError(), "raised AssertionError. "),
        (Mute(), "raised Mute. "),
        (SystemExit("a\nb"), "raised SystemExit: a b by `exit()`"),
    ):

        def raises(error=error, **kwargs):
            raise error

        with pytest.raises(RewardError) as caught:
            call(raises)
        assert f"'culprit' {said}" in str(caught.value)


def test_a_reward_keeps_its_mess_to_itself(tmp_path):
    prompts = [[{"role": "user", "content": "p"}] for _ in range(3)]
    completions = [[{"role": "assistant", "content": "c"}] for _ in range(3)]
    columns = {"answer": ["a"] * 3, "completion_ids": [[1], [2], [3]]}
    before = os.getcwd()

    def messy(prompts, completions, answer, completion_ids, **kwargs):
        completions[0][0]["content"] = "edited"
        completions.clear(), prompts.pop(), answer.sort(), completion_ids[0].append(9)
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        return [1.0] * 3

    guarded = RewardGuard().wrap(messy, "messy")
    assert guarded(prompts=prompts, completions=completions, **columns) == [1.0] * 3
    assert len(prompts) == 3 and completions == [[{"role": "assistant", "content": "c"}]] * 3
    assert columns == {"answer": ["a"] * 3, "completion_ids": [[1], [2], [3]]} and os.getcwd() == before


def test_failures_are_kept_for_all_processes():
    guard = RewardGuard(defer=True)

    def leaves(**kwargs):
        raise SystemExit(0)

    assert guard.wrap(leaves, "leaves")(prompts=PROMPTS) == [None] * 3
    with pytest.raises(RewardError, match="'leaves' raised SystemExit"):
        guard.raise_failures(list)
    guard.raise_failures(list)


# Ctrl-C


def press_ctrl_c(after=0.2):
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_ctrl_c_interrupts(timeout):
    woke = []

    def sleeps(**kwargs):
        time.sleep(20)
        woke.append("sleeps")

    async def sleeps_async(**kwargs):
        await asyncio.sleep(20)
        woke.append("sleeps_async")

    before = signal.getsignal(signal.SIGINT)
    for reward in (sleeps, sleeps_async):
        press_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            call(reward, timeout=timeout)
        assert not woke
        assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("score", [0.0, None])
def test_ctrl_c_interrupts_a_reward_that_catches_everything(score):
    def catches(**kwargs):
        try:
            time.sleep(20)
        except BaseException:
            if score is None:
                raise ValueError("the script failed") from None
        return [score] * 3

    press_ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        call(catches)


def test_a_handler_of_the_users_own_stays():
    seen = []

    def handler(number, frame):
        seen.append(number)

    before = signal.signal(signal.SIGINT, handler)
    try:

        def sleeps(**kwargs):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            return [1.0] * 3

        assert call(sleeps) == [1.0] * 3
        assert seen == [signal.SIGINT] and signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_commands_do_not_end_with_success(tmp_path, tiny_policy, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("exec_rewards.py").write_text(
        "def runs(completions, **kwargs):\n    exec('raise SystemExit(0)', {})\n"
        "def brief(completions, **kwargs):\n    return [-float(len(str(c))) for c in completions]\n"
    )
    Path("prompts.jsonl").write_text('{"prompt": "say a: "}\n{"prompt": "say b: "}\n')
    train = f"train --model_name_or_path {tiny_policy} --dataset prompts --dataset_path prompts.jsonl --reward_funcs "
    train += "exec_rewards.runs exec_rewards.brief --num_generations 4 --per_device_train_batch_size 8 "
    train += "--max_completion_length 4 --max_steps 1 --use_cpu true --bf16 false --report_to none --output_dir out"
    assert main(train.split()) == 1
    assert "'exec_rewards.runs' raised SystemExit: 0" in capsys.readouterr().err
    evaluate = f"eval safe-alignment --model {tiny_policy} --data prompts.jsonl --reward exec_rewards.runs "
    assert main([*evaluate.split(), "--max-new-tokens", "4", "--output", "out_eval"]) == 2
    assert "'exec_rewards.runs' raised SystemExit: 0" in capsys.readouterr().err


# Signatures


def no_kwargs(prompts, completions):
    return [1.0] * len(completions)


def needs_answer(completions, answer, **kwargs):
    return [1.0] * len(completions)


def positional_only(completions, /, **kwargs):
    return [1.0] * len(completions)


class Scorer:
    def __call__(self, completions, gold, **kwargs):
        return [1.0] * len(completions)


def test_a_call_that_cannot_be_made_says_so():
    with pytest.raises(RewardError, match=r"'culprit' cannot take completion_ids.*\*\*kwargs"):
        call(no_kwargs, completion_ids=[[1]])
    with pytest.raises(RewardError, match="'culprit' needs `answer`, which the data does not have"):
        call(needs_answer)
    with pytest.raises(RewardError, match="'culprit' needs `gold`"):
        call(Scorer())
    with pytest.raises(RewardError, match="'culprit' cannot take completions,"):
        call(positional_only)
    assert call(partial(needs_answer, answer="a")) == [1.0] * 3
    assert call(no_kwargs) == [1.0] * 3


def test_a_decorator_may_add_and_drop_arguments():
    def for_completions_only(reward_func):
        @wraps(reward_func)
        def reward(completions, **kwargs):
            return reward_func(completions, judge="j")

        return reward

    @for_completions_only
    def judged(completions, judge):
        return [1.0] * len(completions)

    assert call(judged, trainer_state=None) == [1.0] * 3


def stream(rows):
    def rows_of():
        for _ in range(rows):
            yield {"prompt": "hi"}

    return IterableDataset.from_generator(rows_of)


def build(tmp_path, reward_funcs, dataset, model="no/such-model", **overrides):
    return GD2POTrainer(model, reward_funcs, tiny_args(tmp_path, **overrides), train_dataset=dataset)


@pytest.mark.parametrize(
    ("reward", "dataset", "words"),
    [
        (no_kwargs, letters_dataset(), ["'no_kwargs'", "trainer_state", "**kwargs"]),
        (no_kwargs, stream(8), ["'no_kwargs'", "trainer_state", "**kwargs"]),
        (partial(no_kwargs), letters_dataset(), ["'no_kwargs'", "**kwargs"]),
        (positional_only, letters_dataset(), ["'positional_only'", "cannot take completions"]),
        (needs_answer, stream(8), ["'needs_answer'", "`answer`", "training dataset"]),
        (Scorer(), letters_dataset(), ["'Scorer'", "`gold`"]),
        (low_bytes, stream(0), ["no rows"]),
        (low_bytes, letters_dataset().add_column("log_metric", [1] * 16), ["`log_metric`", "Rename"]),
        (low_bytes, letters_dataset().add_column("prompts", [1] * 16), ["`prompts`", "Rename"]),
        (low_bytes, letters_dataset(1), ["has 1 prompts", "needs 2", "8 rollouts"]),
    ],
)
def test_mistakes_before_the_model_loads(tmp_path, reward, dataset, words):
    with pytest.raises(ValueError) as error:
        build(tmp_path, [reward, spread_bytes], dataset)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["completion", "prompt", "step", "advantage", "image", "gd2po_kept"])
def test_a_reward_is_no_column_of_the_table(tmp_path, name):
    def reward(completions, **kwargs):
        return low_bytes(completions)

    reward.__name__ = name
    with pytest.raises(ValueError, match=f"'{name}'"):
        build(tmp_path, [reward, spread_bytes], letters_dataset())
    with pytest.raises(ValueError, match=f"'{name}'"):
        build(tmp_path, [f"reward_models/{name}"], letters_dataset())


def test_a_stream_that_ends_too_early_is_no_success(tmp_path, tiny_policy):
    trainer = build(tmp_path, [low_bytes], stream(1), str(tiny_policy))
    with pytest.raises(ValueError, match="Not one step was trained"):
        trainer.train()


def test_a_frozen_adapter_is_refused(tmp_path):
    policy = save_tiny_policy(tmp_path / "policy")
    model = AutoModelForCausalLM.from_pretrained(policy)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    for trainable in (False, True):
        base = AutoModelForCausalLM.from_pretrained(policy)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=trainable)
        model.name_or_path = str(policy)
        if trainable:
            build(tmp_path, [low_bytes], letters_dataset(), model)
        else:
            with pytest.raises(ValueError, match="is_trainable=True"):
                build(tmp_path, [low_bytes], letters_dataset(), model)


# What rewards log beside their values


def test_log_extra_is_checked():
    def logs(column, values):
        def reward(log_extra, **kwargs):
            log_extra(column, values)
            return [1.0] * 3

        return reward

    logged = {}
    call(logs("seen", torch.arange(3)), log_extra=logged.__setitem__)
    assert logged == {"seen": [0, 1, 2]}
    for column, values, word in (
        ("seen", [1, 2], "2 values"),
        ("seen", 1.0, "float"),
        ("seen", "abc", "str"),
        ("completion", [1, 2, 3], "'completion'"),
        ("culprit", [1, 2, 3], "'culprit'"),
        (3, [1, 2, 3], "3"),
    ):
        with pytest.raises(RewardError, match=f"'culprit'.*log_extra.*{word}|'culprit'.*{word}.*log_extra"):
            call(logs(column, values), log_extra=logged.__setitem__)


def test_log_metric_is_checked():
    def logs(value):
        def reward(log_metric, **kwargs):
            log_metric("entropy_of_tools", value)
            return [1.0] * 3

        return reward

    logged = {}
    call(logs(torch.tensor(2.0)), log_metric=logged.__setitem__)
    assert logged == {"entropy_of_tools": 2.0}
    for value in ("1.0", None, [1.0, 2.0], torch.arange(3)):
        with pytest.raises(RewardError, match=r"'culprit' gives `log_metric`.*entropy_of_tools"):
            call(logs(value), log_metric=logged.__setitem__)


def test_extra_columns_fit_the_table():
    pending = defaultdict(list, {"twice": [1, 2, 3, 4]})
    fill_missing_columns(pending, {"earlier": deque([1]), "gd2po_kept": deque([True])}, 2)
    assert pending == {"twice": [3, 4], "earlier": [None, None]}

    logs = {
        "prompt": deque(["a", "b", "c"]),
        "extra": {
            "late": deque([1.5], maxlen=3),
            "mixed": deque([1, "a", None], maxlen=3),
            "odd": deque([1j, 2j, None], maxlen=3),
            "lists": deque([[1], [], None], maxlen=3),
        },
    }
    make_writable(logs)
    assert {column: list(values) for column, values in logs["extra"].items()} == {
        "late": [None, None, 1.5],
        "mixed": ["1", "a", None],
        "odd": ["1j", "2j", None],
        "lists": [[1], [], None],
    }


def test_a_run_with_odd_extra_columns_goes_on(tmp_path, tiny_policy):
    calls = []

    def logs(completions, log_extra, log_metric, **kwargs):
        calls.append(len(completions))
        log_extra("mixed", [index if index % 2 else "even" for index in range(len(completions))])
        if len(calls) % 2 == 0:
            log_extra("now_and_then", [float(index) for index in range(len(completions))])
        return low_bytes(completions)

    settings = {"log_completions": True, "max_steps": 3, "per_device_train_batch_size": 8}
    trainer = build(tmp_path, [logs, spread_bytes], letters_dataset(), str(tiny_policy), **settings)
    trainer.train()
    tables = [pd.read_parquet(path) for path in sorted((tmp_path / "completions").glob("*.parquet"))]
    assert len(tables) == 3 and calls == [8] * 3
    assert tables[0]["mixed"].tolist() == ["even", "1", "even", "3", "even", "5", "even", "7"]
    assert "now_and_then" not in tables[0] and tables[1]["now_and_then"].tolist() == [float(i) for i in range(8)]
    assert tables[2]["now_and_then"].isna().all()


# Silence


def test_a_reward_that_scores_nothing_is_named_once_in_a_while():
    silent = SilentRewards(["talks", "silent", "now_and_then"])
    nan = math.nan
    batches = [[[1.0, nan, nan], [0.0, nan, 1.0]], [[nan, nan, nan], [1.0, nan, nan]]] * 6
    named = [[message.split("'")[1] for message in silent.after_batch(torch.tensor(batch))] for batch in batches]
    assert named[:4] == [["silent"], ["now_and_then"], [], ["now_and_then"]]
    assert sum("silent" in names for names in named) == 2  # at 1 and at 10 of 12 batches
