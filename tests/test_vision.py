"""Policies that see images: the same trainer on a tiny LLaVA, with images, without, and with both in one dataset."""

from pathlib import Path

import pytest
import torch
from accelerate.logging import MultiProcessAdapter
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from tiny import byte_tokenizer, low_bytes, spread_bytes, tiny_args, tiny_config
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from trl import GRPOTrainer

from gd2po_trl import GD2POTrainer
from gd2po_trl.gd2po_config import METHODS


SIDE = 16
# Content is a list of parts where a dataset has images.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def vision_policy(tmp_path_factory) -> Path:
    """Folder of a tiny LLaVA, which reads an image as four tokens."""
    folder = tmp_path_factory.mktemp("vision_policy")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    policy = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=tiny_config(vocab_size=len(tokenizer)),
            vision_config=CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=SIDE,
                patch_size=SIDE // 2,
                projection_dim=16,
            ),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=-1,
        )
    )
    policy.generation_config.update(pad_token_id=0, eos_token_id=1)
    policy.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=SIDE // 2,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def picture(row: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (12 * row, 100, 255 - 12 * row))


def dataset(kind: str, rows: int = 16) -> Dataset:
    """Prompts with an `image` each, with one or two `images`, with none, or with images in every other row."""
    columns = {"prompt": [[{"role": "user", "content": f"say {chr(97 + row)}"}] for row in range(rows)]}
    if kind == "image":
        columns["image"] = [picture(row) for row in range(rows)]
    elif kind == "images":
        columns["images"] = [[picture(row)] * (1 + row % 2) for row in range(rows)]
    elif kind == "mixed":
        columns["images"] = [[picture(row)] if row % 2 else [] for row in range(rows)]
    return Dataset.from_dict(columns)


def train(policy: Path, folder: Path, kind: str, trainer_class=GD2POTrainer, lora=False, **overrides):
    """The trainer after training, and the names of the parameters that moved."""
    torch.manual_seed(0)
    trainer = trainer_class(
        str(policy),
        [low_bytes, spread_bytes],
        tiny_args(folder, **{"num_generations": 8, **overrides}),
        train_dataset=dataset(kind),
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if lora else None,
    )
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    return trainer, [name for name, value in after.items() if not torch.equal(value, before[name])]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["image", "images", "mixed"])
def test_images_train_the_vision_tower_too(vision_policy, tmp_path, kind, lora):
    trainer, moved = train(vision_policy, tmp_path, kind, lora=lora, num_iterations=2, log_completions=True)
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)
    assert not lora or all("lora" in name for name in moved)
    entry = trainer.state.log_history[0]
    assert entry["gd2po/kept_ratio"] == 1 - entry["gd2po/conflict_ratio"] < 1


def test_rows_with_images_are_all_trained(vision_policy, tmp_path, caplog):
    """Pixels belong to rows in many layouts, so a batch that carries them is not cut, and that is said once."""
    MultiProcessAdapter.warning_once.cache_clear()
    cut, _ = train(vision_policy, tmp_path / "cut", "image", num_iterations=2)
    assert caplog.text.count("carries `pixel_values`") == 1
    whole, _ = train(vision_policy, tmp_path / "whole", "image", num_iterations=2, skip_zero_advantage_rows=False)
    assert "gd2po/trained_rows" not in cut.state.log_history[0]
    for (name, value), other in zip(cut.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(value, other), name


def test_text_alone_is_cut_as_for_any_policy(vision_policy, tmp_path):
    cut, moved = train(vision_policy, tmp_path / "cut", "text", optim="sgd", learning_rate=0.5)
    assert moved and not any("vision_tower" in name for name in moved)
    assert cut.state.log_history[0]["gd2po/trained_rows"] < 1
    whole, _ = train(
        vision_policy, tmp_path / "whole", "text", optim="sgd", learning_rate=0.5, skip_zero_advantage_rows=False
    )
    for (name, value), other in zip(cut.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(value, other, atol=1e-6, rtol=0), name


def test_as_grpo_it_trains_like_the_trainer_of_trl(vision_policy, tmp_path):
    ours, _ = train(vision_policy, tmp_path / "ours", "images", **METHODS["grpo"])
    theirs, _ = train(vision_policy, tmp_path / "theirs", "images", trainer_class=GRPOTrainer, **METHODS["grpo"])
    for (name, value), other in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(value, other), name
