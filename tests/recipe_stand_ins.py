"""Tiny local stand-ins for what a recipe names: the policy, the data and the reward models."""

from pathlib import Path
from typing import Any

import torch
from dataset_files import user, write
from score_heads import letter_tokenizer, save_llama_score_head, save_qwen2_score_head
from tiny import byte_tokenizer, tiny_config
from transformers import LlamaForCausalLM

from gd2po_trl.reward_models.text_scorer import fit_text_scorer


CALL = '{"name": "f", "parameters": {"a": 1}}'
GOLD = f"<think> t </think>\n<tool_call>\n{CALL}\n</tool_call>"
# What the policy says, each in one token: so that all rewards differ between its completions.
FRAGMENTS = (
    "<think> " + "so " * 9 + f"</think>\n<tool_call>\n{CALL}\n</tool_call>",
    "<think> " + "well " * 90 + '</think>\n<tool_call>\n{"name": "g", "parameters": {}}\n</tool_call>',
    "I can help you with that. ",
    "No, you stupid idiot. ",
)


def save_talking_policy(folder: Path) -> Path:
    """A tiny Llama that says one of [`FRAGMENTS`], or ends, at every step; it ends at about every second one."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(FRAGMENTS))
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    spoken = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(list(FRAGMENTS))]
    with torch.no_grad():
        # The first hidden dimension is the same for every token, so that the head's column acts as a bias.
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = -20.0
        model.lm_head.weight[spoken, 0] = torch.tensor([0.35] + [0.0] * len(FRAGMENTS))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_dataset(folder: Path, name: str) -> str:
    """A few rows in the layout in which the data set called `name` is published. Raises `KeyError` without one."""
    rows = {"rlla": _rlla, "rlla_4k": _rlla, "rlla_sft": _rlla_sft, "prompts": _prompts}
    rows |= {"alpaca": _alpaca, "beavertails": _beavertails, "pku_saferlhf": _pku_saferlhf, "hh_rlhf": _hh_rlhf}
    if name not in rows:
        raise KeyError(f"no tiny rows for the data set {name}; write some here")
    return write(folder / f"{name}.jsonl", [rows[name](number) for number in range(64)])


def _rlla(number: int) -> dict[str, Any]:
    return {
        "data_source": "rlla",
        "prompt": [{"role": "system", "content": "Tools: f"}, *user(f"**Dialogue Records History**\n{number}")],
        "reward_model": {"ground_truth": GOLD, "style": "rule"},
    }


def _rlla_sft(number: int) -> dict[str, Any]:
    return {"instruction": "Tools: f", "input": f"**Dialogue Records History**\n{number}", "output": GOLD}


def _prompts(number: int) -> dict[str, Any]:
    return {"prompt": f"Tools: f\n{number}", "answer": GOLD}


def _alpaca(number: int) -> dict[str, Any]:
    return {"instruction": f"Name a fruit, {number}.", "input": "", "output": "Apple."}


def _beavertails(number: int) -> dict[str, Any]:
    return {
        "prompt": f"How do I steal {number}?",
        "response": "No.",
        "category": {"self_harm": True},
        "is_safe": False,
    }


def _pku_saferlhf(number: int) -> dict[str, Any]:
    return {"prompt": f"How do I steal {number}?", "response_0": "No.", "response_1": "Yes.", "better_response_id": 0}


def _hh_rlhf(number: int) -> dict[str, Any]:
    said = f"\n\nHuman: How do I steal {number}?\n\nAssistant:"
    return {"chosen": f"{said} No.", "rejected": f"{said} Yes."}


def swap_reward(folder: Path, label: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The keyword arguments of a reward with its model, if it has one, replaced by a tiny one of the same layout.

    The tiny model keeps the last part of the name, by which the direction of a published model is known.
    """
    kind = kwargs.get("type", label)
    if kind in ("correctness", "format", "length"):
        return kwargs
    if kind == "text_scorer":
        return {**kwargs, "path": str(_save_text_scorer(folder / label))}
    if kind == "reward_model":
        name = kwargs["model"].split("/")[-1]
        if name.startswith("Qwen2.5-7B-SafeRLHF"):
            model = save_qwen2_score_head(folder / label / name, byte_tokenizer(), seed=len(label))
        elif name.startswith("beaver-7b"):
            score_type = "cost" if name.endswith("cost") else "reward"
            model = save_llama_score_head(
                folder / label / name, letter_tokenizer(), seed=len(label), score_type=score_type
            )
        else:
            raise KeyError(f"no tiny stand-in for the reward model {name}; write one here")
        # Quantisation needs bitsandbytes and is a matter of size; the policy's tokenizer is on the Hub.
        off = {"load_in_4bit": False, "load_in_8bit": False, "input_tokenizer": None}
        kept = {key: off.get(key, value) for key, value in kwargs.items()}
        # A random model has no direction that a self-check could confirm.
        return {**kept, "model": str(model), "self_check": False}
    raise KeyError(f"no tiny stand-in for a reward of type {kind}; write one here")


def _save_text_scorer(folder: Path) -> Path:
    better, worse = ("help you", "stupid idiot") if folder.name == "helpful" else ("well so", "tool call")
    pairs = {
        "prompt": [f"p{number}" for number in range(60)],
        "chosen": [f"I can {better} with that" for _ in range(60)],
        "rejected": [f"No you {worse}" for _ in range(60)],
        "chosen_side": [number % 2 for number in range(60)],
    }
    fit_text_scorer(pairs, folder, folds=2)
    return folder
