"""The supervised warm-up: it teaches the format and how to copy, from demonstrations that are careless on purpose.

RL can only sharpen what a policy already does now and then. A policy that was never shown a tool call gets the lowest
reward on every rollout, and one that was shown only perfect calls has nothing left to learn. So the demonstrations
contain every skill and also mistakes: some lack the closing tag, and in many the two values are swapped, the more
often the longer the demonstration thinks. The last point makes the rewards conflict: longer thinking is rewarded, and
goes with wrong calls.
"""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .task import THINK_WORDS, Example, render_answer


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Share of demonstrations that swap the two values, at the shortest and at the longest thinking.
SWAP_RATE = (0.55, 0.85)
# Share of demonstrations that stop before the closing tag.
UNCLOSED_RATE = 0.1


def demonstrate(example: Example, rng: random.Random) -> str:
    """A careless completion for `example`: its gold answer, or one with swapped values or without its closing tag."""
    shortest, longest = THINK_WORDS
    thinking = (len(example.thoughts) - shortest) / (longest - shortest)
    is_swapped = rng.random() < SWAP_RATE[0] + thinking * (SWAP_RATE[1] - SWAP_RATE[0])
    values = example.values[::-1] if is_swapped else example.values
    completion = render_answer(example.tool, values, example.thoughts)
    return completion.removesuffix("\n</tool_call>") if rng.random() < UNCLOSED_RATE else completion


def warm_up(
    policy: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    examples: Iterator[Example],
    *,
    num_steps: int = 400,
    batch_size: int = 32,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """
    Trains `policy` in place on careless demonstrations, with a progress bar.

    Args:
        policy (`PreTrainedModel`): Policy to train.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        examples (`Iterator[Example]`): Endless examples.
        num_steps (`int`, *optional*, defaults to `400`): Optimizer steps.
        batch_size (`int`, *optional*, defaults to `32`): Demonstrations per step.
        learning_rate (`float`, *optional*, defaults to `3e-3`): AdamW's, after 30 steps of linear increase.
        seed (`int`, *optional*, defaults to `0`): Seed of the mistakes in the demonstrations.

    Returns:
        `list[float]`: The loss (mean negative log-likelihood per completion token, in nats) of every step.
    """
    import torch
    from tqdm.auto import tqdm

    rng = random.Random(f"demonstrations-{seed}")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 30))
    policy.train()
    losses = []
    progress = tqdm(range(num_steps), desc="Supervised warm-up", unit="step")
    for _ in progress:
        batch = [next(examples) for _ in range(batch_size)]
        loss = policy(**collate(tokenizer, [(example.prompt, demonstrate(example, rng)) for example in batch])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return losses


def collate(tokenizer: "PreTrainedTokenizerFast", pairs: list[tuple[str, str]]) -> dict:
    """
    Tokenizes prompts with their completions; the completion and its end-of-sequence token are what is learned.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids`, `attention_mask` and `labels`, each int64 of shape (pairs, length),
        padded on the right; labels are -100 outside the completion.
    """
    import torch

    prompts = tokenizer([prompt for prompt, _ in pairs])["input_ids"]
    completions = tokenizer([completion for _, completion in pairs])["input_ids"]
    length = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)) + 1
    input_ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
    labels = torch.full((len(pairs), length), -100)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])
        input_ids[row, : len(ids)] = ids
        labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
    return {"input_ids": input_ids, "attention_mask": (input_ids != tokenizer.pad_token_id).long(), "labels": labels}
