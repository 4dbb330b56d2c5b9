"""What a recipe's values mean: null, numbers with exponents, merge keys, layers, ranges, and other trainers' names."""

from dataclasses import MISSING, fields

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from trl import ModelConfig

from gd2po_trl import GD2POConfig
from gd2po_trl.errors import UsageError
from gd2po_trl.gd2po_config import METHODS
from gd2po_trl.recipe import RecipeArguments, load_recipe
from gd2po_trl.recipe.files import METHOD_FIELDS, dump_recipe, merge_layers, read_recipe_file
from gd2po_trl.recipe.keys import ELSEWHERE, OTHER_NAMES, REMARKS, SECTIONS, suggestion
from gd2po_trl.recipe.values import RANGES
from gd2po_trl.training.sft import KINDS, load_sft_recipe


RL_KINDS = (RecipeArguments, GD2POConfig, ModelConfig)
RL_FIELDS = {item.name: item for kind in RL_KINDS for item in fields(kind) if item.init}
SFT_FIELDS = {item.name: item for kind in KINDS for item in fields(kind) if item.init}
POLICY = {"model_name_or_path": "some/model", "use_cpu": True, "bf16": False, "output_dir": "outputs/x"}
MINIMAL = {**POLICY, "reward_funcs": ["correctness", "length"]}


@pytest.fixture
def write(tmp_path):
    def _write(content, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return _write


# Null


def refused_or_taken(load, path, key):
    try:
        return load(path)
    except UsageError as error:
        assert f"`{key}`" in str(error) and "\n" not in str(error), str(error)
        return None


@pytest.mark.parametrize("command", ["train", "sft"])
def test_null_is_taken_where_trl_takes_it_and_else_refused_by_name(write, command):
    known, load, base = (
        (RL_FIELDS, load_recipe, MINIMAL) if command == "train" else (SFT_FIELDS, load_sft_recipe, POLICY)
    )
    refused = set()
    for key, item in known.items():
        recipe = refused_or_taken(load, write({**base, key: None}), key)
        if recipe is None:
            refused.add(key)
            assert item.default is not None or key in ("reward_funcs", "model_name_or_path"), key
    assert {"learning_rate", "seed", "max_steps", "weight_decay", "num_train_epochs", "optim", "lora_r"} <= refused
    assert not {"max_grad_norm", "report_to", "min_p", "max_length", "eval_steps", "dtype"} & refused
    if command == "train":
        assert {"beta", "num_generations", "max_completion_length", "temperature", "dataset"} <= refused


@pytest.mark.parametrize("word", [None, "null", "None", "none"])
def test_no_gradient_norm_is_no_clipping(write, word):
    assert load_recipe(write({**MINIMAL, "max_grad_norm": word})).training.max_grad_norm == 0
    if word is not None:
        assert load_recipe(write(MINIMAL), ["--max_grad_norm", word]).training.max_grad_norm == 0


def test_null_on_the_command_line(write):
    path = write({**MINIMAL, "max_prompt_tokens": 8, "reward_weights": [1, 2], "dataset_path": "x", "min_p": 0.1})
    words = "--max_prompt_tokens none --reward_weights None --dataset_path null --min_p none".split()
    recipe = load_recipe(path, words)
    assert (recipe.arguments.max_prompt_tokens, recipe.training.reward_weights) == (None, None)
    assert (recipe.arguments.dataset_path, recipe.training.min_p) == (None, None)
    assert load_recipe(path, ["--report_to", "none"]).training.report_to == []


# Numbers


EXPONENTS = {"1e-7": 1e-7, "1e0": 1.0, "2E3": 2000.0, "1.5e3": 1500.0, "-.5e-3": -0.0005, "+1.e2": 100.0}


@pytest.mark.parametrize(("written", "number"), EXPONENTS.items())
def test_a_number_with_an_exponent_is_one_at_any_depth(write, written, number):
    text = f"a: {{b: {written}, c: [{written}, {{d: {written}}}]}}\ne: {written}\n"
    assert read_recipe_file(write(text)) == {"a": {"b": number, "c": [number, {"d": number}]}, "e": written}


def test_exponents_where_they_are_used(write):
    text = yaml.safe_dump(MINIMAL) + (
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\nreward_weights: [1, 1e-1]\n"
        "generation_kwargs: {repetition_penalty: 1e0}\nreward_kwargs: {length: {max_words: 1E1}}\n"
        'learning_rate: 1e-5\nrun_name: 1e5\nmodel_init_kwargs: {revision: "12e4"}\nmodel_revision: 12e4\n'
    )
    recipe = load_recipe(write(text))
    training = recipe.training
    assert (training.lr_scheduler_kwargs, training.reward_weights) == ({"min_lr": 1e-7}, [1, 0.1])
    assert training.generation_kwargs == {"repetition_penalty": 1.0}
    assert recipe.arguments.reward_kwargs["length"] == {"max_words": 10.0}
    # A top-level key is what its field is: also the text that only looks like a number.
    assert (training.learning_rate, training.run_name, recipe.model.model_revision) == (1e-5, "1e5", "12e4")
    assert training.model_init_kwargs == {"revision": "12e4"}


# PyYAML folds some kinds of white space.
characters = st.characters(exclude_categories=["C", "Z"])
texts = st.text(characters, max_size=6) | st.from_regex(
    r"[-+]?\.?[0-9]{1,3}\.?[0-9]?[eE][-+]?[0-9]{1,2}", fullmatch=True
)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts
contents = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))


