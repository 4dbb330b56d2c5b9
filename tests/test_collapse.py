"""The warning about a reward that falls while the filter drops what would raise it."""

import math
import random

import pytest
import torch
from tiny import letters_dataset, low_bytes, tiny_args

from gd2po_trl import GD2POTrainer, compute_advantages
from gd2po_trl.diagnostics import STEEPNESS, WINDOW, CollapseWatch, collapse_statistics, falls


NAMES = ["correctness", "length"]
# Mean correctness of the batches of a quickstart run in which Hard unlearned it (`max_words` 24 of 36 tokens, seed 1).
COLLAPSED = """
    0.24 0.18 0.25 -0.85 -0.39 0.16 0.43 -0.88 -2.11 -1.96 -1.03 0.19 0.07 -0.11 -0.54 -0.87 -1.25 -1.82 -1.67 -1.14
    -1.11 -1.11 -2.24 -2.64 -2.91 -2.97 -3.00 -3.00 -2.92 -2.95 -2.74 -2.53 -2.53 -2.82 -2.93 -2.97 -2.92 -2.91 -2.96
"""


def feed(watch, means, dropped=0.7, raising=100.0, other=0.5):
    """Warnings for `means` of the first reward, by batch."""
    batches = [[[mean, other], [raising, raising], [raising * dropped, 0.0]] for mean in means]
    return {index: text for index, batch in enumerate(batches) if (text := watch.update(batch))}


def test_a_collapse_is_noticed_once_and_names_the_reward():
    warnings = feed(CollapseWatch(NAMES), [float(value) for value in COLLAPSED.split()])
    assert len(warnings) == 1
    ((batch, text),) = warnings.items()
    assert WINDOW - 1 <= batch < 30
    assert "'correctness'" in text and "70%" in text and "conflict_filter" in text and "update_share" in text


def test_nothing_is_said_while_the_rollouts_that_raise_it_are_kept():
    assert not feed(CollapseWatch(NAMES), [-float(index) for index in range(40)], dropped=0.5)
    assert not feed(CollapseWatch(NAMES), [-float(index) for index in range(40)], raising=0.0)


def test_nothing_is_said_about_a_reward_that_rises_or_stays():
    assert not feed(CollapseWatch(NAMES), [float(index) for index in range(40)])
    assert not feed(CollapseWatch(NAMES), [0.1] * 40)
    assert not feed(CollapseWatch(NAMES), [math.nan] * 40)


def test_chance_is_seldom_taken_for_a_fall():
    draw = random.Random(0)
    found = sum(falls([draw.gauss(0, 1) for _ in range(WINDOW)]) for _ in range(5000))
    assert found < 10  # 1 of 2,500 in expectation


def test_a_long_run_needs_a_clearer_fall():
    draw = random.Random(0)
    fall = [-0.22 * index + draw.gauss(0, 1) for index in range(WINDOW)]
    assert falls(fall) and not falls(fall, STEEPNESS + 1)
    assert list(feed(CollapseWatch(NAMES), fall)) == [WINDOW - 1]
    rising = [float(index) for index in range(10 * WINDOW)]
    after_long = [*rising, *(rising[-1] + value for value in fall)]  # of whose windows the last alone falls
    assert not feed(CollapseWatch(NAMES), after_long)
    assert feed(CollapseWatch(NAMES), [*after_long, *(after_long[-1] - index for index in range(WINDOW))])


def test_a_fall_as_steep_as_its_noise_allows():
    draw = random.Random(0)
    assert falls([-0.3 * index + draw.gauss(0, 1) for index in range(WINDOW)])
    assert falls([-1e-3 * index for index in range(WINDOW)])
    assert not falls([1e6 + 1e-6 * (-index) for index in range(WINDOW)])
    assert STEEPNESS > 3


def test_statistics_of_a_batch():
    rewards = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, math.nan]])
    breakdown = compute_advantages(rewards, 4, reward_weights=[1.0, -1.0])
    means, raising, dropped = collapse_statistics(rewards, breakdown, torch.tensor([1.0, -1.0])).tolist()
    assert means == pytest.approx([1.0, -1 / 3])
    # A negative weight: the second reward is raised, as it is meant, by rollouts 0 and 2, of which 2 is dropped.
    assert raising == [1.0, 2.0]
    assert dropped == [0.0, 1.0]


def test_the_trainer_warns_once(tiny_policy, tmp_path, caplog):
    """Of two rewards that always disagree, one falls from step to step; all that would raise it is dropped."""

    def falling(completions, trainer_state, **kwargs):
        return [low - trainer_state.global_step for low in low_bytes(completions)]

    def opposed(completions, **kwargs):
        return [-low for low in low_bytes(completions)]

    def warnings(conflict_filter):
        caplog.clear()
        args = tiny_args(tmp_path, max_steps=8, conflict_filter=conflict_filter)
        trainer = GD2POTrainer(str(tiny_policy), [falling, opposed], args, train_dataset=letters_dataset())
        trainer._collapse_watch = CollapseWatch(trainer.reward_func_names, window=4)
        trainer.train()
        return [record.message for record in caplog.records if "were dropped because" in record.message]

    assert len(warnings("hard")) == 1 and "'falling'" in caplog.text
    assert not warnings(None)
