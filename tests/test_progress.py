"""What a training shows: on a terminal of 80 columns, in a file, and at its end."""

import io
import logging
import re

import pytest
from rich.console import Console
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args

from gd2po_trl import GD2POTrainer
from gd2po_trl.cli.train import print_end
from gd2po_trl.progress import RewardProgress, print_change
from gd2po_trl.reporting import make_table
from gd2po_trl.run_log import reward_names, training_change
from gd2po_trl.terminal import _Once, duration, fill, make_console, number


def console(width: int = 80, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, markup=False, emoji=False)


def a_reward_whose_name_is_too_long_for_half_a_line(completions, **kwargs):
    return low_bytes(completions)


@pytest.fixture(scope="module")
def trained(tiny_policy, tmp_path_factory):
    """A run of three steps with a prompt that looks like markup, and what it showed in a file."""
    output = tmp_path_factory.mktemp("run")
    screen = console()
    trainer = GD2POTrainer(
        model=str(tiny_policy),
        reward_funcs=[low_bytes, spread_bytes, a_reward_whose_name_is_too_long_for_half_a_line],
        args=tiny_args(output, max_steps=3, log_completions=True, eval_strategy="steps", eval_steps=3),
        train_dataset=letters_dataset(),
        eval_dataset=letters_dataset(4),
    )
    RewardProgress(console=screen).attach(trainer)
    trainer.train()
    return trainer, screen.file.getvalue()


def test_a_file_gets_one_line_per_log_entry(trained, capsys):
    trainer, shown = trained
    lines = [line for line in shown.splitlines() if line.startswith("step ")]
    assert len(lines) == 3
    last = [entry for entry in trainer.state.log_history if "rewards/low_bytes/mean" in entry][-1]
    for name in ("low_bytes", "spread_bytes", "a_reward_whose_name_is_too_long_for_half_a_line"):
        assert f"{name} {number(last[f'rewards/{name}/mean'])}" in lines[-1]
    assert f"conflict {last['gd2po/conflict_ratio']:.0%}" in lines[-1]
    assert lines[0].startswith("step 1/3  ")
    assert "held out, step 3:" in shown
    assert "train_runtime" not in shown and "grad_norm" not in shown


def test_rollouts_are_shown_with_their_rewards(trained):
    _, shown = trained
    assert shown.count("Rollout of step") == 3
    assert re.search(r"completion \(low_bytes \S+, spread_bytes \S+, a_reward_whose_name\S+ [^)]+\)", shown)


def test_a_terminal_breaks_no_name(tiny_policy, tmp_path):
    screen = console(terminal=True)
    trainer = GD2POTrainer(
        model=str(tiny_policy),
        reward_funcs=[low_bytes, spread_bytes, a_reward_whose_name_is_too_long_for_half_a_line],
        args=tiny_args(tmp_path),
        train_dataset=letters_dataset(),
    )
    progress = RewardProgress(num_samples=0, console=screen)
    progress.attach(trainer)
    trainer.train()
    assert progress._live is None
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.file.getvalue())
    assert max(map(len, re.split(r"[\r\n]", text))) <= 80
    assert "a_reward_whose_name_is_too_long_for_half_a_line " in text
    assert "step 2/2" in text
    assert "Rollout" not in text


def test_the_end_says_what_changed_and_what_comes_next(trained):
    trainer, _ = trained
    screen = console()
    print_end(trainer, screen)
    shown = screen.file.getvalue()
    for name, (first, last) in training_change(trainer.state.log_history).items():
        assert f"{name} {number(first)} {number(last)} {number(last - first, '+')}" in " ".join(shown.split())
    for command in ("gd2po generate --model", "gd2po eval rewards --model", "gd2po analyze"):
        assert f"{command} {trainer.args.output_dir}" in shown
    assert "gd2po merge" not in shown  # there is no adapter


def test_a_log_without_rewards_has_no_change_to_show():
    screen = console()
    print_change([{"step": 1, "loss": 2.0}], screen)
    print_change([], screen)
    assert screen.file.getvalue() == ""


def test_names_of_rewards_may_hold_a_slash():
    assert reward_names([{"rewards/a/b/mean": 1.0, "rewards/a/b/std": 1.0}]) == ["a/b"]


def test_lines_and_numbers():
    assert fill(["aaa 1", "bbb 2", "a-name-longer-than-the-line 3", "c 4"], 12) == [
        "aaa 1  bbb 2",
        "a-name-longer-than-the-line 3",
        "c 4",
    ]
    assert [number(value) for value in (0, 0.5, -2.25, 123.4, 12345.6)] == ["0.00", "0.500", "-2.25", "123", "12,346"]
    assert (number(0.25, "+"), number(-1e-17, "+")) == ("+0.250", "+0.00")
    assert [duration(seconds) for seconds in (0, 75, 3723)] == ["0:00", "1:15", "1:02:03"]


def test_a_table_breaks_no_word():
    names = ["completion_is_a_valid_tool_call", "another_reward"]
    table = make_table("rewards", ["reward", "first tenth of the steps", "last tenth"], [[n, "1", "2"] for n in names])
    screen = console(width=60)
    screen.print(table)
    assert all(f" {name} " in screen.file.getvalue() for name in names)


def test_what_is_no_terminal_gets_plain_text(monkeypatch, capsys):
    # Jupyter's kernel sets this.
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not make_console().is_terminal
    make_console().print(make_table("title", ["a"], [["b"]]))
    assert "\x1b" not in capsys.readouterr().out


def test_a_warning_is_shown_once():
    once = _Once()
    records = [
        logging.LogRecord("lib", logging.WARNING, "", 0, text, None, None) for text in ("same", "same", "other")
    ]
    assert [once.filter(record) for record in records] == [True, False, True]