@settings(max_examples=100, deadline=None)
@given(value=contents)
def test_what_is_written_is_read_again(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "again.yaml"
    path.write_text(dump_recipe({"key": [value]}), encoding="utf-8")
    assert read_recipe_file(path) == {"key": [value]}


# Merge keys


def test_merge_keys(write):
    text = (
        "deep: {inner: &inner {<<: &low {k: 1, m: 2}, k: 3}}\n"
        "top: {<<: *inner, k: 4}\n"
        "two: {<<: [*inner, *low], n: 5}\n"
    )
    path = write(text)
    assert read_recipe_file(path) == yaml.safe_load(path.read_text())
    assert read_recipe_file(path)["top"] == {"k": 4, "m": 2}


@pytest.mark.parametrize("text", ["a: 1\na: 2\n", "b: {a: 1, a: 2}\n", "b: [{<<: {a: 1}, a: 1, a: 2}]\n"])
def test_a_key_twice_is_refused_also_beside_a_merge_key(write, text):
    with pytest.raises(UsageError, match="`a` occurs twice"):
        read_recipe_file(write(text))


# Layers


def test_the_command_line_merges_key_by_key(write):
    below = {"length": {"max_words": 12}, "correctness": {"max_score": 2.0}}
    path = write({**MINIMAL, "reward_kwargs": below, "generation_kwargs": {"top_k": 5}, "dataset_kwargs": {"seed": 1}})
    words = ["--reward_kwargs", '{"correctness": {"max_score": 1.0}}', "--dataset_kwargs", '{"limit": 2}']
    recipe = load_recipe(path, [*words, "--generation_kwargs={}"])
    assert recipe.arguments.reward_kwargs == {"length": {"max_words": 12}, "correctness": {"max_score": 1.0}}
    assert recipe.settings["reward_kwargs"] == recipe.arguments.reward_kwargs
    assert recipe.arguments.dataset_kwargs == {"seed": 1, "limit": 2}
    assert recipe.training.generation_kwargs == {"top_k": 5}
    twice = [*words, "--reward_kwargs", '{"correctness": {"schedule_steps": 3}}', "--seed=1", "--seed=2"]
    assert load_recipe(path, twice).arguments.reward_kwargs["correctness"] == {"max_score": 1.0, "schedule_steps": 3}
    # Lists are replaced, and null takes all away.
    assert load_recipe(path, ["--reward_funcs", "length"]).arguments.reward_funcs == ["length"]
    assert load_recipe(path, ["--reward_kwargs", "none"]).arguments.reward_kwargs == {}
    assert load_recipe(path, ["--reward_kwargs", '{"length": null}']).arguments.reward_kwargs["length"] == {}


def test_json_text_in_a_recipe_merges_too(write):
    write({**MINIMAL, "reward_kwargs": {"length": {"max_words": 12}}}, "base.yaml")
    path = write({"base": "base.yaml", "reward_kwargs": '{"correctness": {"max_score": 2.0}}'}, "above.yaml")
    assert load_recipe(path).arguments.reward_kwargs == {"length": {"max_words": 12}, "correctness": {"max_score": 2}}


@pytest.mark.parametrize(
    ("above", "expected"),
    [
        ({"type": "x.other"}, {"type": "x.other"}),
        ({"type": "x.other", "b": 2}, {"type": "x.other", "b": 2}),
        ({"type": "x.first", "b": 2}, {"type": "x.first", "a": 1, "b": 2}),
        ({"b": 2}, {"type": "x.first", "a": 1, "b": 2}),
    ],
)
def test_another_type_drops_what_was_inherited(above, expected):
    below = {"reward_kwargs": {"mine": {"type": "x.first", "a": 1}, "length": {"max_words": 3}}}
    merged = merge_layers(below, {"reward_kwargs": {"mine": above}})["reward_kwargs"]
    assert merged == {"mine": expected, "length": {"max_words": 3}}
    # A label without a type is its own.
    over = merge_layers(below, {"reward_kwargs": {"length": {"type": "x.y"}}})["reward_kwargs"]
    assert over["length"] == {"type": "x.y"}
    same = merge_layers(below, {"reward_kwargs": {"length": {"type": "length"}}})["reward_kwargs"]
    assert same["length"] == {"type": "length", "max_words": 3}


def test_the_methods_fields_are_those_that_a_layer_replaces():
    assert all(tuple(preset) == METHOD_FIELDS for preset in METHODS.values())


def test_another_method_above_a_base_leaves_nothing_behind(write):
    """As above the `recipe.yaml` that a run wrote, which has the method and its fields."""
    write({**MINIMAL, "method": "gd2po_snr", **METHODS["gd2po_snr"], "snr_threshold": 0.5}, "run.yaml")
    training = load_recipe(write({"base": "run.yaml", "method": "gdpo"})).training
    assert (training.conflict_filter, training.consensus_weighting) == (None, None)


# Ranges


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("top_k", -2), ("top_p", 0), ("top_p", 1.5), ("min_p", -0.1), ("repetition_penalty", 0), ("beta", -1)],
        *[("max_steps", 0), ("max_steps", -5), ("num_train_epochs", 0), ("max_completion_length", 0), ("seed", -1)],
        *[("adam_beta2", 1.0), ("weight_decay", -1), ("warmup_steps", -1), ("save_steps", 0), ("logging_steps", 0)],
        *[("num_generations_eval", 0), ("steps_per_generation", 0), ("per_device_eval_batch_size", 0)],
        *[("generation_batch_size", 0), ("dataloader_num_workers", -1), ("lora_r", 0), ("lora_dropout", 1)],
        *[("vllm_gpu_memory_utilization", 50), ("learning_rate", float("inf")), ("epsilon", -0.1)],
        *[("snr_threshold", float("nan")), ("adam_beta1", float("nan"))],
        # Words that would be ignored while vLLM is off, or give a classifier's adapter.
        *[("vllm_mode", "colocat"), ("lora_task_type", "SEQ_CLS")],
    ],
)
def test_impossible_values_are_refused_by_name(write, key, value):
    with pytest.raises(UsageError) as error:
        load_recipe(write({**MINIMAL, key: value}))
    assert f"`{key}`" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["top_k", "top_p", "repetition_penalty", "temperature"])
