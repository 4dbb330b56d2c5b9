"""Recipes: reading, overriding, and the one clear error for everything that can be wrong in them."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gd2po_trl.cli import main
from gd2po_trl.cli.train import split_arguments
from gd2po_trl.errors import UsageError
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import find_recipe, recipe_path
from gd2po_trl.recipe.files import read_recipe_file
from gd2po_trl.rewards import resolve_reward
from gd2po_trl.training.sft import load_sft_recipe


CPU = {"use_cpu": True, "bf16": False, "output_dir": "outputs/x"}
MINIMAL = {"model_name_or_path": "some/model", "reward_funcs": ["correctness", "length"], **CPU}


@pytest.fixture
def write(tmp_path):
    def _write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return _write


def test_values_and_overrides(write):
    path = write({**MINIMAL, "learning_rate": "1e-5", "reward_kwargs": {"length": {"max_words": 64}}})
    recipe = load_recipe(
        path, ["--learning_rate", "2e-5", "--reward_weights", "1", "0.5", "--no_skip_zero_advantage_rows"]
    )
    assert recipe.training.learning_rate == 2e-5
    assert recipe.training.reward_weights == [1.0, 0.5]
    assert recipe.arguments.reward_kwargs == {"length": {"max_words": 64}}
    assert recipe.settings["learning_rate"] == 2e-5
    assert recipe.settings["skip_zero_advantage_rows"] is False
    assert load_recipe(path).training.learning_rate == 1e-5
    nested = load_recipe(path, ["--reward_kwargs", '{"length": {"max_words": 8}}'])
    assert nested.arguments.reward_kwargs["length"]["max_words"] == 8


def test_a_date_that_no_calendar_has(write):
    with pytest.raises(UsageError, match=r"not valid YAML.*month"):
        load_recipe(write("run_name: 2024-13-45"))


def test_values_that_yaml_reads_as_booleans(write):
    lines = "eval_strategy: no\nsave_strategy: no\nresume_from_checkpoint: yes\n"
    recipe = load_recipe(write(yaml.safe_dump(MINIMAL) + lines))
    assert recipe.training.eval_strategy == recipe.training.save_strategy == "no"
    assert recipe.training.resume_from_checkpoint == "latest"
    assert load_recipe(write({**MINIMAL, "resume_from_checkpoint": False})).training.resume_from_checkpoint is None


def test_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_recipe(write({**MINIMAL, "model_name_or_path": "~/x"})).model.model_name_or_path == "/home/someone/x"


@pytest.mark.parametrize(("written", "meant"), [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_as_in_trl(write, written, meant):
    assert load_recipe(write({**MINIMAL, "scale_rewards": written})).training.scale_rewards == meant


def test_bases_merge(write):
    write(
        {**MINIMAL, "num_generations": 4, "reward_kwargs": {"length": {"max_words": 9}, "correctness": {}}}, "a.yaml"
    )
    write({"num_generations": 16, "reward_kwargs": {"length": {"max_words": 3}}}, "sub/b.yaml")
    path = write({"base": ["a.yaml", "sub/b.yaml"], "beta": 0.1}, "c.yaml")
    merged = read_recipe_file(path)
    assert (merged["num_generations"], merged["beta"]) == (16, 0.1)
    assert merged["reward_kwargs"] == {"length": {"max_words": 3}, "correctness": {}}
    write({"base": "d.yaml"}, "d.yaml")
    with pytest.raises(UsageError, match="its own base"):
        read_recipe_file(path.parent / "d.yaml")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("grpo", ("sum_then_normalize", None, None)),
        ("gdpo", ("normalize_then_sum", None, None)),
        ("gd2po_hard", ("normalize_then_sum", "hard", "before_whitening")),
        ("gd2po_snr", ("normalize_then_sum", "snr", "before_whitening")),
    ],
)
def test_methods(write, method, expected):
    def fields(training):
        return training.multi_objective_aggregation, training.conflict_filter, training.consensus_weighting

    assert fields(load_recipe(write({**MINIMAL, "method": method})).training) == expected
    # The command line asks for another method: nothing of the recipe's own survives ...
    other = {**MINIMAL, "method": "gd2po_snr", "consensus_weighting": "after_whitening", "conflict_filter": "snr"}
    assert fields(load_recipe(write(other), ["--method", method]).training) == expected
    # ... but a key beside the method in the same place refines it.
    refined = load_recipe(write({**MINIMAL, "method": "gd2po_hard", "consensus_weighting": None}))
    assert fields(refined.training) == ("normalize_then_sum", "hard", None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rat": 1e-5}, ["learning_rat", "Did you mean `learning_rate`"]),
        ({"method": "gd3po"}, ["method", "gd3po", "gd2po_snr"]),
        ({"conflict_filter": "soft"}, ["conflict_filter", "soft", "'hard'"]),
        ({"snr_threshold": 2}, ["snr_threshold", "2"]),
        ({"snr_threshold": "high"}, ["snr_threshold", "high"]),
        ({"max_steps": "ten"}, ["max_steps", "ten"]),
        ({"max_steps": [3]}, ["max_steps", "[3]"]),
        ({"num_generations": 2.5}, ["num_generations", "2.5"]),
        ({"use_peft": 1}, ["use_peft", "1"]),
        ({"reward_funcs": "correctness"}, ["reward_funcs", "list"]),
        ({"reward_funcs": []}, ["reward_funcs"]),
        ({"reward_funcs": ["length", "length"]}, ["reward_funcs", "twice"]),
        ({"reward_weights": [1.0]}, ["reward_weights", "1 entries", "2 rewards"]),
        ({"reward_weights": [0.0, 0]}, ["reward_weights", "0"]),
        ({"reward_weights": [1.0, "x"]}, ["reward_weights", "'x'"]),
        ({"reward_weights": [1.0, float("nan")]}, ["reward_weights", "nan"]),
        ({"reward_kwargs": [1]}, ["reward_kwargs"]),
        ({"reward_kwargs": {"length": 3}}, ["reward_kwargs.length", "int"]),
        ({"model_name_or_path": None}, ["model_name_or_path"]),
        ({"long_prompts": "shorten"}, ["long_prompts", "shorten"]),
        ({"max_prompt_tokens": 0}, ["max_prompt_tokens"]),
        ({"num_generations": 1}, ["num_generations", "1"]),
        ({"env": {"A": "b"}}, ["env"]),
        ({"trust_remote_code": True}, ["trust_remote_code", "command line"]),
        ({"model_init_kwargs": {"trust_remote_code": True}}, ["model_init_kwargs.trust_remote_code"]),
        ({"model_init_kwargs": {"use_kernels": True}}, ["model_init_kwargs.use_kernels"]),
        ({"model_init_kwargs": '{"trust_remote_code": true}'}, ["model_init_kwargs.trust_remote_code"]),
        ({"reward_funcs": [{"a": 1}]}, ["reward_funcs", "labels"]),
        ({"dataset_kwargs": {"split": "test"}}, ["dataset_kwargs", "`dataset_split`"]),
        ({"eval_dataset_kwargs": {"path": "x"}}, ["eval_dataset_kwargs", "`eval_dataset_path`"]),
        ({"loss_type": "gpro"}, ["loss_type", "'gpro'", "'grpo'"]),
        ({"importance_sampling_level": "word"}, ["importance_sampling_level", "'sequence'"]),
        ({"temperature": 0}, ["temperature", "positive"]),
        ({"learning_rate": -1}, ["learning_rate", "negative"]),
        ({"num_iterations": 0}, ["num_iterations", "at least 1"]),
        ({"attn_implementation": "someone/kernel"}, ["attn_implementation", "command line"]),
        ({"reward_timeout": -1}, ["reward_timeout", "-1"]),
    ],
    ids=str,
)
def test_one_error_names_the_key(write, change, words):
    with pytest.raises(UsageError) as error:
        load_recipe(write({**MINIMAL, **change}))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["mapping"]),
        ("- a\n- b\n", ["mapping"]),
        ("a: [1,\n", ["not valid YAML"]),
        ("beta: 0\nbeta: 1\n", ["`beta` occurs twice"]),
        ("x: !!python/object/apply:os.system ['true']\n", ["not valid YAML"]),
        ("base: nowhere.yaml\n", ["nowhere.yaml", "No such file"]),
        ("base: 3\n", ["base"]),
    ],
)
def test_broken_files(write, content, words):
    path = write(content)
    with pytest.raises(UsageError) as error:
        load_recipe(path)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--learning_rat", "1"], ["--learning_rat", "learning_rate"]),
        (["--max_steps", "x"], ["max_steps", "x"]),
        (["--method"], ["method"]),
        (["--reward_kwargs", "{"], ["reward_kwargs", "JSON"]),
        (["stray"], ["stray"]),
    ],
)
def test_wrong_options(write, arguments, words):
    with pytest.raises(UsageError) as error:
        load_recipe(write(MINIMAL), arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_secrets_are_not_kept(write):
    recipe = load_recipe(write(MINIMAL), ["--hub_token", "hf_secret"])
    assert "hf_secret" not in str(recipe.settings)
    rewards = {"length": {"type": "remote_scorer", "url": "http://x", "headers": {"Authorization": "Bearer hf_s"}}}
    recipe = load_recipe(write({**MINIMAL, "reward_kwargs": rewards}))
    assert recipe.arguments.reward_kwargs["length"]["headers"] and "hf_s" not in str(recipe.settings)


def test_secrets_in_nested_settings_are_not_kept(write):
    rewards = {1: {}, "judge": {"type": "x.y", "token": "hf_s", "servers": [{"url": "a", "api_key": "hf_s"}]}}
    recipe = load_recipe(write({**MINIMAL, "reward_kwargs": rewards, "model_init_kwargs": {"token": "hf_s"}}))
    assert "hf_s" not in str(recipe.settings) and recipe.settings["reward_kwargs"]["judge"]["servers"] == [
        {"url": "a"}
    ]
    assert recipe.training.model_init_kwargs == {"token": "hf_s"}


def test_tokens_of_the_vocabulary_are_no_secrets(write):
    recipe = load_sft_recipe(write({"model_name_or_path": "some/model", "eos_token": "<|end|>", **CPU}))
    assert recipe.settings["eos_token"] == "<|end|>"


scalars = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(-2, 2), st.text(max_size=5))
values = st.one_of(scalars, st.lists(scalars, max_size=2), st.dictionaries(st.text(max_size=3), scalars, max_size=2))


@settings(max_examples=60, deadline=None)
@given(
    key=st.sampled_from(
        ["conflict_filter", "snr_threshold", "consensus_weighting", "whitening", "whitening_shift_mean"]
        + ["skip_zero_advantage_rows", "reward_timeout", "scale_rewards", "multi_objective_aggregation", "method"]
        + ["reward_weights", "reward_funcs", "reward_kwargs", "dataset_kwargs", "long_prompts", "max_prompt_tokens"]
    ),
    value=values,
)
def test_any_value_is_taken_or_refused_by_name(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, key: value}))
    try:
        recipe = load_recipe(path)
    except UsageError as error:
        assert key in str(error), str(error)
        assert "\n" not in str(error)
    else:
        assert 0 <= recipe.training.snr_threshold <= 1
        assert key in recipe.settings


# Rewards by name


def brevity(completions, *, scale=1.0, **kwargs):
    return [-scale * len(completion) for completion in completions]


async def patience(completions, **kwargs):
    return [1.0] * len(completions)


class Counting:
    def __init__(self, *, start=0):
        if start < 0:
            raise ValueError("`start` must not be negative.")
        self.start = start

    def __call__(self, completions, **kwargs):
        return [self.start + index for index, _ in enumerate(completions)]


def test_rewards_by_name(tiny_reward_model):
    short = resolve_reward("short", {"type": f"{__name__}.brevity", "scale": 2.0})
    assert short.__name__ == "short" and short(prompts=["", ""], completions=["ab", ""]) == [-4.0, 0.0]
    count = resolve_reward("count", {"type": f"{__name__}.Counting", "start": 3})
    assert count.__name__ == "count" and count(prompts=[""], completions=["x"]) == [3]
    waiting = resolve_reward("waiting", {"type": f"{__name__}.patience"})
    import inspect

    assert inspect.iscoroutinefunction(waiting)
    assert resolve_reward(str(tiny_reward_model)) == str(tiny_reward_model)
    assert resolve_reward("helpful", {"type": str(tiny_reward_model)}) == str(tiny_reward_model)


@pytest.mark.parametrize(
    ("label", "kwargs", "words"),
    [
        ("corectness", {}, ["corectness", "Did you mean 'correctness'"]),
        ("x", {"type": "no_such_module.reward"}, ["no_such_module"]),
        ("x", {"type": f"{__name__}.missing"}, ["missing"]),
        ("x", {"type": f"{__name__}.MINIMAL"}, ["not a function"]),
        ("x", {"type": f"{__name__}.brevity", "factor": 2}, ["x", "factor", "scale"]),
        ("x", {"type": f"{__name__}.brevity", "scal": 2}, ["x", "Did you mean `scale`"]),
        ("x", {"type": f"{__name__}.brevity", "completions": []}, ["x", "completions"]),
        ("x", {"type": f"{__name__}.Counting", "start": -1}, ["x", "start"]),
        ("x", {"type": f"{__name__}.Counting", "begin": 1}, ["x", "begin"]),
        ("x", {"type": "some/model", "sign": -1}, ["x", "sign", "reward_model"]),
        ("x", {"type": 3}, ["x", "3"]),
    ],
)
def test_unknown_rewards(label, kwargs, words):
    with pytest.raises(UsageError) as error:
        resolve_reward(label, kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def strict(completions, prompts):
    return [0.0] * len(completions)


# The command


def test_mistakes_on_the_command_line(write, capsys):
    assert main(["trian"]) == 2
    assert "Did you mean 'train'" in capsys.readouterr().err
    assert main([]) == 0 and "train" in capsys.readouterr().out
    assert main(["train"]) == 2
    assert main(["train", "--config", "nowhere.yaml"]) == 2
    assert "nowhere.yaml" in capsys.readouterr().err
    path = write({**MINIMAL, "model_name_or_path": "outputs/no/such/model"})
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "outputs/no/such/model" in error and len(error.strip().splitlines()) == 1


@pytest.fixture
def runnable(write, tiny_policy, tmp_path):
    data = tmp_path / "train.jsonl"
    gold = '<think> t </think>\\n<tool_call>\\n{\\"name\\": \\"f\\", \\"parameters\\": {\\"a\\": 1}}\\n</tool_call>'
    data.write_text("".join(f'{{"prompt": "call f {n}", "answer": "{gold}"}}\n' for n in range(16)))
    return {
        **MINIMAL,
        "method": "gd2po_hard",
        "model_name_or_path": str(tiny_policy),
        "dataset": "prompts",
        "dataset_path": str(data),
        "output_dir": str(tmp_path / "run"),
        "reward_funcs": ["spread", "low"],
        "reward_kwargs": {"spread": {"type": "tiny.spread_bytes"}, "low": {"type": "tiny.low_bytes"}},
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "gradient_checkpointing": False,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
        "learning_rate": 1e-2,
    }


def test_train_writes_model_recipe_and_state_and_resumes(write, runnable, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = write({**runnable, "use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]})
    assert main(["train", "--config", str(path), "--seed", "3"]) == 0
    run = tmp_path / "run"
    assert (run / "adapter_model.safetensors").is_file() and (run / "trainer_state.json").is_file()
    written = yaml.safe_load((run / "recipe.yaml").read_text())
    assert written["seed"] == 3 and written["conflict_filter"] == "hard" and written["max_steps"] == 2

    # What was written repeats and resumes the run.
    assert (
        main(["train", "--config", str(run / "recipe.yaml"), "--max_steps", "4", "--resume_from_checkpoint", "latest"])
        == 0
    )
    state = yaml.safe_load((run / "trainer_state.json").read_text())
    steps = [entry["step"] for entry in state["log_history"] if "reward" in entry]
    assert steps == [1, 2, 3, 4]

    model = AutoModelForCausalLM.from_pretrained(runnable["model_name_or_path"])
    model.load_adapter(str(run))
    tokenizer = AutoTokenizer.from_pretrained(run)
    output = model.generate(**tokenizer("call f", return_tensors="pt"), max_new_tokens=4)
    assert output.shape[1] > 6 and torch.isfinite(model(output).logits).all()


def test_tool_calling_rewards_in_a_recipe(write, runnable, capsys):
    path = write({**runnable, "reward_funcs": ["correctness", "format", "length"], "save_strategy": "no"})
    assert main(["train", "--config", str(path), "--max_steps", "1"]) == 0
    # What was read is said.
    assert "16" in capsys.readouterr().err


def test_missing_column_is_found_before_training(write, runnable, tmp_path, capsys):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a"}\n' * 8)
    path = write({**runnable, "reward_funcs": ["correctness"], "dataset_path": str(tmp_path / "bare.jsonl")})
    assert main(["train", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert "'correctness' needs the dataset column `answer`" in error and "Traceback" not in error


def test_a_policy_of_python_code_needs_a_word_on_the_command_line(write, runnable, tiny_policy, tmp_path, capsys):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    config = json.loads((policy / "config.json").read_text())
    classes = {"AutoConfig": "of_our_own.OwnConfig", "AutoModelForCausalLM": "of_our_own.OwnForCausalLM"}
    (policy / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": classes}))
    (policy / "of_our_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    path = write({**runnable, "model_name_or_path": str(policy), "save_strategy": "no", "max_steps": 1})
    assert main(["train", "--config", str(path)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err
    assert main(["train", "--config", str(path), "--trust_remote_code"]) == 0


def test_a_second_run_does_not_touch_the_checkpoints_of_the_first(write, runnable, tmp_path, capsys):
    path = write(runnable)
    assert main(["train", "--config", str(path)]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert main(["train", "--config", str(path), "--seed", "2", "--max_steps", "1"]) == 2
    assert "holds checkpoints of another run" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before
    assert main(["train", "--config", str(path), "--resume_from_checkpoint", "latest"]) == 0


def break_weights(policy):
    (policy / "model.safetensors").write_bytes((policy / "model.safetensors").read_bytes()[:1000])


def break_tokenizer(policy):
    (policy / "tokenizer.json").write_text("{")


@pytest.mark.parametrize(
    "damage", [break_weights, break_tokenizer, lambda policy: (policy / "model.safetensors").unlink()]
)
def test_a_damaged_policy_is_one_line(write, runnable, tiny_policy, tmp_path, capsys, damage):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    damage(policy)
    path = write({**runnable, "model_name_or_path": str(policy)})
    capsys.readouterr()
    assert main(["train", "--config", str(path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


UNREACHABLE = {"type": "remote_scorer", "template": "{prompt} {response}", "url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval_on_start": True}, ["eval_on_start", "eval_dataset"]),
        ({"output_dir": __file__}, ["output_dir", "cannot be written to"]),
        ({"reward_funcs": ["judge"], "reward_kwargs": {"judge": UNREACHABLE}}, ["judge", "127.0.0.1:9"]),
    ],
)
def test_what_cannot_be_trained_is_one_line(write, runnable, capsys, changes, words):
    assert main(["train", "--config", str(write({**runnable, **changes}))]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words), error


def silent(completions, **kwargs):
    return [float("nan")] * len(completions)


def test_nothing_is_silent(write, runnable, caplog):
    """A reward that scores nothing, and an evaluation set that nothing evaluates."""
    from gd2po_trl.training import run_recipe

    changes = {"reward_funcs": ["spread", f"{__name__}.silent"], "eval_dataset_path": runnable["dataset_path"]}
    run_recipe(load_recipe(write({**runnable, **changes, "max_steps": 1, "save_strategy": "no"})))
    messages = [record.getMessage() for record in caplog.records]
    assert sum("test_recipe.silent' scored no completion" in message for message in messages) == 1
    assert sum("`eval_dataset_path` is set and nothing is evaluated" in message for message in messages) == 1


def test_conversations_need_a_chat_template(write, runnable, tiny_policy, tmp_path, capsys):
    policy = tmp_path / "policy"
    shutil.copytree(tiny_policy, policy)
    (policy / "chat_template.jinja").unlink()
    message = '{"prompt": [{"role": "user", "content": "call f"}], "answer": ""}\n'
    (tmp_path / "messages.jsonl").write_text(message * 8)
    data = {"model_name_or_path": str(policy), "dataset_path": str(tmp_path / "messages.jsonl")}
    assert main(["train", "--config", str(write({**runnable, **data}))]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_runs_as_a_module(write, runnable):
    path = write({**runnable, "save_strategy": "no", "max_steps": 1})
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "-m",
        "gd2po_trl.cli",
        "train",
        "--config",
        str(path),
    ]
    import os
    from pathlib import Path

    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The policy, its recipe and its log are in" in done.stdout


# Where a recipe is found


def test_the_recipe_is_the_first_word_a_folder_or_a_name(write, tmp_path, monkeypatch):
    path = write(MINIMAL, "my_task/recipe.yaml")
    monkeypatch.chdir(tmp_path)
    for words in (["my_task"], ["my_task/recipe.yaml"], ["--config", "my_task"], ["--config=my_task/recipe.yaml"]):
        recipe, others = split_arguments([*words, "--seed", "3"], "gd2po train")
        loaded = load_recipe(recipe, others)
        assert loaded.training.seed == 3 and loaded.path.resolve() == path.resolve()
    name = "tool_calling/Qwen2.5-1.5B-Instruct/lora"
    for written in (name, f"{name}.yaml", f"recipes/{name}.yaml"):
        assert find_recipe(written).samefile(recipe_path(name))
    assert split_arguments(["--seed", "3"], "gd2po train") == (None, ["--seed", "3"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["my_tsk"], "Did you mean 'my_task'?"),
        (["my_task/recip.yaml"], "Did you mean 'my_task/recipe.yaml'?"),
        (["empty"], "holds no recipe.yaml"),
        (["tool_calling/Qwen2.5-1.5B-Instruct/lor"], "Did you mean 'tool_calling/Qwen2.5-1.5B-Instruct/lora'?"),
        (["--config"], "--config"),
        (["my_task", "--config", "my_task"], "two recipes"),
        (["--seed", "1", "my_task/recipe.yaml"], "comes first"),
        (["learning_rate=1"], "--learning_rate"),
        (["--learning_rate", "1"], "No recipe was given"),
        ([], "gd2po recipes new"),
    ],
    ids=str,
)
def test_what_was_meant_by_a_recipe_that_is_not_there(write, tmp_path, monkeypatch, capsys, words, said):
    write(MINIMAL, "my_task/recipe.yaml")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) == 1, error


def test_a_recipe_of_the_other_command(write):
    with pytest.raises(UsageError, match="one of `gd2po train`"):
        load_sft_recipe(write({**MINIMAL, "num_generations": 4}))
    with pytest.raises(UsageError, match="one of `gd2po sft`"):
        load_recipe(write({"model_name_or_path": "some/model", **CPU, "max_length": 9}))


@pytest.mark.parametrize("command", ["train", "sft"])
def test_help_fits_one_screen(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", ["my_task", "tasks/my_own"])
def test_a_new_recipe_trains_as_it_is(tiny_policy, tmp_path, monkeypatch, capsys, name):
    """What `gd2po recipes new` makes, on a tiny policy; every key stands under its explanation."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["recipes", "new", name]) == 0
    words = f"--model_name_or_path {tiny_policy} --use_cpu --no_bf16 --dtype float32 --max_steps 1".split()
    assert main(["train", name, *words, "--max_completion_length", "8"]) == 0
    written = yaml.safe_load((tmp_path / "outputs" / name / "recipe.yaml").read_text())
    assert written["reward_kwargs"]["brevity"]["type"] == f"{name.replace('/', '.')}.rewards.brevity"
    assert (tmp_path / "outputs" / name / "completions").is_dir()
    lines = (tmp_path / name / "recipe.yaml").read_text().splitlines()
    keys = [index for index, line in enumerate(lines) if line[:1].isalpha()]
    assert keys and all(lines[index - 1].startswith("#") for index in keys)
    capsys.readouterr()
    assert main(["recipes", "new", name]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["my-task", "2rewards", "json", "class", "../outside", "/absolute"])
def test_a_name_under_which_rewards_cannot_be_imported(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "new", name]) == 2
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in capsys.readouterr().err
