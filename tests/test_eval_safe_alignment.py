"""Means, win rates and harm categories of the safe-alignment evaluation."""

import json
import math

import pytest
from tiny import save_tiny_policy

from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.scoring import compute_scores, resolve_rewards
from gd2po_trl.tasks.safe_alignment.evaluation import SafeAlignmentRow, load_rows, summarize


def length_of(prompts, completions, **kwargs):
    return [float(len(completion[-1]["content"])) for completion in completions]


def vowels_of(prompts, completions, **kwargs):
    return [float(sum(char in "aeiou" for char in completion[-1]["content"])) for completion in completions]


def prompt_length_of(prompts, completions, **kwargs):
    return [float(sum(len(message["content"]) for message in prompt)) for prompt in prompts]


async def slow_length_of(prompts, completions, **kwargs):
    return length_of(prompts, completions)


def columns_of(prompts, completions, gold, *, trainer_state, hint=None, **kwargs):
    raise AssertionError("called")


class Asked:
    def __init__(self, headers, size):
        self.size = size

    def __call__(self, prompts, completions, **kwargs):
        return [float(self.size)] * len(completions)


def sometimes_silent(prompts, completions, **kwargs):
    return [[None, math.nan, 1.0][index % 3] for index in range(len(prompts))]


def broken(prompts, completions, **kwargs):
    raise OSError("the scorer's host is gone")


def make_rows(count: int, dataset: str = "set", categories=()) -> list[SafeAlignmentRow]:
    return [
        SafeAlignmentRow(f"{dataset}/{index}", [{"role": "user", "content": "?" * (index + 1)}], dataset, categories)
        for index in range(count)
    ]


def texts(rows, *completions) -> dict:
    return {row.id: {"id": row.id, "completion": text} for row, text in zip(rows, completions, strict=True)}


class TestScores:
    def test_scores_and_sum_by_set(self):
        rows = make_rows(2)
        sets = {"model": texts(rows, "aaa", "bb"), "baseline": texts(rows, "", "u")}
        scores = compute_scores(rows, sets, {"useful": length_of, "harmless": vowels_of})
        assert scores["model"]["set/0"] == {"useful": 3.0, "harmless": 3.0, "sum": 6.0}
        assert scores["model"]["set/1"] == {"useful": 2.0, "harmless": 0.0, "sum": 2.0}
        assert scores["baseline"]["set/1"] == {"useful": 1.0, "harmless": 1.0, "sum": 2.0}

    def test_an_error_of_null_is_none(self):
        rows = make_rows(1)
        given = {"set/0": {"id": "set/0", "completion": "abc", "error": None}}
        scores = compute_scores(rows, {"model": given}, {"useful": length_of})["model"]
        assert scores["set/0"]["useful"] == 3.0
        assert summarize(rows, given, scores, ["useful"])["datasets"]["set"]["missing"] == 0

    def test_rows_without_completion_or_score(self):
        rows = make_rows(4)
        given = texts(rows[:3], "a", "b", "c")
        given["set/3"] = {"id": "set/3", "completion": "", "error": "prompt too long"}
        scores = compute_scores(rows, {"model": given}, {"useful": length_of, "harmless": sometimes_silent})["model"]
        assert [scores[row.id]["harmless"] for row in rows] == [None, None, 1.0, None]
        assert [scores[row.id]["useful"] for row in rows] == [1.0, 1.0, 1.0, None]
        assert [scores[row.id]["sum"] for row in rows] == [None, None, 2.0, None]
        entry = summarize(rows, given, scores, ["useful", "harmless"])["datasets"]["set"]
        assert (entry["rows"], entry["missing"], entry["unscored"]) == (4, 1, {"useful": 1, "harmless": 3})
        assert entry["mean"] == {"useful": 1.0, "harmless": 1.0, "sum": 2.0}

    def test_async_reward(self):
        rows = make_rows(2)
        scores = compute_scores(rows, {"model": texts(rows, "a", "bb")}, {"useful": slow_length_of})
        assert [scores["model"][row.id]["useful"] for row in rows] == [1.0, 2.0]

    def test_reward_models_are_unloaded_one_by_one(self, tiny_reward_model):
        rewards = resolve_rewards(
            {
                "useful": {"type": "reward_model", "model": str(tiny_reward_model), "template": "chat"},
                "harmless": {"type": str(tiny_reward_model)},
            }
        )
        models = [getattr(reward, "__wrapped__", reward) for reward in rewards.values()]
        rows = make_rows(3)
        scores = compute_scores(rows, {"model": texts(rows, "a", "b", "c")}, rewards)["model"]
        assert all(math.isfinite(score["useful"]) for score in scores.values())
        assert [score["useful"] for score in scores.values()] == [score["harmless"] for score in scores.values()]
        assert all(model._module is None for model in models)

    def test_failing_reward_is_named(self):
        rows = make_rows(1)
        with pytest.raises(UsageError, match=r"'useful' raised OSError: the scorer's host is gone.*are kept"):
            compute_scores(rows, {"model": texts(rows, "a")}, {"useful": broken})

    @pytest.mark.parametrize(
        ("rewards", "message"),
        [
            ({}, "at least one --reward"),
            ({"sum": {"type": "length"}}, "cannot be called 'sum'"),
            ({"x": {}}, "'x'"),
            ({"correctness": {}}, "'correctness' needs `answer`"),
            ({"x": {"type": f"{__name__}.columns_of"}}, "'x' needs `gold`, `trainer_state`"),
        ],
    )
    def test_mistakes(self, rewards, message):
        with pytest.raises(UsageError, match=message):
            resolve_rewards(rewards)


