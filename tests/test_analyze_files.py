"""`gd2po analyze`: finding groups and columns, and files that do not fit."""

import numpy as np
import pandas as pd
import pytest
from rollout_files import analyze, command, hand_made_table, rollouts_table, write

from gd2po_trl.analysis.groups import find_groups
from gd2po_trl.analysis.reading import read_rollouts
from gd2po_trl.errors import UsageError


@pytest.fixture
def hand_made() -> pd.DataFrame:
    return hand_made_table()


# Groups


def group_sizes(table, tmp_path, num_generations=None):
    groups = find_groups(read_rollouts([write(table, tmp_path / "t.parquet")], ["a", "b"]), num_generations)
    return sorted(groups.sizes.tolist()), " ".join(groups.notes)


def test_a_prompt_twice_in_a_step_makes_two_groups(tmp_path):
    assert group_sizes(rollouts_table([*"aaaabbbbaaaa"], [1] * 12), tmp_path) == ([4, 4, 4], "")


def test_runs_of_a_multiple_are_cut_where_most_runs_are_of_one_length(tmp_path):
    prompts = [letter for letter in "abcdefghijaa" for _ in range(4)]
    assert group_sizes(rollouts_table(prompts, [1] * 48), tmp_path) == ([4] * 12, "")


def test_shuffled_rows_are_grouped_by_prompt_and_step(tmp_path):
    table = rollouts_table([*"aaaabbbbccccaaaa"], [1] * 12 + [2] * 4).sample(frac=1, random_state=1)
    assert group_sizes(table, tmp_path) == ([4, 4, 4, 4], "")


def test_a_prompt_twice_in_a_step_of_a_shuffled_file_is_reported(tmp_path):
    table = rollouts_table([*"aaaabbbbccccaaaa"], [1] * 16).sample(frac=1, random_state=1)
    sizes, notes = group_sizes(table, tmp_path)
    assert sizes == [4, 4, 8]
    assert "--num-generations 4 cuts it" in notes
    assert group_sizes(table, tmp_path, num_generations=4) == ([4, 4, 4, 4], "")


def test_uneven_groups_are_kept_and_lonely_rollouts_reported(tmp_path):
    sizes, notes = group_sizes(rollouts_table([*"aabbbccccde"], [1] * 11), tmp_path)
    assert sizes == [2, 3, 4]
    assert "2 rollouts are alone with their prompt" in notes
    assert "groups of another size (2 to 4)" in notes


def test_without_steps_the_same_prompt_later_is_another_group(tmp_path):
    assert group_sizes(rollouts_table([*"aaaabbbbaaaa"]), tmp_path) == ([4, 4, 4], "")


def test_a_table_that_is_logged_twice_counts_once(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 8)
    table = pd.concat([table, table.assign(step=2), rollouts_table([*"aaaabbbb"], [3] * 8).assign(completion="new")])
    sizes, notes = group_sizes(table, tmp_path)
    assert sizes == [4] * 4
    assert "1 logging step" in notes


def test_the_rest_of_a_cut_group_is_left_out_of_trl_tables(tmp_path):
    # 16 rows: a training batch whose first 6 rows fell out when an evaluation with 2 rollouts per prompt came.
    prompts = [*"aabbbbccccxxyyzz"]
    groups = [rollouts_table(prompts, [step] * 16).assign(completion=f"step {step}") for step in (1, 2)]
    for step, table in enumerate(groups, 1):
        write(table, tmp_path / f"completions_0000{step}.parquet")
    # A full table and one whose first group is larger than the others stay as they are.
    write(rollouts_table([*"aaaabbbbcccc"], [3] * 12), tmp_path / "completions_00003.parquet")
    write(rollouts_table([*"aaaaxxyy"], [4] * 8), tmp_path / "completions_00004.parquet")
    groups = find_groups(read_rollouts([tmp_path], ["a", "b"]))
    sizes = {step: sorted(groups.sizes[groups.steps == step].tolist()) for step in (1, 2, 3, 4)}
    assert sizes == {1: [2, 2, 2, 4, 4], 2: [2, 2, 2, 4, 4], 3: [4, 4, 4], 4: [2, 2, 4]}
    assert any("4 rollouts at the head of logged tables" in note for note in groups.notes)
    # Elsewhere groups of any size may have been meant.
    other = write(rollouts_table(prompts, [1] * 16), tmp_path / "mine.parquet")
    groups = find_groups(read_rollouts([other], ["a", "b"]))
    assert sorted(groups.sizes.tolist()) == [2, 2, 2, 2, 4, 4]
    assert not any("head" in note for note in groups.notes)


