"""A policy of a few thousand parameters with a byte tokenizer: real classes, real training, no download."""

from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from gd2po_trl import GD2POConfig


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    specials = ["<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=specials[2:],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def tiny_config(**overrides) -> LlamaConfig:
    settings = {
        "vocab_size": 261,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return LlamaConfig(**{**settings, **overrides})


def save_tiny_policy(folder: Path, seed: int = 0, **overrides) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**overrides)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_reward_model(folder: Path, seed: int = 1, **overrides) -> Path:
    torch.manual_seed(seed)
    LlamaForSequenceClassification(tiny_config(num_labels=1, **overrides)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def letters_dataset(rows: int = 16) -> Dataset:
    return Dataset.from_dict({"prompt": [f"say {chr(97 + row % 26)}: " for row in range(rows)]})


def conversational_dataset(rows: int = 16) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [[{"role": "user", "content": f"say {chr(97 + row % 26)}"}] for row in range(rows)]}
    )


def text_of(completion) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def low_bytes(completions, **kwargs):
    """Share of characters below 'n': differs between almost all random completions."""
    return [sum(char < "n" for char in text_of(c)) / (len(text_of(c)) + 1) for c in completions]


def spread_bytes(completions, **kwargs):
    """Distinct characters per completion; in no fixed relation to `low_bytes`, so that the two conflict."""
    return [float(len(set(text_of(c)))) for c in completions]


def tiny_args(output_dir: Path, **overrides) -> GD2POConfig:
    return GD2POConfig(**{**tiny_settings(output_dir), **overrides})


def tiny_settings(output_dir: Path) -> dict:
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 7,
    }


def varied_dataset(rows: int = 32) -> Dataset:
    """Prompts of 1 to 24 characters, of which some are equal."""
    return Dataset.from_dict({"prompt": ["say something long: xyzw"[: 1 + (row * 7) % 24] for row in range(rows)]})