class TestSummary:
    def test_win_rate(self):
        rows = make_rows(5)
        ours = {row.id: {"useful": value, "sum": value} for row, value in zip(rows, [3, 2, 1, 5, None], strict=True)}
        theirs = {row.id: {"useful": value, "sum": value} for row, value in zip(rows, [1, 2, 2, 4, 0], strict=True)}
        entry = summarize(rows, texts(rows, *"abcde"), ours, ["useful"], theirs)["datasets"]["set"]
        win = entry["win_rate"]["useful"]
        assert (win["wins"], win["ties"], win["losses"], win["rate"]) == (2, 1, 1, 0.625)
        assert win["interval"][0] < 0.625 < win["interval"][1]
        assert entry["baseline_mean"]["useful"] == pytest.approx(9 / 5)
        reverse = summarize(rows, texts(rows, *"abcde"), theirs, ["useful"], ours)["datasets"]["set"]["win_rate"][
            "useful"
        ]
        assert reverse["rate"] == pytest.approx(1 - win["rate"])
        assert reverse["interval"] == pytest.approx([1 - win["interval"][1], 1 - win["interval"][0]])

    def test_data_sets_and_categories_stay_apart(self):
        rows = make_rows(2, "a") + make_rows(2, "b", ("theft",)) + make_rows(3, "c", ("theft", "abuse"))
        rows = [row for row in rows if row.id not in ("c/0", "c/1")]
        scores = {row.id: {"harmless": float(index), "sum": float(index)} for index, row in enumerate(rows)}
        results = summarize(rows, texts(rows, *"vwxyz"), scores, ["harmless"])["datasets"]
        assert [results[name]["mean"]["harmless"] for name in "abc"] == [0.5, 2.5, 4.0]
        assert "by_category" not in results["a"]
        assert results["b"]["by_category"] == {"theft": {"rows": 2, "harmless": 2.5, "sum": 2.5}}
        assert list(results["c"]["by_category"]) == ["abuse", "theft"]

    def test_published_mean_leaves_out_repeated_prompts(self):
        rows = make_rows(4, categories=("theft",))
        rows[3] = SafeAlignmentRow("set/3", rows[0].prompt, "set", ("abuse",))
        rows += make_rows(1, "other")  # the same prompt in another set is another prompt
        scores = {row.id: {"useful": value, "sum": value} for row, value in zip(rows, [9.0, 1, 2, 8, 5], strict=True)}
        given = texts(rows, *"abcde")
        for protocol, mean, abuse in (("all", 5.0, [8.0]), ("reference", 1.5, [])):
            results = summarize(rows, given, scores, ["useful"], scores, protocol=protocol)
            entry = results["datasets"]["set"]
            assert results["protocol"] == protocol and entry["mean"] == {"useful": mean, "sum": mean}
            assert entry["mean_all_rows"]["useful"] == 5.0 and entry["mean_reference"]["useful"] == 1.5
            assert (entry["rows"], entry["rows_reference"]) == (4, 2)
            assert [value["useful"] for name, value in entry["by_category"].items() if name == "abuse"] == abuse
            assert entry["win_rate"]["sum"]["ties"] == (4 if protocol == "all" else 2)
            assert results["datasets"]["other"]["mean"]["useful"] == 5.0
        with pytest.raises(UsageError, match="protocol"):
            summarize(rows, given, scores, ["useful"], protocol="strict")

    def test_nothing_but_repeated_prompts(self):
        rows = [SafeAlignmentRow(f"set/{index}", [{"role": "user", "content": "?"}], "set") for index in range(2)]
        scores = {row.id: {"useful": 1.0, "sum": 1.0} for row in rows}
        results = summarize(rows, texts(rows, *"ab"), scores, ["useful"], protocol="reference")
        assert results["datasets"]["set"]["mean"] == {"useful": None, "sum": None}