@pytest.mark.parametrize("value", [-3, "many"])
def test_impossible_numbers_among_the_keyword_arguments_of_generation(write, key, value):
    with pytest.raises(UsageError, match=f"`generation_kwargs.{key}`"):
        load_recipe(write({**MINIMAL, "generation_kwargs": {key: value}}))


def test_minus_one_turns_top_k_off(write):
    assert load_recipe(write({**MINIMAL, "top_k": -1})).training.top_k == 0
    assert load_recipe(write(MINIMAL), ["--top_k", "-1"]).training.top_k == 0
    nested = load_recipe(write({**MINIMAL, "generation_kwargs": {"top_k": -1, "do_sample": True}}))
    assert nested.training.generation_kwargs == {"top_k": 0, "do_sample": True}
    assert load_recipe(write({**MINIMAL, "max_steps": -1})).training.max_steps == -1


def test_the_defaults_are_possible():
    for item in (*RL_FIELDS.values(), *SFT_FIELDS.values()):
        if item.name in RANGES and item.default not in (None, MISSING):
            assert RANGES[item.name][0](item.default), item.name


# Names


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        *[("torch_dtype", "dtype"), ("max_prompt_length", "max_prompt_tokens"), ("lora_rank", "lora_r")],
        *[("max_new_tokens", "max_completion_length"), ("lr", "learning_rate"), ("epochs", "num_train_epochs")],
        *[("batch_size", "per_device_train_batch_size"), ("kl_loss_coef", "beta"), ("n", "num_generations")],
        *[("actor_rollout_ref.rollout.n", "num_generations"), ("max_response_length", "max_completion_length")],
        *[("clip_ratio_high", "epsilon_high"), ("total_epochs", "num_train_epochs"), ("fast_inference", "use_vllm")],
        *[("random_state", "seed"), ("lora_target", "lora_target_modules"), ("flash_attn", "attn_implementation")],
        *[("adapter_name_or_path", "model_name_or_path"), ("finetuning_type", "use_peft")],
        *[("evaluation_strategy", "eval_strategy"), ("dataset_name", "dataset_path"), ("no_cuda", "use_cpu")],
        *[("learning_rat", "learning_rate"), ("Learning-Rate", "learning_rate"), ("reward_func", "reward_funcs")],
    ],
)
def test_the_key_that_was_meant(write, name, meant):
    with pytest.raises(UsageError) as error:
        load_recipe(write({**MINIMAL, name: 1}))
    assert f"`{name}`" in str(error.value) and f"Did you mean `{meant}`?" in str(error.value)


