"""What people bring: prompts that a template refuses, answers nobody can read, templates that open the thoughts."""

import json
import logging
import sys

import pytest
import yaml
from dataset_files import user, write
from datasets import Dataset
from recipe_stand_ins import GOLD
from tiny import letters_dataset, low_bytes, save_tiny_policy, spread_bytes, tiny_args
from transformers import AutoTokenizer

from gd2po_trl import GD2POTrainer
from gd2po_trl.cli import main
from gd2po_trl.datasets.prompts import opened_thoughts
from gd2po_trl.errors import UsageError
from gd2po_trl.evaluation.running import generate_predictions
from gd2po_trl.evaluation.scoring import compute_scores, resolve_rewards
from gd2po_trl.evaluation.settings import GenerationSettings
from gd2po_trl.rewards import load_reward, resolve_reward
from gd2po_trl.tasks.safe_alignment.evaluation import SafeAlignmentRow
from gd2po_trl.tasks.tool_calling.api_bank import ApiBankRow, score_predictions
from gd2po_trl.tasks.tool_calling.rewards import Correctness, correctness, format, length


def save_policy(folder, change_template):
    save_tiny_policy(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = change_template(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def strict_policy(tmp_path_factory):
    """As Gemma's: no system message, and content is text."""
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    return save_policy(tmp_path_factory.mktemp("strict_policy"), lambda template: refusal + template)


@pytest.fixture(scope="module")
def thinking_policy(tmp_path_factory):
    """As DeepSeek-R1's distilled models: the generation prompt opens the thoughts."""
    return save_policy(
        tmp_path_factory.mktemp("thinking_policy"),
        lambda template: template.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>\\n' }}"),
    )


def train(tmp_path, capsys, policy, data, command="train", **settings):
    """Exit status and what the command said last."""
    recipe = {
        "model_name_or_path": str(policy),
        "dataset": "prompts",
        "dataset_path": data,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 1,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        **settings,
    }
    if command == "train":
        recipe = {
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 4,
            "reward_funcs": ["length"],
            **recipe,
        }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    status = main([command, "--config", str(path)])
    return status, capsys.readouterr().err.strip().rpartition("\n")[2]


# Prompts that the chat template refuses


SYSTEM = [{"role": "system", "content": "Be brief."}, *user("hi")]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]


@pytest.mark.parametrize("limit", [None, 100])
@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (SYSTEM, ["System role not supported", "roles: system, user", "first user message"]),
        (PARTS, ["concatenate str", "list of parts"]),
        ([{"role": "user", "content": None}], ["roles: user, user", "content"]),
    ],
)
def test_the_chat_template_refuses_a_prompt(tmp_path, capsys, strict_policy, prompt, words, limit):
    # Row 2, so that the first rows are fine where the file allows it.
    plain = PARTS if prompt is PARTS else user("hi")
    rows = [{"prompt": plain if prompt is not PARTS else prompt} for _ in range(2)] + [{"prompt": prompt}] * 2
    if prompt[0]["content"] is None:
        rows = [{"prompt": user("hi")}] * 2 + [{"prompt": [*prompt, *user("x")]}] * 2
    data = write(tmp_path / "prompts.jsonl", rows)
    status, said = train(tmp_path, capsys, strict_policy, data, max_prompt_tokens=limit)
    row = 0 if prompt is PARTS else 2
    assert status == 2 and said.startswith("gd2po train: ") and f"row {row} of the data" in said
    assert all(word in said for word in words), said


@pytest.mark.parametrize("max_length", [None, 1024])
def test_the_chat_template_refuses_an_example(tmp_path, capsys, strict_policy, max_length):
    done = [{"role": "assistant", "content": "yo"}]
    rows = [{"prompt": user("hi"), "completion": done}, {"prompt": SYSTEM, "completion": done}]
    data = write(tmp_path / "rows.jsonl", rows)
    status, said = train(tmp_path, capsys, strict_policy, data, "sft", max_length=max_length)
    assert status == 2 and "row 1 of the data" in said and "System role not supported" in said


def test_the_chat_template_refuses_in_python(tmp_path, strict_policy):
    dataset = Dataset.from_dict({"prompt": [user("hi"), SYSTEM]})
    tokenizer = AutoTokenizer.from_pretrained(strict_policy)
    arguments = {"args": tiny_args(tmp_path), "train_dataset": dataset, "processing_class": tokenizer}
    with pytest.raises(ValueError, match=r"row 1 .*System role not supported"):
        GD2POTrainer("no/such-model", [low_bytes, spread_bytes], **arguments)


