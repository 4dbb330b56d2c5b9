"""BFCL: questions in ToolRL's prompt, and completions in the form that bfcl-eval's checker reads."""

import json

import pytest
from tiny import save_tiny_policy

from gd2po_trl.cli import main
from gd2po_trl.tasks.tool_calling.bfcl import load_rows, read_calls


SYSTEM = (
    "Use tools.\n1. Name: old\nDescription: Gone.\nParameters: {}\n\n**Steps for Each Turn**\n1. **Think:** first.\n"
)
AREA = {
    "name": "shape.area",
    "description": "Area.",
    "parameters": {
        "type": "dict",
        "properties": {"side": {"type": "ArrayList", "items": {"type": "long"}}, "unit": {"type": "String"}},
        "required": ["side"],
    },
}
CALL = '{"name": "shape.area", "parameters": {"side": [1, 2], "unit": "\\ud800"}}'


@pytest.fixture
def data(tmp_path):
    """Three questions of BFCL's form, and a row of rlla_4k's."""
    for category, asked in (("simple_python", 2), ("simple_java", 1)):
        turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "How large?"}]
        questions = [
            {"id": f"{category}_{index}", "question": [turns], "function": [AREA, {**AREA, "name": "other"}]}
            for index in range(asked)
        ]
        text = "".join(json.dumps(question) + "\n" for question in questions)
        (tmp_path / f"BFCL_v4_{category}.json").write_text(text)
    prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "a question"}]
    (tmp_path / "rlla.jsonl").write_text(json.dumps({"prompt": prompt, "answer": "<response> Hi. </response>"}))
    return tmp_path


def command(data, *words):
    options = ["--data", str(data), "--prompts", str(data / "rlla.jsonl"), "--output", str(data / "run")]
    return ["eval", "bfcl", "--categories", "simple_python,simple_java", *options, *words]


def results_of(data, category):
    file = data / "run" / "result" / "Salesforce_xLAM-2-1b-fc-r" / f"BFCL_v4_{category}_result.json"
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_prompts_are_those_of_the_training_rows(data):
    python, _, java = load_rows(str(data), ["simple_python", "simple_java"], prompts=str(data / "rlla.jsonl"))
    system, user = (message["content"] for message in python.prompt)
    before, after = SYSTEM.split("1. Name: old\nDescription: Gone.\nParameters: {}")
    assert system.startswith(before + "1. Name: shape.area\nDescription: Area.") and system.endswith(after)
    assert "\n2. Name: other\n" in system and "old" not in system
    assert user.endswith("\n<system> Short. </system>\n<user> How large? </user>")
    schemas = [
        json.loads(row.prompt[0]["content"].partition("Parameters: ")[2].partition("\n")[0]) for row in (python, java)
    ]
    assert schemas[0] == {
        "side": {"type": "ArrayList", "items": {"type": "long"}},
        "unit": {"type": "String", "optional": True},
    }
    # The checker reads arguments of Java and JavaScript from text.
    assert [schema["type"] for schema in schemas[1].values()] == ["string", "string"]
    assert "ArrayList" in schemas[1]["side"]["description"] and "items" not in schemas[1]["side"]


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (f"<think> <tool_call> </think>\n<tool_call>\n{CALL}\n{CALL}\n</tool_call>", "calls"),
        (f"<think> t </think>\n{CALL}", "no_call"),
        (f"<tool_call>\n[{CALL}]\n</tool_call>", "malformed"),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "malformed"),
        ("<tool_call>\n\n</tool_call>", "malformed"),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", "malformed"),
        ("", "no_call"),
    ],
)
def test_calls_of_a_completion(completion, reason):
    calls, found = read_calls(completion)
    assert found == reason
    assert [call["name"] for call in calls] == ["shape.area"] * 2 * (reason == "calls")


def test_result_files_of_given_completions(data):
    given = data / "given.jsonl"
    texts = {"simple_python_1": f"<tool_call>\n{CALL}\n</tool_call>", "simple_java_0": "no call"}
    given.write_text("".join(json.dumps({"id": key, "completion": text}) + "\n" for key, text in texts.items()))
    assert main(command(data, "--predictions", str(given))) == 0
    (line,) = results_of(data, "simple_python")  # no line for the question without a completion
    assert line["id"] == "simple_python_1"
    assert json.loads(line["result"]) == [{"name": "shape.area", "arguments": {"side": [1, 2], "unit": "?"}}]
    assert results_of(data, "simple_java") == [{"id": "simple_java_0", "result": ""}]
    counts = json.loads((data / "run" / "results.json").read_text())["categories"]
    assert counts["simple_python"] == {"calls": 1, "no_call": 0, "malformed": 0, "missing": 1, "cut_off": 0}

    given.write_text(json.dumps({"id": "simple_python_0", "completion": ""}))
    assert main(command(data, "--predictions", str(given))) == 0
    with pytest.raises(FileNotFoundError):  # an empty file would stop the checker, a stale one mislead it
        results_of(data, "simple_java")


def test_a_policy_answers_and_goes_on_after_a_kill(data):
    policy = save_tiny_policy(data / "policy")
    words = command(data, "--model", str(policy), "--max-new-tokens", "4", "--batch-size", "2")
    assert main(words) == 0
    whole = (data / "run" / "predictions.jsonl").read_text()
    assert [line["id"] for line in results_of(data, "simple_python")] == ["simple_python_0", "simple_python_1"]
    (data / "run" / "predictions.jsonl").write_text(whole.splitlines(keepends=True)[0])
    assert main(words) == 0
    assert (data / "run" / "predictions.jsonl").read_text() == whole


@pytest.mark.parametrize(
    "words",
    [
        ["--categories", "simple"],
        ["--categories", "multiple"],  # no such file
        ["--limit", "0"],
        ["--prompts", "BFCL_v4_simple_python.json"],
    ],
)
def test_mistakes_are_one_line(data, capsys, monkeypatch, words):
    monkeypatch.chdir(data)
    assert main(command(data, "--model", "no/model", *words)) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("gd2po eval: ")
    assert not (data / "run").exists()
