"""Sequence classifiers as rewards: which models a label may name, and where a padded row ends."""

import json
from contextlib import nullcontext

import pytest
import torch
from score_heads import letter_tokenizer, save_llama_score_head
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_config
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaForSequenceClassification,
)

from gd2po_trl.errors import UsageError
from gd2po_trl.reward_models.in_process import RewardModel
from gd2po_trl.rewards import resolve_reward


def save_classifier(folder, end: str = "<|end|>", **config):
    torch.manual_seed(3)
    settings = {"num_labels": 1, "initializer_range": 0.5, **config}
    LlamaForSequenceClassification(tiny_config(**settings)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", end)
    tokenizer.pad_token, tokenizer.eos_token = None, end
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_may_be_a_label(tiny_reward_model):
    assert resolve_reward("helpful", {"type": str(tiny_reward_model)}) == str(tiny_reward_model)


@pytest.mark.parametrize(("config_pad", "tokenizer_pad"), [(0, "<|end|>"), (None, None), (1, "<pad>")])
def test_a_label_that_trl_would_read_at_another_token_is_a_warning(config_pad, tokenizer_pad, tmp_path, recwarn):
    config = tiny_config(num_labels=1, pad_token_id=config_pad)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert resolve_reward("x", {"type": str(tmp_path)}) == str(tmp_path)
    assert [str(one.message) for one in recwarn if "reward_model" in str(one.message)] == (
        [] if config_pad != 1 else [str(recwarn[-1].message)]
    )
    tokenizer.pad_token = tokenizer_pad
    tokenizer.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"type: reward_model") if config_pad != 1 else nullcontext():
        resolve_reward("x", {"type": str(tmp_path)})


@pytest.mark.parametrize("model", ["causal", "score_head", "two_labels"])
def test_what_trl_would_give_a_random_head_is_no_label(model, tmp_path, tiny_policy):
    folder = {
        "causal": lambda: tiny_policy,
        "score_head": lambda: save_llama_score_head(tmp_path / "beaver", letter_tokenizer()),
        "two_labels": lambda: save_classifier(tmp_path / "two", num_labels=2),
    }[model]()
    with pytest.raises(
        UsageError, match="The reward 'helpful'.*" + ("one" if model == "two_labels" else "reward_model")
    ):
        resolve_reward("helpful", {"type": str(folder)})
    with pytest.raises(UsageError, match=f"The reward '{folder}'"):
        resolve_reward(str(folder))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no/such", "The reward 'x': reward model 'no/such' cannot be read"),
        ("", "Unknown reward ''"),
        ("no/such/folder", "Unknown reward 'no/such/folder'"),
    ],
)
def test_no_model_is_one_error(kind, message):
    with pytest.raises(UsageError, match=message):
        resolve_reward("x", {"type": kind})


def test_a_folder_in_the_home_directory(tiny_reward_model, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_reward_model.parent))
    assert resolve_reward("x", {"type": f"~/{tiny_reward_model.name}"}) == str(tiny_reward_model)


SPECIAL = {"own": "<pad>", "eos": "<|end|>", "none": None}


@pytest.mark.parametrize("end", ["<|end|>", "<pad>", "<|end|><|end|>", "<|end|>.", ""])
@pytest.mark.parametrize("tokenizer_pad", SPECIAL)
@pytest.mark.parametrize("config_pad", [*SPECIAL, "minus one"])
def test_padding_changes_no_score(config_pad, tokenizer_pad, end, tmp_path):
    """Whatever config and tokenizer call padding and the template ends with: the score of plain use, row by row."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>", end)
    ids = {name: token and tokenizer.convert_tokens_to_ids(token) for name, token in SPECIAL.items()}
    torch.manual_seed(3)
    config = tiny_config(num_labels=1, initializer_range=0.5, pad_token_id={**ids, "minus one": -1}[config_pad])
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.pad_token = SPECIAL[tokenizer_pad]
    tokenizer.save_pretrained(tmp_path)

    reward = RewardModel(str(tmp_path), dtype="float32", device="cpu", batch_size=3)
    prompts, completions = ["hello"] * 5, ["one", "", "a much longer answer", "b", "cd"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    alone = []
    for prompt, completion in zip(prompts, completions, strict=True):
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        with torch.no_grad():
            alone.append(model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits.item())
    assert reward(prompts, completions) == pytest.approx(alone, abs=1e-4)
    assert reward(prompts[:1], completions[:1]) == pytest.approx(alone[:1], abs=1e-4)


@pytest.mark.parametrize("model_class", [GPT2ForSequenceClassification, BertForSequenceClassification])
@pytest.mark.parametrize("config_pad", [0, 1, None])
def test_padding_changes_no_score_of_other_architectures(model_class, config_pad, tmp_path):
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = model_class.config_class(
        vocab_size=261,
        num_labels=1,
        pad_token_id=config_pad,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=1,
        **sizes,
    )
    model = model_class(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    reward = RewardModel(str(tmp_path), dtype="float32", device="cpu", template="{prompt} {response}<|end|>")
    completions = ["one", "", "a much longer answer"]
    with torch.no_grad():
        ids = [tokenizer(f"hello {text}<|end|>", return_tensors="pt") for text in completions]
        alone = [model(input_ids=one["input_ids"]).logits.item() for one in ids]
    assert reward(["hello"] * 3, completions) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": None}, "model=None"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"max_length": None}, "max_length=None"),
        ({"template": 5}, "template=5"),
        ({"offload": "yes"}, "offload='yes'"),
        ({"self_check": 0}, "self_check=0"),
        ({"device": "gpu"}, "device='gpu'"),
    ],
)
def test_an_option_of_the_wrong_kind_is_named(tiny_reward_model, options, message):
    with pytest.raises(UsageError, match=message):
        RewardModel(**{"model": str(tiny_reward_model), **options})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vocab_size": 500}, "other sizes"),
        ({"hidden_size": 32}, "other sizes"),
        ({"pad_token_id": [1]}, "cannot be read"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(tmp_path, config, message):
    folder = save_classifier(tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    with pytest.raises(UsageError, match=message):
        RewardModel(str(folder), dtype="float32").load()


@pytest.mark.parametrize(
    "template", ["{% if %}", "{{ raise_exception('no') }}", "{{ messages[0]['content'] + 5 }}", "{{ 1 / 0 }}"]
)
def test_a_chat_template_that_fails_is_found_at_once(tmp_path, template):
    folder = save_classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    for build in (lambda: RewardModel(str(folder)), lambda: resolve_reward("x", {"type": str(folder)})):
        with pytest.raises(UsageError, match=r"the chat template of reward model .* refuses"):
            build()


def test_a_chat_template_that_refuses_a_role_says_so(tmp_path):
    folder = save_classifier(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)
    reward = RewardModel(str(folder), dtype="float32", device="cpu")
    user, said = {"role": "user", "content": "Hi."}, [{"role": "assistant", "content": "Hello."}]
    assert len(reward([[user]], [said])) == 1
    with pytest.raises(UsageError, match="roles assistant, system, user: no system"):
        reward([[{"role": "system", "content": "Be kind."}, user]], [said])


@pytest.mark.parametrize("template", ["chat", "{prompt}{response}"])
def test_texts_that_no_tokenizer_takes_have_a_score(tmp_path, template):
    reward = RewardModel(str(save_classifier(tmp_path)), dtype="float32", device="cpu", template=template)
    scores = reward([""] * 5, ["", "\ud800", "\x00", None, [{"role": "assistant", "content": [{"type": "image"}]}]])
    assert all(isinstance(score, float) for score in scores)