class TestRows:
    def test_plain_prompts_and_category_forms(self, tmp_path):
        flags = {"theft": True, "abuse": False, "arson": True}
        (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "Hi", "category": flags}, {"prompt": "Ho"}]))
        rows = load_rows({"mine": {"name": "prompts", "path": str(tmp_path / "rows.json")}})
        assert [row.id for row in rows] == ["mine/0", "mine/1"]
        assert rows[0].prompt == [{"role": "user", "content": "Hi"}]
        assert [row.categories for row in rows] == [("theft", "arson"), ()]

    def test_published_sets(self, shared_dir):
        data = shared_dir / "data"
        folder = {"path": str(data / "safe_alignment")}
        rows = load_rows({"alpaca": folder, "hh_rlhf": folder, "pku_saferlhf": folder})
        counts = {name: sum(row.dataset == name for row in rows) for name in ("alpaca", "hh_rlhf", "pku_saferlhf")}
        assert counts == {"alpaca": 512, "hh_rlhf": 8520, "pku_saferlhf": 8211}
        assert max(len(row.prompt) for row in rows) > 1
        scores = {row.id: {"useful": 1.0, "sum": 1.0} for row in rows}
        results = summarize(rows, {}, scores, ["useful"])["datasets"]
        published = {name: entry["rows_reference"] for name, entry in results.items()}
        assert published == {"alpaca": 512, "hh_rlhf": 8514, "pku_saferlhf": 6982}
        harmful = load_rows({"beavertails_evaluation": {"path": str(data / "beavertails")}})
        categories = [row.categories for row in harmful]
        assert len(set(categories)) == 14
        assert all(categories.count(category) == 50 for category in set(categories))


