"""Scoring of API-Bank in both protocols."""

import ast
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import save_tiny_policy

from gd2po_trl.cli import main
from gd2po_trl.errors import UsageError
from gd2po_trl.tasks.tool_calling.api_bank import (
    ApiBankRow,
    load_rows,
    score_completion,
    score_predictions,
    stands_for,
)


GOLD = {"name": "Book", "parameters": {"hotel": "Plaza", "rooms": "2", "guests": "['Ann', 'Bo']", "late": "True"}}
RIGHT = json.dumps(GOLD)
WRONG = json.dumps({"name": "Cancel", "parameters": {}})
THINK = "<think> The user wants a room. </think>\n"


def call(*lines: str) -> str:
    return THINK + "<tool_call>\n" + "\n".join(lines) + "\n</tool_call>"


def book(**changes) -> str:
    """A call of the right tool with other parameters; `None` leaves one out."""
    parameters = {**GOLD["parameters"], **changes}
    return json.dumps({"name": "Book", "parameters": {k: v for k, v in parameters.items() if v is not None}})


# Completion, why it is wrong in `strict` ("correct" if it is not), whether it is right in `reference`.
COMPLETIONS = {
    # What both protocols agree on.
    "right call": (call(RIGHT), "correct", True),
    "keys in another order": (call(json.dumps(dict(reversed(GOLD.items())))), "correct", True),
    "a further key beside name and parameters": (call(json.dumps({**GOLD, "id": 7})), "correct", True),
    "right call and a response": (call(RIGHT) + "\n<response> Done. </response>", "correct", True),
    "blank lines around the call": (call("", RIGHT, ""), "correct", True),
    "no thoughts": (f"<tool_call>\n{RIGHT}\n</tool_call>", "correct", True),
    "empty": ("", "no_call", False),
    "response instead of a call": (THINK + "<response> Booked! </response>", "no_call", False),
    "call not closed": (THINK + f"<tool_call>\n{RIGHT}", "no_call", False),
    "call outside the tags": (THINK + RIGHT, "no_call", False),
    "another tool": (call(json.dumps({**GOLD, "name": "book"})), "wrong_name", False),
    "another value": (call(book(hotel="Ritz")), "wrong_parameters", False),
    "parameter left out": (call(book(late=None)), "wrong_parameters", False),
    "parameter too many": (call(book(floor="3")), "wrong_parameters", False),
    "no parameters": (call(json.dumps({"name": "Book", "parameters": {}})), "wrong_parameters", False),
    "pretty-printed JSON": (call(json.dumps(GOLD, indent=2)), "malformed", False),
    "calls in a JSON list": (call(json.dumps([GOLD])), "malformed", False),
    "Python instead of JSON": (call(str(GOLD)), "malformed", False),
    "number with another value": (call(book(rooms=3)), "wrong_parameters", False),
    # Defects of the published scorer.
    "right call after wrong ones": (call(WRONG, WRONG, RIGHT), "several_calls", True),
    "right call twice": (call(RIGHT, RIGHT), "several_calls", True),
    "right call and a wrong one in a second block": (call(RIGHT) + call(WRONG)[len(THINK) :], "several_calls", True),
    "wrong call and the right one in a second block": (
        call(WRONG) + call(RIGHT)[len(THINK) :],
        "several_calls",
        False,
    ),
    "bare parameters, neither name nor parameters": (call(json.dumps(GOLD["parameters"])), "malformed", True),
    "name missing": (call(json.dumps({"parameters": GOLD["parameters"]})), "malformed", False),
    "null before the right call": (call("null", RIGHT), "several_calls", False),
    "null after the right call": (call(RIGHT, "null"), "several_calls", True),
    "text before the right call": (call("Here it is:", RIGHT), "malformed", True),
    "a call as a JSON string": (call(json.dumps(RIGHT)), "malformed", True),
    "call only thought of": (
        f"<think> <tool_call>\n{RIGHT}\n</tool_call> </think>\n<response> Hm. </response>",
        "no_call",
        True,
    ),
    "tag mentioned in the thoughts": (
        f"<think> I must use <tool_call>. </think>\n<tool_call>\n{RIGHT}\n</tool_call>",
        "correct",
        True,  # the text before the real call is dropped as no JSON
    ),
    "closing tag mentioned in the thoughts": (
        f"<think> First <tool_call>, then </tool_call>. </think>\n<tool_call>\n{RIGHT}\n</tool_call>",
        "correct",
        False,
    ),
    "number as a number": (call(book(rooms=2)), "correct", False),
    "number as a float": (call(book(rooms=2.0)), "correct", False),
    "Boolean as a Boolean": (call(book(late=True)), "correct", False),
    "list as a list": (call(book(guests=["Ann", "Bo"])), "correct", False),
    "list in another order": (call(book(guests=["Bo", "Ann"])), "wrong_parameters", False),
    "Boolean for a number": (call(book(rooms=True)), "wrong_parameters", False),
    "number for a Boolean": (call(book(late=1)), "wrong_parameters", False),
    "list in JSON text": (call(book(guests='["Ann", "Bo"]')), "wrong_parameters", False),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_both_protocols(name):
    completion, reason, reference = COMPLETIONS[name]
    strict = score_completion(completion, GOLD, "strict")
    assert (strict.reason, strict.correct) == (reason, reason == "correct")
    assert score_completion(completion, GOLD, "reference").correct is reference


@pytest.mark.parametrize(
    ("value", "gold", "expected"),
    [
        (5, "5", True),
        (5.0, "5", True),
        (74.006, "74.0060", True),
        (0.5, "0.5", True),
        (970420, "970420", True),
        (970, "0970", False),
        (5, "five", False),
        (10**400, "1e400", False),
        (float("nan"), "nan", False),
        (True, "True", True),
        (False, "True", False),
        (1, "True", False),
        (True, "1", False),
        (None, "None", True),
        (None, "", False),
        (0, "", False),
        ("", "", True),
        ("5", "5.0", False),
        ([{"name": "pulse", "value": 80}], "[{'name': 'pulse', 'value': '80'}]", True),
        ([{"value": "80", "name": "pulse"}], "[{'name': 'pulse', 'value': '80'}]", True),
        ([{"name": "pulse"}], "[{'name': 'pulse', 'value': '80'}]", False),
        ([], "[]", True),
        (["a"], "['a', 'b']", False),
        ({}, "__import__('os').getcwd()", False),
        ([], "(" * 5000, False),
    ],
)
def test_stands_for(value, gold, expected):
    assert stands_for(value, gold) is expected


@pytest.mark.parametrize(
    ("completion", "reference", "strict"),
    [
        (call(RIGHT), True, True),
        (THINK + "<response> Hi. </response>", True, True),
        (call(RIGHT) + "\n<response> Hi. </response>", True, True),
        ("<think>t</think><tool_call>no JSON</tool_call>", True, True),
        ("Sure! " + call(RIGHT), True, False),
        (call(RIGHT) + " Done.", True, False),
        (THINK + "so" + call(RIGHT)[len(THINK) :], True, False),
        (THINK, False, False),
        ("", False, False),
        (call(RIGHT)[len(THINK) :], False, False),
        (THINK + "<response> Hi. </response>" + call(RIGHT)[len(THINK) :], False, False),
        (call(RIGHT)[len(THINK) :] + THINK, False, False),
        (THINK + THINK + "<response> Hi. </response>", False, False),
        (call(RIGHT) + call(RIGHT)[len(THINK) :], False, False),
        ("<think> no end <response> Hi. </response>", False, False),
        ("</think> t <think><response> Hi. </response>", False, False),
        ("<think> <response> Hi. </response> </think>", False, False),
        ("<think> a <tool_call> b </think><response> Hi. </tool_call> </response>", False, False),
    ],
)
def test_format(completion, reference, strict):
    assert score_completion(completion, GOLD, "reference").format is reference
    assert score_completion(completion, GOLD, "strict").format is strict


@pytest.mark.parametrize(
    ("completion", "reference", "strict"),
    [
        ("<think> " + "word " * 256 + "</think>", 0.5, 0.5),
        ("<think>" + "word " * 5000 + "</think>", 1.0, 1.0),
        ("<think> not closed", 0.0, 0.0),
        ("no tags at all", 0.0, 0.0),
        ("<think> " + "word " * 128 + "</think> <think> " + "word " * 256 + "</think>", 0.25, 0.5),
    ],
)
def test_length(completion, reference, strict):
    for protocol, expected in (("reference", reference), ("strict", strict)):
        score = score_completion(completion, GOLD, protocol)
        assert score.length == expected
        assert min(round(score.think_words / 512, 2), 1) == expected


PIECES = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<response>", "</response>", "\n", RIGHT, RIGHT[:-1]]
PIECES += [
    "null",
    "NaN",
    "[" * 2000,
    '"name parameters"',
    '["name", "parameters"]',
    "9" * 5000,
    "\ud800",
    "\u2028",
    "w ",
]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join))
def test_any_text_gets_a_score(completion):
    for protocol in ("strict", "reference"):
        score = score_completion(completion, GOLD, protocol)
        assert score.correct in (True, False)
        assert score.format in (True, False)
        assert 0.0 <= score.length <= 1.0