def test_the_chat_template_refuses_in_evaluation(tmp_path, capsys, strict_policy):
    data = write(tmp_path / "prompts.jsonl", [{"prompt": user("hi")}, {"prompt": SYSTEM}])
    output = ["--output", str(tmp_path / "eval"), "--max-new-tokens", "2"]
    options = ["--model", str(strict_policy), "--data", data, "--reward", "length", *output]
    assert main(["eval", "safe-alignment", *options]) == 2
    said = capsys.readouterr().err
    assert "row 1" in said and "System role not supported" in said


# Examples of a warm-up


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "p", "completion": "x"}, {"prompt": "p", "completion": None}], ["row 1", "`completion`", "None"]),
        ([{"prompt": "p", "completion": "x"}, {"prompt": "p", "completion": "  "}], ["row 1", "`completion`"]),
        ([{"prompt": "p", "completion": [{"role": "assistant", "content": "x"}]}], ["row 0", "text", "messages"]),
        ([{"prompt": user("p"), "completion": "x"}], ["row 0", "text", "messages"]),
        ([{"prompt": user("p"), "completion": []}], ["row 0", "`completion`"]),
        ([{"prompt": user("p"), "completion": user("x")}], ["row 0", "'user'", "'assistant'"]),
        ([{"prompt": "p", "completion": 3}], ["row 0", "`completion`", "3"]),
        ([{"prompt": user("p"), "completion": [{"role": "assistant", "text": "x"}]}], ["row 0", "`completion`"]),
    ],
)
def test_an_example_that_teaches_nothing_is_named(tmp_path, capsys, tiny_policy, rows, words):
    data = write(tmp_path / "rows.jsonl", rows)
    status, said = train(tmp_path, capsys, tiny_policy, data, "sft")
    assert status == 2 and all(word in said for word in words), said


def test_a_warm_up_without_a_full_batch(tmp_path, capsys, tiny_policy):
    data = write(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "x"}])
    settings = {"max_steps": -1, "dataloader_drop_last": True, "per_device_train_batch_size": 4}
    status, said = train(tmp_path, capsys, tiny_policy, data, "sft", **settings)
    assert status == 2 and "has 1 examples" in said and "dataloader_drop_last" in said


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"prompt": "a"}, {"prompt": None}, {"prompt": user("b")}], ["row 0", "row 2"]),
        ([{"prompt": "a", "images": None}, {"prompt": "b", "images": None}], ["`images`", "pictures"]),
    ],
)
def test_prompts_that_trl_would_take_for_others(tmp_path, capsys, tiny_policy, rows, words):
    data = write(tmp_path / "rows.jsonl", rows)
    status, said = train(tmp_path, capsys, tiny_policy, data)
    assert status == 2 and all(word in said for word in words), said


# Answers that no reward can read


HERMES = GOLD.replace('"parameters"', '"arguments"')
ANSWERS = {
    "hermes": HERMES,
    "bare call": '{"name": "f", "parameters": {}}',
    "list": '[{"name": "f", "parameters": {}}]',
    "not closed": "<think> t </think>\n<tool_call>\n",
    "other tags": "<tool_call>f(1)</tool_call>",
    "fence": '```json\n{"name": "f", "arguments": {"a": 1}}\n```',
    "Llama's tags": '<|python_tag|>{"name": "f", "parameters": {"a": 1}}',
    "empty": " \n",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=list(ANSWERS))
@pytest.mark.parametrize("reward", [correctness, format, Correctness(match="coarse")])
def test_answers_are_read_before_training(answer, reward, caplog):
    reward.check_data(Dataset.from_dict({"answer": [GOLD, "<response>hi</response>"]}), "training dataset")
    assert not caplog.records
    reward.check_data(Dataset.from_dict({"answer": [GOLD, answer, None]}), "training dataset")
    (record,) = caplog.records
    assert "2 of 3 answers" in record.message and "row 1" in record.message
    with pytest.raises(UsageError, match="2 of 2 answers in the column `answer` of the training dataset"):
        reward.check_data(Dataset.from_dict({"answer": [answer, answer]}), "training dataset")
    assert correctness(prompts=["p"], completions=[GOLD], answer=[answer]) == [None]


def test_a_data_set_without_calls_is_said(caplog):
    responses = Dataset.from_dict({"answer": ["<response>hi</response>", "text"]})
    format.check_data(responses, "training dataset")
    assert not caplog.records
    correctness.check_data(responses, "training dataset")
    assert "none of the 2 answers" in caplog.records[0].message


