"""`gd2po analyze`: rollouts as other programs log them, and columns that look like rewards."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rollout_files import analyze, command, rollouts_table, write

from gd2po_trl.analysis.reading import read_rollouts
from gd2po_trl.errors import UsageError


def names_of(report):
    return [reward.name for reward in report.rewards]


def figures_of(report):
    return report.rollouts, report.groups, report.group_size, report.over_steps.step


def lines(path: Path, records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records(steps=(1, 2), prompts=3, size=4):
    for step in steps:
        generator = np.random.default_rng(step)
        for prompt in range(prompts):
            for row in range(size):
                right, brief = int(generator.integers(0, 2)), round(float(generator.random()), 2)
                yield {"step": step, "prompt": f"q{prompt}", "completion": f"a{row}", "right": right, "brief": brief}


# Programs


def test_batches_per_line_as_ms_swift_writes_them(tmp_path):
    rows = list(records())
    batches = []
    for step in (1, 2):
        batch = {
            key: [row[key] for row in rows if row["step"] == step]
            for key in ("prompt", "completion", "right", "brief")
        }
        count = len(batch["prompt"])
        extra = {"step": [str(step)] * count, "gen_step": [str(step)] * count, "advantages": [0.1] * count}
        batches.append({**extra, **batch, "request": {"seed": 1}, "solution": ["5"] * count})
    report = analyze(lines(tmp_path / "run" / "completions.jsonl", batches).parent)
    assert names_of(report) == ["right", "brief"]
    assert figures_of(report) == (24, 6, 4, [1, 2])
    plain = analyze(lines(tmp_path / "plain.jsonl", rows))
    assert report.conflict_ratio == plain.conflict_ratio
    assert [example.completion for example in report.examples] == [example.completion for example in plain.examples]


def test_batches_of_conversations(tmp_path):
    batch = {
        "prompt": [[{"role": "user", "content": "q"}]] * 4,
        "completion": [[{"role": "assistant", "content": f"a{row}"}] for row in range(4)],
        "r": [0, 1, 1, 0],
        "step": 3,
    }
    assert figures_of(analyze(lines(tmp_path / "a.jsonl", [batch]))) == (4, 1, 4, [3])


def test_a_batch_that_is_not_even_is_an_error(tmp_path):
    file = lines(tmp_path / "a.jsonl", [{"prompt": ["a", "b"], "completion": ["x", "y", "z"], "r": [1, 2, 3]}])
    with pytest.raises(UsageError, match="line 1 holds 3 completions and 2 entries of `prompt`"):
        analyze(file)


@pytest.mark.parametrize("weights", [(1, 1), (1, 0.2)])
def test_verl_dumps(tmp_path, weights):
    for step in (1, 2, 10):
        lines(
            tmp_path / f"{step}.jsonl",
            [
                {
                    "input": row["prompt"],
                    "output": row["completion"],
                    "gts": "42",
                    "score": weights[0] * row["right"] + weights[1] * row["brief"],
                    "step": step,
                    "right": bool(row["right"]),
                    "brief": row["brief"],
                    "pred": "41",
                }
                for row in records(steps=[step])
            ],
        )
    report = analyze(tmp_path)
    assert names_of(report) == ["right", "brief"]
    assert figures_of(report) == (36, 9, 4, [1, 2, 10])
    assert report.reward_weights == list(weights)


def test_a_verl_dump_with_the_score_alone(tmp_path):
    rows = [{"input": "q", "output": f"a{row}", "score": row % 2, "step": 1} for row in range(4)]
    assert names_of(analyze(lines(tmp_path / "1.jsonl", rows))) == ["score"]


def nemo_rows(step, total=None):
    for index, row in enumerate(records(steps=[step])):
        yield {
            "idx": index,
            "content": f"user {row['prompt']} assistant {row['completion']}",
            "rewards": row["right"] + row["brief"] if total is None else row[total],
            "reward1": row["right"],
            "reward2": row["brief"],
            "input_lengths": 12,
            "token_ids": [1, 2, 3],
        }


def test_nemo_rl_dumps(tmp_path):
    for step in (1, 2, 10):
        lines(tmp_path / f"train_data_step{step}.jsonl", nemo_rows(step))
        lines(tmp_path / f"val_data_step{step}.jsonl", nemo_rows(step))
    report = analyze(tmp_path, num_generations=4)
    assert names_of(report) == ["reward1", "reward2"]
    assert figures_of(report) == (36, 9, 4, [1, 2, 10])
    assert report.warnings == []
    assert all(example.completion.startswith("user q") for example in report.examples)
    with pytest.raises(UsageError, match="--num-generations G"):
        analyze(tmp_path)
    with pytest.raises(UsageError, match=r"--num-generations 5 does not fit: step 1 has 12 rollouts"):
        analyze(tmp_path, num_generations=5)


def test_a_total_that_leaves_a_reward_out_is_a_warning(tmp_path):
    lines(tmp_path / "train_data_step1.jsonl", nemo_rows(1, total="right"))
    report = analyze(tmp_path, num_generations=4)
    assert report.reward_weights == [1.0, 1.0]
    assert any("leaves out reward2" in warning for warning in report.warnings)


def test_tables_of_weights_and_biases(tmp_path):
    rows = list(records(steps=[1]))
    table = {"columns": list(rows[0]), "data": [list(row.values()) for row in rows]}
    report = analyze(lines(tmp_path / "completions.table.json", [table]))
    assert (names_of(report), report.rollouts) == (["right", "brief"], 12)


# Which columns are rewards


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_text_is_no_reward_in_a_typed_file(tmp_path, suffix):
    table = rollouts_table([*"aaaabbbb"], [1] * 8).drop(columns="b")
    table = table.assign(solution=[str(row) for row in range(8)], parsed="5", passed=[True, False] * 4, note="n/a")
    file = write(table, tmp_path / f"a{suffix}")
    assert names_of(analyze(file)) == ["a", "passed"]
    assert names_of(analyze(file, rewards=["solution"])) == ["solution"]  # whoever says so knows


def test_text_is_no_reward_in_a_csv_if_its_name_says_so(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 8).assign(solution="5", gold_answer="4", label="3", passed="True")
    assert names_of(analyze(write(table, tmp_path / "a.csv"))) == ["a", "b", "passed"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
@pytest.mark.parametrize("text", ["N/A", "n/a", "nan", "NULL", "None", "-"])
def test_a_stray_no_value_does_not_drop_a_reward(tmp_path, capsys, suffix, text):
    table = rollouts_table([*"aaaabbbb"], [1] * 8).astype({"b": object})
    table.loc[5, "b"] = text
    file = write(table, tmp_path / f"a{suffix}")
    report = analyze(file)
    assert names_of(report) == ["a", "b"]
    assert report.rewards[1].scored == 7 / 8
    assert any(repr(text) in warning for warning in report.warnings)
    assert command(file) == 0
    printed = capsys.readouterr().out
    assert printed.index(text) < printed.index("What to do")


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_another_stray_text_is_said_first(tmp_path, suffix):
    table = rollouts_table([*"aaaabbbb"], [1] * 8).astype({"b": object})
    table.loc[5, "b"] = "failed"
    file = write(table, tmp_path / f"a{suffix}")
    report = analyze(file)
    assert names_of(report) == ["a"]
    assert any("b is not taken as a reward" in warning and "'failed'" in warning for warning in report.warnings)
    with pytest.raises(UsageError, match="row 6: `b` is 'failed'"):
        analyze(file, rewards=["a", "b"])


def test_a_total_is_no_further_reward(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 8)
    both = table.assign(reward=2 * table["a"] + table["b"])
    report = analyze(write(both, tmp_path / "a.parquet"))
    assert (names_of(report), report.reward_weights) == (["a", "b"], [2.0, 1.0])
    # A reward that is called a score, and is no sum of the others, is one.
    own = table.assign(score=np.arange(8) % 3)
    assert names_of(analyze(write(own, tmp_path / "b.parquet"))) == ["a", "b", "score"]
    assert names_of(analyze(write(own.rename(columns={"score": "total_reward"}), tmp_path / "c.parquet"))) == [
        "a",
        "b",
    ]
    assert names_of(
        analyze(
            write(table[["prompt", "completion", "step", "a"]].rename(columns={"a": "reward"}), tmp_path / "d.parquet")
        )
    ) == ["reward"]


def test_diagnostics_are_no_rewards(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 8).assign(
        gen_step=1,
        advantages=0.1,
        input_lengths=12,
        response_length=3,
        old_logps=-1.0,
        num_turns=2,
        uid=range(8),
        length=0.5,
        sample_loss_mask=1,
    )
    assert names_of(analyze(write(table, tmp_path / "a.parquet"))) == ["a", "b", "length"]


# Prompts and steps


@pytest.mark.parametrize(
    "prompt",
    [None, "", "  ", [], [{"role": "user", "content": None}], [{"role": "user", "content": ""}], float("nan")],
)
def test_a_missing_prompt_is_refused(tmp_path, prompt):
    rows = list(records())
    rows[5]["prompt"] = prompt
    file = lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match="row 6 has no prompt"):
        read_rollouts([file])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_missing_prompt_is_refused_in_tables(tmp_path, suffix):
    table = rollouts_table([*"aaaabbbb"], [1] * 8)
    table.loc[3, "prompt"] = None
    with pytest.raises(UsageError, match="row 4 has no prompt"):
        read_rollouts([write(table, tmp_path / f"a{suffix}")])


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("step", [0.25, float("nan"), float("inf")])
def test_steps_are_whole_numbers(tmp_path, suffix, step):
    table = rollouts_table([*"aaaabbbb"], [1.0] * 8)
    table.loc[3, "step"] = step
    with pytest.raises(UsageError, match="row 4: the `step`"):
        read_rollouts([write(table, tmp_path / f"a{suffix}")])
    whole = rollouts_table([*"aaaabbbb"], [1.0] * 4 + [2.0] * 4)
    assert analyze(write(whole, tmp_path / f"b{suffix}")).over_steps.step == [1, 2]


def test_steps_under_another_name(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 4 + [2] * 4).rename(columns={"step": "global_step"})
    assert analyze(write(table, tmp_path / "a.parquet")).over_steps.step == [1, 2]
    for step in (2, 10):
        (tmp_path / "named").mkdir(exist_ok=True)
        write(
            rollouts_table([*"aaaabbbb"]).assign(a=range(step, step + 8)), tmp_path / "named" / f"at_step_{step}.csv"
        )
    assert analyze(tmp_path / "named").over_steps.step == [2, 10]


# Groups


@pytest.mark.parametrize("size", [3, 8])
def test_a_group_size_that_does_not_fit_is_said_first(tmp_path, capsys, size):
    file = write(rollouts_table([*"aaaabbbbcccc"], [1] * 12), tmp_path / "a.parquet")
    assert command(file, "--num-generations", size) == 0
    printed = capsys.readouterr().out
    assert printed.index(f"--num-generations {size} does not fit") < printed.index("What to do")
    assert analyze(file, num_generations=4).warnings == analyze(file).warnings == []


def test_no_report_for_an_empty_file(tmp_path):
    for name, content in (("a.jsonl", "\n\n"), ("b.csv", "prompt,completion,a\n")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UsageError, match="holds no rows"):
            analyze(tmp_path / name)
    pd.DataFrame({"prompt": [], "completion": [], "a": []}).to_parquet(tmp_path / "c.parquet")
    with pytest.raises(UsageError, match="holds no rows"):
        analyze(tmp_path / "c.parquet")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_other_separators_of_a_csv(tmp_path, separator):
    table = rollouts_table([*"aaaabbbb"], [1] * 8)
    table.to_csv(tmp_path / "a.csv", sep=separator, index=False)
    table.to_csv(tmp_path / "a.tsv", sep=separator, index=False)
    assert names_of(analyze(tmp_path / "a.csv")) == names_of(analyze(tmp_path / "a.tsv")) == ["a", "b"]


@pytest.mark.parametrize(
    ("log", "recipe"),
    [
        ('{"log_history": 5}', "[1, 2]"),
        ('{"log_history": [{"reward": NaN, "rewards/a/mean": NaN, "rewards/b/mean": 1}]}', "a: ["),
        ('{"log_history": [{"reward": null, "rewards/a/mean": "x", "rewards/b/mean": null}]}', "reward_funcs: a"),
        ("[1]", "reward_funcs: [a, b]\nreward_weights: [1, .nan]"),
        ("\x00", "reward_funcs: [a, b]\nreward_weights: {a: 1}"),
    ],
)
def test_a_damaged_log_or_recipe_is_none(tmp_path, log, recipe):
    (tmp_path / "completions").mkdir()
    write(rollouts_table([*"aaaabbbb"], [1] * 8), tmp_path / "completions" / "completions_00001.parquet")
    (tmp_path / "trainer_state.json").write_text(log)
    (tmp_path / "recipe.yaml").write_text(recipe)
    report = analyze(tmp_path)
    assert (names_of(report), report.reward_weights, report.warnings) == (["a", "b"], [1.0, 1.0], [])


def test_values_beyond_float32_are_infinite(tmp_path):
    table = rollouts_table([*"aaaabbbb"], [1] * 8)
    table.loc[2, "a"] = 1e300
    with pytest.raises(UsageError, match="infinite"):
        analyze(write(table, tmp_path / "a.parquet"))


def test_prompts_and_steps_are_no_rewards(tmp_path):
    file = write(rollouts_table([*"aaaabbbb"], [1] * 8), tmp_path / "a.parquet")
    for name in ("prompt", "completion", "step"):
        with pytest.raises(UsageError, match=f"--rewards names `{name}`"):
            analyze(file, rewards=["a", name])
