"""Everything that the quickstart's recipe finds on the disk: the data and the warmed-up policy."""

from pathlib import Path

from .policy import build_policy, build_tokenizer
from .task import example_stream, make_dataset, split_requests, write_jsonl
from .warmup import warm_up


NUM_TRAIN_ROWS = 2048
NUM_HELD_OUT_ROWS = 256
NUM_HELD_OUT_REQUESTS = 128

TRAIN_FILE = "train.jsonl"
HELD_OUT_FILE = "heldout.jsonl"
POLICY_FOLDER = "policy"


def prepare(folder: str | Path, *, seed: int = 1, num_warmup_steps: int = 400) -> Path:
    """
    Generates the task's data and warms up a policy, with a progress bar; what was in the place is overwritten.

    Args:
        folder (`str` or `Path`):
            Gets `train.jsonl`, `heldout.jsonl` (columns `prompt` and `answer`; no held-out request occurs in training)
            and `policy/`, a folder for `from_pretrained`.
        seed (`int`, *optional*, defaults to `1`):
            Seed of the split, the data, the policy's first weights and its demonstrations.
        num_warmup_steps (`int`, *optional*, defaults to `400`):
            Steps of the supervised warm-up.

    Returns:
        `Path`: `folder`.
    """
    folder = Path(folder)
    train, held_out = split_requests(NUM_HELD_OUT_REQUESTS, seed)
    write_jsonl(make_dataset(train, NUM_TRAIN_ROWS, seed), folder / TRAIN_FILE)
    write_jsonl(make_dataset(held_out, NUM_HELD_OUT_ROWS, seed), folder / HELD_OUT_FILE)
    tokenizer = build_tokenizer()
    policy = build_policy(tokenizer, seed)
    warm_up(policy, tokenizer, example_stream(train, seed), num_steps=num_warmup_steps, seed=seed)
    policy.save_pretrained(folder / POLICY_FOLDER)
    tokenizer.save_pretrained(folder / POLICY_FOLDER)
    return folder