@pytest.mark.parametrize(("bad", "status"), [(2, 0), (4, 2)])
def test_unreadable_answers_in_a_recipe(tmp_path, capsys, caplog, tiny_policy, bad, status):
    rows = [{"prompt": f"call {index}", "answer": HERMES if index >= 4 - bad else GOLD} for index in range(4)]
    data = write(tmp_path / "rows.jsonl", rows)
    settings = {"reward_funcs": ["calls", "length"], "reward_kwargs": {"calls": {"type": "correctness"}}}
    with caplog.at_level(logging.WARNING):
        got, said = train(tmp_path, capsys, tiny_policy, data, **settings)
    assert got == status
    texts = [said, *(record.message for record in caplog.records)]
    assert any(f"{bad} of 4 answers" in text and "rename `arguments` to `parameters`" in text for text in texts), texts


# Templates that open the thoughts


LONG = GOLD.replace("<think> t", f"<think>{' word' * 128}")
REST = LONG.removeprefix("<think>")


def test_rewards_called_directly_see_what_they_are_given():
    arguments = {"prompts": ["p"], "completions": [REST]}
    assert format(**arguments, answer=[GOLD]) == [0.0] and length(**arguments) == [0.0]
    assert format(**arguments, answer=[GOLD], prefill=["<think>"]) == [1.0]
    assert length(**arguments, prefill=["<think>\n"]) == length(prompts=["p"], completions=[LONG]) == [0.25]
    # The tag a second time is one too many; thoughts that the prompt closed are empty ones.
    assert format(prompts=["p"], completions=[GOLD], answer=[GOLD], prefill=["<think>"]) == [0.0]
    answered = GOLD.partition("</think>")[2]
    closed = {"prompts": ["p"], "completions": [answered], "prefill": ["<think></think>"]}
    assert format(**closed, answer=[GOLD]) == [1.0] and length(**closed) == [0.0]


def test_what_prompts_open(tiny_policy, thinking_policy):
    plain, thinking = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_policy, thinking_policy))
    prompts = [user("hi"), user("Write <think>\n")]
    assert opened_thoughts(prompts, plain) == ["", ""] and opened_thoughts(prompts, thinking) == ["<think>"] * 2
    texts = ["Think: <think>\n", "Use <think></think>", "<think> first", "hi"]
    assert opened_thoughts(texts, plain) == ["<think>", "", "", ""]
    switch = plain.chat_template + "{% if not think %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    assert opened_thoughts(prompts[:1], plain, chat_template=switch, think=True) == [""]
    assert opened_thoughts(prompts[:1], plain, chat_template=switch, think=False) == ["<think></think>"]


class Scripted:
    """A rollout function that completes every prompt with one text."""

    def __init__(self, text):
        self.text = text

    def __call__(self, prompts, trainer):
        tokenizer = trainer.processing_class
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
            for prompt in prompts
        ]
        completion = [*tokenizer(self.text)["input_ids"], tokenizer.eos_token_id]
        return {"prompt_ids": ids, "completion_ids": [completion] * len(prompts), "logprobs": None}