def test_the_same_name_means_another_key_of_another_command():
    assert "`max_length`" in suggestion("cutoff_len", SFT_FIELDS, "gd2po sft")
    assert "`max_prompt_tokens`" in suggestion("cutoff_len", RL_FIELDS, "gd2po train")


def test_what_has_no_key_and_what_is_far_from_all():
    assert "WANDB_PROJECT" in suggestion("wandb_project", RL_FIELDS, "gd2po train")
    assert "flat" in suggestion("actor_rollout_ref", RL_FIELDS, "gd2po train")
    assert "gd2po train --help-all" in suggestion("zebra", RL_FIELDS, "gd2po train")


def test_every_suggested_key_exists():
    known = {*RL_FIELDS, *SFT_FIELDS}
    for name, meant in OTHER_NAMES.items():
        assert set(meant) <= known, name
        assert set(meant) & set(RL_FIELDS), name
        assert name not in RL_FIELDS, name
    assert set(REMARKS) <= set(OTHER_NAMES)
    assert not (set(ELSEWHERE) | set(SECTIONS)) & {*known, *OTHER_NAMES}


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["learning_rate=1e-4"], "--learning_rate"),
        (["--seed", "1", "learning_rate=1e-4"], "--learning_rate"),
        (["-learning_rate", "1e-4"], "--learning_rate"),
        (["\N{EM DASH}learning_rate", "1e-4"], "--learning_rate"),
        (["--lr", "1e-4"], "`learning_rate`"),
        (["--lora-rank", "4"], "`lora_r`"),
        (["--reward_funcs", "length", "format", "learning_rate=1"], "--learning_rate"),
    ],
)
def test_an_option_in_another_shape(write, words, meant):
    with pytest.raises(UsageError) as error:
        load_recipe(write(MINIMAL), words)
    assert meant in str(error.value), str(error.value)


def test_a_value_that_looks_like_an_option_is_a_value(write):
    assert load_recipe(write(MINIMAL), ["--run_name", "seed=3"]).training.run_name == "seed=3"
    assert load_recipe(write(MINIMAL), ["--learning-rate=1e-4"]).training.learning_rate == 1e-4


def test_whatever_is_true_can_be_switched_off(write):
    path = write({**MINIMAL, "bf16": True, "use_peft": True})
    recipe = load_recipe(path, ["--no_bf16", "--no_use_peft", "--no_skip_zero_advantage_rows"])
    assert (recipe.training.bf16, recipe.model.use_peft) == (False, False)
    assert recipe.training.skip_zero_advantage_rows is False
    with pytest.raises(UsageError, match="learning_rate"):
        load_recipe(path, ["--no_learning_rate"])
