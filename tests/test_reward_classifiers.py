"""Sequence classifiers as rewards: which models a label may name, and where a padded row ends."""

import pytest
import torch
from score_heads import letter_tokenizer, save_llama_score_head
from tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_config
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from gd2po_trl.errors import UsageError
from gd2po_trl.rewards import resolve_reward
from gd2po_trl.rewards.preference import RewardModel


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


@pytest.mark.parametrize("end", ["<|end|>", "<pad>"])
@pytest.mark.parametrize("pad_token_id", [None, 1])
def test_without_a_padding_token_every_text_is_scored_as_alone(end, pad_token_id, tmp_path):
    """Ends with id 1 or 0, which must not be taken for padding unless the model itself does."""
    folder = save_classifier(tmp_path / "model", end, pad_token_id=pad_token_id)
    reward = RewardModel(str(folder), dtype="float32", device="cpu", batch_size=3)
    prompts, completions = ["hello"] * 5, ["one", "", "a much longer answer", "b", "cd"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        alone = [model(torch.tensor([ids])).logits.item() for ids in reward.encoder(prompts, completions)]
    assert reward(prompts, completions) == pytest.approx(alone, abs=1e-4)
    assert reward(prompts[:1], completions[:1]) == pytest.approx(alone[:1], abs=1e-4)