@pytest.mark.parametrize("thinks", [True, False])
def test_training_counts_the_tag_that_the_template_opens(tmp_path, tiny_policy, thinking_policy, thinks):
    trainer = GD2POTrainer(
        str(thinking_policy if thinks else tiny_policy),
        [format, resolve_reward("thoughts", {"type": "length", "max_words": 4}), correctness],
        tiny_args(tmp_path, max_steps=1, max_completion_length=900),
        train_dataset=Dataset.from_dict({"prompt": [user("a"), user("b")], "answer": [GOLD, GOLD]}),
        rollout_func=Scripted(REST),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["rewards/format/mean"] == (1.0 if thinks else 0.0)
    assert log["rewards/thoughts/mean"] == (1.0 if thinks else 0.0)
    assert log["rewards/correctness/mean"] == 3.0


@pytest.mark.parametrize("protocol", ["strict", "reference"])
def test_api_bank_counts_the_tag_that_the_template_opens(tmp_path, tiny_policy, thinking_policy, protocol):
    gold = json.loads(GOLD.partition("<tool_call>\n")[2].partition("\n")[0])
    row = ApiBankRow("Level1_0", user("hi"), 1, gold)
    for policy, prefill in ((thinking_policy, "<think>"), (tiny_policy, None)):
        settings = GenerationSettings(str(policy), max_new_tokens=2)
        record = generate_predictions([row], settings, tmp_path / policy.name)[row.id]
        assert record.get("prefill") == prefill
        _, (score,) = score_predictions([row], {row.id: {**record, "completion": REST}}, protocol)
        assert score["correct"] and score["format"] == (prefill is not None)
        assert score["length"] == (0.0 if prefill is None else 0.25)


def test_safe_alignment_hands_rewards_the_opened_tag():
    row = SafeAlignmentRow("a/0", user("hi"), "a")
    record = {"id": row.id, "completion": "word " * 256 + "</think> done"}
    rewards = resolve_rewards({"length": {}})
    for given, expected in ((record, 0.0), ({**record, "prefill": "<think>"}, 0.5)):
        assert compute_scores([row], {"model": {row.id: given}}, rewards)["model"][row.id]["length"] == expected


# What else a run is told


def test_masked_completions_are_not_blamed_on_the_rewards(tmp_path, tiny_policy, caplog):
    settings = {"max_steps": 1, "mask_truncated_completions": True, "max_completion_length": 2}
    data = {"train_dataset": letters_dataset()}
    trainer = GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], tiny_args(tmp_path, **settings), **data)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (said,) = [record.message for record in caplog.records if "All advantages were zero" in record.message]
    assert "mask_truncated_completions" in said and "max_completion_length" in said
    assert "conflict_filter" not in said and "100%" not in said


# Rewards of one's own


MODULE = """
class Scorer:
    def __init__(self, path="weights", fails=None):
        self.path, self.loaded, self.fails = path, False, fails
        if fails == "at once":
            raise KeyError("weights")

    def load(self):
        if self.fails:
            raise RuntimeError("no weights here")
        self.loaded = True

    def unload(self):
        self.loaded = False

    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)

class Table:
    def load(self, path):
        raise AssertionError("not ours to call")

    def __call__(self, completions, **kwargs):
        return [1.0] * len(completions)

class Silent:
    pass
"""


@pytest.fixture
def own_rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in {
        "own_rewards": MODULE,
        "own_syntax": "def f(:\n",
        "own_name": "undefined\n",
        "own_exit": "exit()\n",
        "own_missing": "import not_there_at_all\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_class_keeps_its_early_load(own_rewards):
    for label in ("own_rewards.Scorer", "judge"):
        reward = resolve_reward(label, {"type": "own_rewards.Scorer", "path": "p"})
        instance = reward.__wrapped__
        load_reward(reward)
        assert instance.loaded and reward(completions=["a"]) == [1.0]
        reward.unload()
        assert not instance.loaded
    with pytest.raises(UsageError, match="'judge' cannot be loaded: RuntimeError: no weights here"):
        load_reward(resolve_reward("judge", {"type": "own_rewards.Scorer", "fails": "later"}))
    load_reward(resolve_reward("own_rewards.Table"))
    load_reward(low_bytes)


def test_a_class_is_loaded_before_the_first_generation(tmp_path, capsys, own_rewards, tiny_policy):
    data = write(tmp_path / "prompts.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    kwargs = {"judge": {"type": "own_rewards.Scorer", "fails": "later"}}
    status, said = train(tmp_path, capsys, tiny_policy, data, reward_funcs=["judge"], reward_kwargs=kwargs)
    assert status == 2 and "'judge'" in said and "no weights here" in said


@pytest.mark.parametrize(
    ("kind", "kwargs", "words"),
    [
        ("own_syntax.f", {}, ["own_syntax", "SyntaxError"]),
        ("own_name.f", {}, ["own_name", "NameError", "undefined"]),
        ("own_exit.f", {}, ["own_exit", "SystemExit"]),
        ("own_missing.f", {}, ["own_missing", "not_there_at_all"]),
        ("own_rewards.Nothing", {}, ["own_rewards", "`Nothing`"]),
        ("own_rewards.Scorer", {"fails": "at once"}, ["KeyError", "weights"]),
        ("own_rewards.Scorer", {"pth": "p"}, ["pth"]),
        ("own_rewards.Silent", {}, ["Silent", "__call__"]),
    ],
)
def test_a_reward_of_ones_own_that_cannot_be_made(own_rewards, kind, kwargs, words):
    with pytest.raises(UsageError) as error:
        resolve_reward("mine", {"type": kind, **kwargs})
    assert all(word in str(error.value) for word in ["'mine'", *words]), str(error.value)