def make_rows(*levels: int) -> list[ApiBankRow]:
    counts: dict[int, int] = {}
    rows = []
    for level in levels:
        index = counts[level] = counts.get(level, -1) + 1
        rows.append(ApiBankRow(f"Level{level}_{index}", [{"role": "user", "content": str(index)}], level, GOLD))
    return rows


class TestSummary:
    rows = make_rows(1, 1, 1, 1, 2, 2, 3)
    predictions = {
        "Level1_0": {"completion": call(RIGHT), "finish_reason": "stop"},
        "Level1_1": {"completion": call(WRONG, RIGHT), "finish_reason": "length"},
        "Level1_2": {"completion": "", "error": "the prompt's 9 tokens fill the context window of 8"},
        "Level2_0": {"completion": call(RIGHT), "finish_reason": "stop"},
        "Level2_1": {"completion": "nothing", "finish_reason": "stop"},
        "Level3_0": {"completion": call(RIGHT), "finish_reason": "stop"},
    }

    def test_strict_counts_every_row(self):
        results, scores = score_predictions(self.rows, self.predictions, "strict")
        assert [results["levels"][level]["accuracy"] for level in "123"] == [25.0, 50.0, 100.0]
        overall = results["overall"]
        assert (overall["rows"], overall["scored"], overall["correct"]) == (7, 7, 3)
        assert overall["accuracy"] == overall["accuracy_all_rows"] == 42.86
        assert overall["format"] == 57.14
        assert (overall["missing"], overall["cut_off"]) == (2, 1)
        assert overall["reasons"] == {"correct": 3, "missing": 2, "several_calls": 1, "no_call": 1}
        assert [score["id"] for score in scores] == [row.id for row in self.rows]

    def test_reference_leaves_rows_without_a_completion_out(self):
        results, _ = score_predictions(self.rows, self.predictions, "reference")
        overall = results["overall"]
        assert (overall["rows"], overall["scored"], overall["correct"]) == (7, 5, 4)
        assert (overall["accuracy"], overall["accuracy_all_rows"]) == (80.0, 57.14)
        assert results["levels"]["1"]["accuracy"] == 100.0

    def test_an_error_of_null_is_none(self):
        predictions = {key: {"error": None, **record} for key, record in self.predictions.items()}
        for protocol in ("strict", "reference"):
            assert score_predictions(self.rows, predictions, protocol) == score_predictions(
                self.rows, self.predictions, protocol
            )

    def test_unknown_protocol(self):
        with pytest.raises(UsageError, match="strict, reference"):
            score_predictions(self.rows, self.predictions, "lenient")