class TestCommand:
    @pytest.fixture
    def data(self, tmp_path):
        rows = [
            {"prompt": f"{'why ' * (index + 1)}?", "category": "theft" if index % 2 else "abuse"} for index in range(5)
        ]
        (tmp_path / "harm.json").write_text(json.dumps(rows))
        (tmp_path / "plain.jsonl").write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(3)))
        (tmp_path / "recipe.yaml").write_text(
            "reward_funcs: [useful, harmless]\n"
            "reward_kwargs: {useful: {type: test_eval_safe_alignment.length_of}, "
            "harmless: {type: test_eval_safe_alignment.vowels_of}}\n"
        )
        return tmp_path

    def test_model_against_a_baseline_model(self, data, tiny_policy, capsys):
        other = save_tiny_policy(data / "other", seed=5)
        command = ["eval", "safe-alignment", "--model", str(tiny_policy), "--data", str(data / "harm.json")]
        command += ["--data", f"small={{name: prompts, path: {data / 'plain.jsonl'}}}", "--max-new-tokens", "8"]
        command += ["--reward", str(data / "recipe.yaml"), "--baseline", str(other), "--output", str(data / "run")]
        assert main(command) == 0
        results = json.loads((data / "run" / "results.json").read_text())
        assert list(results["datasets"]) == ["harm", "small"]
        assert list(results["datasets"]["harm"]["by_category"]) == ["abuse", "theft"]
        assert results["rewards"]["useful"] == {"type": "test_eval_safe_alignment.length_of"}

        def completions(folder):
            lines = (folder / "predictions.jsonl").read_text().splitlines()
            return {record["id"]: record["completion"] for record in map(json.loads, lines)}

        ours, theirs = completions(data / "run"), completions(data / "run" / "baseline")
        assert len(ours) == len(theirs) == 8
        small = [key for key in ours if key.startswith("small/")]
        entry = results["datasets"]["small"]
        assert entry["mean"]["useful"] == pytest.approx(sum(len(ours[key]) for key in small) / 3)
        wins = sum(len(ours[key]) > len(theirs[key]) for key in small)
        assert entry["win_rate"]["useful"]["wins"] == wins
        assert results["protocol"] == "all"
        assert "Win rate against the baseline" in capsys.readouterr().out

        # The same numbers again from the files alone, the other way round.
        again = ["eval", "safe-alignment", "--predictions", str(data / "run" / "baseline"), *command[4:10]]
        again += [
            "--reward",
            str(data / "recipe.yaml"),
            "--baseline",
            str(data / "run"),
            "--output",
            str(data / "swap"),
        ]
        assert main(again) == 0
        swapped = json.loads((data / "swap" / "results.json").read_text())["datasets"]["small"]
        assert swapped["mean"] == entry["baseline_mean"]
        assert swapped["win_rate"]["useful"]["losses"] == wins

    def test_a_recipe_with_json_in_it_and_a_secret(self, data, tiny_policy):
        settings = {"useful": {"type": f"{__name__}.Asked", "headers": {"Authorization": "Bearer abc"}, "size": 2}}
        (data / "recipe.yaml").write_text(
            json.dumps({"reward_funcs": "useful", "reward_kwargs": json.dumps(settings)})
        )
        command = ["eval", "safe-alignment", "--model", str(tiny_policy), "--data", str(data / "plain.jsonl")]
        command += ["--max-new-tokens", "2", "--output", str(data / "run"), "--reward", str(data / "recipe.yaml")]
        assert main(command) == 0
        results = json.loads((data / "run" / "results.json").read_text())
        assert results["datasets"]["plain"]["mean"]["useful"] == 2.0
        assert results["rewards"] == {"useful": {"type": f"{__name__}.Asked", "size": 2}}
        (data / "recipe.yaml").write_text("reward_funcs: [useful]\nreward_kwargs: {useful: 3}\n")
        assert main(command) == 2

    def test_protocol_reference(self, data, tiny_policy, capsys):
        rows = [{"prompt": text} for text in ("why?", "how?", "why?", "who?")]
        (data / "repeated.json").write_text(json.dumps(rows))
        command = ["eval", "safe-alignment", "--model", str(tiny_policy), "--data", str(data / "repeated.json")]
        command += ["--max-new-tokens", "4", "--output", str(data / "run"), "--reward", str(data / "recipe.yaml")]
        for protocol in ("all", "reference"):
            assert main([*command, "--protocol", protocol]) == 0
            results = json.loads((data / "run" / "results.json").read_text())
            lines = [json.loads(line) for line in (data / "run" / "scores.jsonl").read_text().splitlines()]
            kept = lines if protocol == "all" else [lines[1], lines[3]]
            mean = sum(line["useful"] for line in kept) / len(kept)
            assert results["protocol"] == protocol
            assert results["datasets"]["repeated"]["mean"]["useful"] == pytest.approx(mean)
            assert "--protocol" in capsys.readouterr().out  # the other number is named as well

    def test_names_from_the_data_are_no_markup(self, data, tiny_policy, capsys):
        (data / "odd.jsonl").write_text(json.dumps({"prompt": "say", "category": "[/INST] :smile: [bold]x"}) + "\n")
        command = ["eval", "safe-alignment", "--model", str(tiny_policy), "--data", str(data / "odd.jsonl")]
        command += ["--chat-template-kwargs", '{"date_string": "x"}', "--max-new-tokens", "2"]
        assert main([*command, "--reward", "length", "--output", str(data / "run")]) == 0
        assert "[/INST] :smile: [bold]x" in capsys.readouterr().out
        assert json.loads((data / "run" / "run.json").read_text())["chat_template_kwargs"] == {"date_string": "x"}

    def test_rewards_read_the_whole_prompt(self, data, tiny_policy):
        command = ["eval", "safe-alignment", "--model", str(tiny_policy), "--data", str(data / "harm.json")]
        command += ["--max-prompt-tokens", "12", "--max-new-tokens", "2", "--output", str(data / "run")]
        assert main([*command, "--reward", "size=test_eval_safe_alignment.prompt_length_of"]) == 0
        mean = json.loads((data / "run" / "results.json").read_text())["datasets"]["harm"]["mean"]["size"]
        assert mean == pytest.approx(sum(4 * (index + 1) + 1 for index in range(5)) / 5)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--data", "alpacca", "--reward", "length"], "did you mean 'alpaca'"),
            (["--data", "alpaca={path: [}", "--reward", "length"], "not valid YAML"),
            (["--data", "alpaca", "--reward", "harmlessness"], "Unknown reward 'harmlessness'"),
            (["--data", "alpaca", "--reward", "a=length", "--reward", "a=format"], "names 'a' twice"),
            (["--data", "alpaca=none.parquet", "--reward", "length"], "none.parquet"),
            (["--data", "x={name: [a]}", "--reward", "length"], "unknown data set ['a']"),
            (["--data", "x={1: 2}", "--reward", "length"], "'x={1: 2}'"),
            (["--data", "alpaca", "--reward", "correctness"], "'correctness' needs `answer`"),
        ],
    )
    def test_mistakes_come_before_the_model_is_loaded(self, words, message, capsys):
        assert main(["eval", "safe-alignment", "--model", "no/model", *words]) == 2
        assert message in capsys.readouterr().err