def test_messages_as_prompts_and_files_of_two_runs(tmp_path):
    for run in ("one", "two"):
        (tmp_path / run / "completions").mkdir(parents=True)
        table = rollouts_table([[{"role": "user", "content": text}] for text in "aaaabbbb"], [1] * 8)
        write(table, tmp_path / run / "completions" / "completions_00001.parquet")
    analysis = analyze(tmp_path / "one", tmp_path / "two", tmp_path / "two" / "completions")
    assert (analysis.groups, analysis.group_size) == (4, 4)
    assert any("2 folders are pooled" in note for note in analysis.notes)
    assert any("evaluation replaces" in note for note in analysis.notes)


# Files that do not fit


def test_columns_are_found_and_ids_are_no_rewards(tmp_path):
    table = rollouts_table([*"aabb"], [1] * 4).assign(
        sample_id=range(4), gd2po_kept=True, advantage=0.5, passed=[True, False, None, True], gold="x"
    )
    rollouts = read_rollouts([write(table, tmp_path / "a.jsonl")])
    assert rollouts.reward_names == ["a", "b", "passed"]
    assert np.isnan(rollouts.rewards[2, 2]) and rollouts.rewards[0, 2] == 1
    assert "Not: gold." in rollouts.notes[0]


@pytest.mark.parametrize(
    ("content", "name", "arguments", "message"),
    [
        ('{"prompt": "a", "r": 1}', "a.jsonl", [], "no column `completion`"),
        ('{"prompt": "a", "completion": "b", "r": 1}', "a.jsonl", ["--rewards", "s"], "no column `s`"),
        ('{"prompt": "a", "completion": "b", "r": "good"}', "a.jsonl", [], "--rewards"),
        ('{"prompt": "a", "completion": "b", "r": "good"}', "a.jsonl", ["--rewards", "r"], "`r` is not numeric"),
        ('{"prompt": "a", "completion": "b", "r": [1]}', "a.jsonl", ["--rewards", "r"], "`r` is not numeric"),
        ('{"prompt": "a", "completion": "b", "r": Infinity}', "a.jsonl", [], "infinite"),
        (
            '{"prompt": "a", "completion": "b", "r": null}',
            "a.jsonl",
            ["--rewards", "r"],
            "every reward column is empty",
        ),
        ('{"prompt": "a", "completion": "b", "r": 1, "step": "x"}', "a.jsonl", ["--rewards", "r"], "`step`"),
        ('{"prompt": "a", "completion": "b", "r": 1, "step": null}', "a.jsonl", ["--rewards", "r"], "`step`"),
        ('{"prompt": "a", "completion": "b", "r": 1}', "a.jsonl", [], "No prompt has two rollouts"),
        ('{"prompt": "a"', "a.jsonl", [], "line 1 is not JSON"),
        ("[" * 100_000, "a.jsonl", [], "line 1 is not JSON"),
        ('[{"prompt": "a"}]', "a.json", [], "one JSON object per line"),
        ("", "a.jsonl", [], "holds no rows"),
        ("", "a.csv", [], "cannot be read"),
        ('a,b\n1,2,3\n1,2,3,4,5\n"', "a.csv", [], "cannot be read"),
        ("PAR1", "a.parquet", [], "cannot be read"),
        ("\udcff", "a.csv", [], "cannot be read"),
        ("x", "a.txt", [], "unknown ending"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path, capsys, content, name, arguments, message):
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    assert command(tmp_path / name, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_files_whose_columns_differ(hand_made, tmp_path):
    write(hand_made, tmp_path / "a.parquet")
    write(hand_made.drop(columns="length"), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet' has no column `length`"):
        read_rollouts([tmp_path])
    write(hand_made.drop(columns="step"), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match=r"b\.parquet' has no column `step`"):
        read_rollouts([tmp_path])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", "1.5"], "in [0, 1]"),
        (["--reward-weights", "1"], "1 entries for the 2 rewards correctness, length"),
        (["--reward-weights", "1", "nan"], "finite"),
        (["--num-generations", "1"], "at least 2"),
        (["--output", "{file}"], "is a file"),
    ],
)
def test_a_wrong_option_is_one_clear_error(hand_made, tmp_path, capsys, arguments, message):
    file = write(hand_made, tmp_path / "a.csv")
    assert command(file, *(argument.format(file=file) for argument in arguments)) == 2
    assert message in capsys.readouterr().err


def test_a_run_without_completions_says_how_to_log_them(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text("{}")
    assert command(tmp_path) == 2
    assert "log_completions=True" in capsys.readouterr().err
    assert command(tmp_path / "nowhere") == 2
    assert "does not exist" in capsys.readouterr().err