def write_level(folder, level: int, answers: list) -> None:
    rows = [{"system": "Tools", "user": f"question {n}", "answer": answer} for n, answer in enumerate(answers)]
    (folder / f"level-{level}-api_processed.json").write_text(json.dumps(rows))


class TestCommand:
    @pytest.fixture
    def data(self, tmp_path):
        write_level(tmp_path, 1, [[GOLD], [GOLD], [GOLD]])
        write_level(tmp_path, 2, [GOLD])
        return tmp_path

    def test_scores_a_file_without_a_model(self, data, capsys):
        given = data / "given.jsonl"
        texts = {"Level1_0": call(RIGHT), "Level1_1": call(RIGHT, WRONG), "Level2_0": call(WRONG)}
        given.write_text("".join(json.dumps({"id": k, "completion": v}) + "\n" for k, v in texts.items()))
        command = ["eval", "api-bank", "--predictions", str(given), "--data", str(data), "--levels", "1,2"]
        assert main([*command, "--output", str(data / "strict")]) == 0
        assert main([*command, "--output", str(data / "reference"), "--protocol", "reference"]) == 0
        strict = json.loads((data / "strict" / "results.json").read_text())
        reference = json.loads((data / "reference" / "results.json").read_text())
        assert strict["overall"]["accuracy"] == 25.0
        assert reference["overall"]["accuracy"] == 66.67
        assert (strict["protocol"], reference["protocol"]) == ("strict", "reference")
        assert strict["versions"]["transformers"]
        assert strict["predictions"] == str(given)
        assert "no completion for 1 of 4 rows" in capsys.readouterr().out

    def test_writes_nothing_unasked(self, data, monkeypatch):
        (data / "given.jsonl").write_text(json.dumps({"id": "Level2_0", "completion": ""}))
        (data / "elsewhere").mkdir()
        monkeypatch.chdir(data / "elsewhere")
        before = sorted(data.rglob("*"))
        assert main(["eval", "api-bank", "--predictions", "../given.jsonl", "--data", str(data), "--levels", "2"]) == 0
        assert sorted(data.rglob("*")) == before

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ([], "Give --model, or --predictions"),
            (["--model", "m", "--predictions", "p"], "not both"),
            (["--predictions", "p", "--adapter", "a"], "--adapter goes with --model"),
            (["--model", "m", "--levels", "one"], "--levels is 'one'"),
            (["--model", "m", "--levels", "4"], "levels must be among"),
            (["--model", "m", "--limit", "0"], "limit is 0"),
            (["--model", "no/model", "--levels", "2"], "No model 'no/model'"),
            (["--model", "no/model", "--chat-template-kwargs", "{"], "--chat-template-kwargs is not valid JSON"),
            (["--model", "no/model", "--chat-template-kwargs", "[1]"], "--chat-template-kwargs is [1]; it must be"),
        ],
    )
    def test_mistakes_are_one_line(self, data, capsys, words, message):
        assert main(["eval", "api-bank", "--data", str(data), *words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("gd2po eval: ")
        assert message in error

    def test_output_that_is_a_file(self, data, capsys):
        file = data / "level-1-api_processed.json"
        (data / "given.jsonl").write_text(json.dumps({"id": "Level2_0", "completion": ""}))
        for source in (["--model", "no/model"], ["--predictions", str(data / "given.jsonl")]):
            for output in (file, file / "run"):
                command = ["eval", "api-bank", "--data", str(data), "--levels", "2", *source]
                assert main([*command, "--output", str(output)]) == 2
                assert f"but {file} is a file; give a folder" in capsys.readouterr().err

    def test_results_are_written_before_they_are_printed(self, data, monkeypatch):
        def closed(*args, **kwargs):
            raise BrokenPipeError

        monkeypatch.setattr("rich.console.Console.print", closed)
        (data / "given.jsonl").write_text(json.dumps({"id": "Level2_0", "completion": call(RIGHT)}))
        command = ["eval", "api-bank", "--predictions", str(data / "given.jsonl"), "--data", str(data)]
        monkeypatch.setattr("os.dup2", lambda *descriptors: None)  # which would silence the test run
        assert main([*command, "--levels", "2", "--output", str(data / "run")]) == 141
        assert json.loads((data / "run" / "results.json").read_text())["overall"]["correct"] == 1

    def test_data_are_required(self, capsys):
        assert main(["eval", "api-bank", "--model", "m"]) == 2
        assert "api_bank: no path given" in capsys.readouterr().err


class TestRealData:
    @pytest.fixture(scope="class")
    def rows(self, shared_dir):
        return load_rows(str(shared_dir / "data" / "api_bank"))

    def test_counts_and_limit(self, rows, shared_dir):
        assert [sum(row.level == level for row in rows) for level in (1, 2, 3)] == [399, 67, 131]
        assert len({row.id for row in rows}) == 597
        few = load_rows(str(shared_dir / "data" / "api_bank"), levels=[2, 3], limit=3)
        assert [row.id for row in few] == [f"Level{level}_{index}" for level in (2, 3) for index in range(3)]

    @pytest.mark.parametrize("protocol", ["strict", "reference"])
    def test_gold_answers_score_100_percent(self, rows, protocol):
        predictions = {row.id: {"completion": call(json.dumps(row.gold))} for row in rows}
        results, _ = score_predictions(rows, predictions, protocol)
        for summary in (*results["levels"].values(), results["overall"]):
            assert (summary["accuracy"], summary["format"]) == (100.0, 100.0)
            assert summary["correct"] == summary["rows"]

    def test_gold_answers_as_typed_values_score_100_percent_in_strict(self, rows):
        """Numbers, Booleans and lists where the gold text looks like them, all of which `reference` fails."""

        def typed(text):
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError):
                return text
            return text if isinstance(value, (str, tuple, set)) else value

        predictions, changed = {}, 0
        for row in rows:
            parameters = {key: typed(value) for key, value in row.gold["parameters"].items()}
            changed += parameters != row.gold["parameters"]
            predictions[row.id] = {
                "completion": call(json.dumps({"name": row.gold["name"], "parameters": parameters}))
            }
        strict, _ = score_predictions(rows, predictions, "strict")
        reference, _ = score_predictions(rows, predictions, "reference")
        assert strict["overall"]["accuracy"] == 100.0
        assert reference["overall"]["correct"] == len(rows) - changed < len(rows)

    def test_another_rows_answer_is_wrong(self, rows):
        answers = sorted({json.dumps(row.gold, sort_keys=True) for row in rows})
        neighbor = dict(zip(answers, [*answers[1:], answers[0]], strict=True))
        predictions = {row.id: {"completion": call(neighbor[json.dumps(row.gold, sort_keys=True)])} for row in rows}
        for protocol in ("strict", "reference"):
            assert score_predictions(rows, predictions, protocol)[0]["overall"]["correct"] == 0


class TestSeveralModels:
    @pytest.fixture
    def data(self, tmp_path):
        for level in (1, 2):
            rows = [{"system": "Tools: Book", "user": f"Book {n}", "answer": [GOLD], "other": None} for n in range(2)]
            (tmp_path / f"level-{level}-api_processed.json").write_text(json.dumps(rows))
        return tmp_path

    def results_file(self, folder, right: int, protocol="reference", words=3):
        """An evaluation with `right` of 4 rows right."""
        rows = [ApiBankRow(f"Level{1 + n // 2}_{n % 2}", [], 1 + n // 2, GOLD) for n in range(4)]
        texts = [
            "<think>" + " w" * words + "</think>\n" + call(RIGHT if n < right else WRONG)[len(THINK) :]
            for n in range(4)
        ]
        predictions = {row.id: {"id": row.id, "completion": text} for row, text in zip(rows, texts, strict=True)}
        results, _ = score_predictions(rows, predictions, protocol)
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps(results))

    def test_leaderboard(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "120")
        self.results_file(tmp_path / "runs" / "worst", 1)
        self.results_file(tmp_path / "runs" / "best" / "seed_1", 4, words=200)
        self.results_file(tmp_path / "runs" / "middle", 2)
        self.results_file(tmp_path / "runs" / "strict", 3, protocol="strict")
        (tmp_path / "runs" / "other").mkdir()
        (tmp_path / "runs" / "other" / "results.json").write_text('{"task": "safe-alignment"}')
        board_file = tmp_path / "board.json"
        assert main(["eval", "leaderboard", str(tmp_path / "runs"), "--output", str(board_file)]) == 0
        board = json.loads(board_file.read_text())
        assert list(board) == ["best/seed_1", "middle", "worst", "strict"]
        assert board["middle"]["overall"]["accuracy"] == 50 and board["middle"]["1"]["accuracy"] == 100
        assert board["middle"]["2"]["accuracy"] == 0 and board["middle"]["overall"]["format"] == 100
        assert board["best/seed_1"]["overall"]["think_words"] == 200
        assert board["best/seed_1"]["overall"]["length"] == pytest.approx(0.39)
        printed = capsys.readouterr().out
        assert printed.index("best/seed_1") < printed.index("worst") < printed.index("strict")

    @pytest.mark.parametrize("content", [None, "{", '{"task": "safe-alignment"}'])
    def test_nothing_to_rank(self, tmp_path, content, capsys):
        if content is not None:
            (tmp_path / "results.json").write_text(content)
        assert main(["eval", "leaderboard", str(tmp_path if content else tmp_path / "none")]) == 2
        assert str(tmp_path) in capsys.readouterr().err

    def test_one_call(self, data, tiny_policy, tmp_path, capsys):
        other = save_tiny_policy(tmp_path / "b" / tiny_policy.name, seed=3)
        words = ["eval", "api-bank", "--model", str(tiny_policy), str(other), "--data", str(data), "--levels", "1,2"]
        assert main([*words, "--max-new-tokens", "2", "--output", str(tmp_path / "out")]) == 0
        board = json.loads((tmp_path / "out" / "leaderboard.json").read_text())
        assert len(board) == 2 and all(name.endswith(f"_{tiny_policy.name}") for name in board)
        for name in board:
            lines = (tmp_path / "out" / name / "predictions.jsonl").read_text().splitlines()
            assert len(lines) == 4
        assert "API-Bank" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "words, message",
        [
            (["no/model"], "no/model"),
            (["same", "same"], "twice"),
            (["a", "b", "--adapter", "c"], "--adapter goes with one --model"),
        ],
    )
    def test_mistakes_come_before_the_first_model_runs(self, data, tiny_policy, tmp_path, capsys, words, message):
        models = words if "same" in words or "--adapter" in words else [str(tiny_policy), *words]
        command = ["eval", "api-bank", "--data", str(data), "--levels", "1", "--output", str(tmp_path / "out")]
        assert main([*command, "--model", *models]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
