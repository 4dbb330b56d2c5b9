"""
What batching by length saves, and how much memory one and two reward models take.

    python benchmarks/reward_models.py --prompts pku_saferlhf_test.parquet --responses hh_rlhf_helpful_test.json

Throughput: conversations of real prompts, and of real responses where a file is given, scored by a tiny model of
random weights, in the given order and by length; the ratio matters, not the speed. Memory: peak resident memory of a
process that loads models of a given size, and on a GPU the peak of allocated memory with and without `offload`. Linux
only.
"""

import argparse
import json
import multiprocessing
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gd2po_trl.datasets import load_dataset_by_name
from gd2po_trl.reward_models.in_process import RewardModel
from gd2po_trl.reward_models.loading import ScoreModel


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<pad>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=specials, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def save_model(folder: Path, tokenizer: PreTrainedTokenizerFast, hidden_size: int, layers: int, seed: int) -> int:
    """Writes a score head of random weights in bfloat16; its size in bytes."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 64),
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = ScoreModel(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(parameter.nbytes for parameter in model.parameters())


def throughput(folder: Path, prompts: list, completions: list, batch_size: int, repeats: int) -> dict:
    """Seconds to score everything in the given order and by length, the best of `repeats`, in turn."""
    reward = RewardModel(str(folder), dtype="float32", batch_size=batch_size)
    lengths = [len(ids) for ids in reward.encoder(prompts, completions)]
    seconds = {False: [], True: []}
    rewards = {}
    for _ in range(repeats):
        for by_length in seconds:
            reward.batch_by_length = by_length
            started = time.perf_counter()
            rewards[by_length] = reward(prompts, completions)
            seconds[by_length].append(time.perf_counter() - started)
    return {
        "conversations": len(prompts),
        "batch_size": batch_size,
        "mean_length": sum(lengths) / len(lengths),
        "max_length": max(lengths),
        "padded_naive": padded(lengths, batch_size),
        "padded_by_length": padded(sorted(lengths), batch_size),
        "seconds_naive": min(seconds[False]),
        "seconds_by_length": min(seconds[True]),
        "speedup": min(seconds[False]) / min(seconds[True]),
        "largest_difference": max(abs(a - b) for a, b in zip(rewards[False], rewards[True], strict=True)),
    }


def padded(lengths: list[int], batch_size: int) -> float:
    """Share of the positions of all batches that are padding."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def peak_memory(folders: list[str], way: str) -> dict:
    """Peak memory of this process in bytes; `way` is `import`, `together`, `one after the other` or `offload`."""
    conversation = (["How are you?"] * 4, ["Fine, thanks."] * 4)
    rewards = [RewardModel(folder, offload=way == "offload") for folder in folders]
    if way != "import":
        for reward in rewards:
            reward(*conversation)
            if way == "one after the other":
                reward.unload()
    # Not getrusage, whose peak begins with the parent's.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak = {"resident": int(status["VmHWM"].split()[0]) * 1024}
    if torch.cuda.is_available():
        peak["cuda"] = torch.cuda.max_memory_allocated()
    return peak


def memory(folders: list[str], size: int) -> dict:
    """Peaks above that of a process that has imported everything, in units of one model's weights."""
    context = multiprocessing.get_context("spawn")
    cases = {
        "import": (folders, "import"),
        "one": (folders[:1], "together"),
        "two": (folders, "together"),
        "two, one after the other": (folders, "one after the other"),
        "two, offloaded": (folders, "offload"),
    }
    peaks = {}
    for name, arguments in cases.items():
        # A process of its own, since a peak never falls.
        with context.Pool(1) as pool:
            peaks[name] = pool.apply(peak_memory, arguments)
    base = peaks.pop("import")
    return {name: {kind: (value - base[kind]) / size for kind, value in peak.items()} for name, peak in peaks.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", required=True, help="file of PKU-SafeRLHF's prompts")
    parser.add_argument("--responses", help="file of HH-RLHF's pairs, whose responses follow the prompts in turn")
    parser.add_argument("--limit", type=int, help="use only this many prompts")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--hidden-size", type=int, default=1024, help="of the models whose memory is measured")
    parser.add_argument("--layers", type=int, default=8, help="of the models whose memory is measured")
    arguments = parser.parse_args()

    rows = load_dataset_by_name("pku_saferlhf", arguments.prompts, limit=arguments.limit, drop_duplicates=False)
    prompts = list(rows["prompt"])
    texts = [prompt[0]["content"] for prompt in prompts]
    responses = [""]
    if arguments.responses:
        responses = list(load_dataset_by_name("hh_rlhf_pairs", arguments.responses)["chosen"])
    completions = [
        [{"role": "assistant", "content": responses[index % len(responses)]}] for index in range(len(prompts))
    ]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(texts + responses)
        save_model(Path(folder) / "tiny", tokenizer, 64, 2, seed=0)
        result = {
            "throughput": throughput(
                Path(folder) / "tiny", prompts, completions, arguments.batch_size, arguments.repeats
            )
        }
        names = [str(Path(folder) / name) for name in ("first", "second")]
        for name in names:
            size = save_model(Path(name), tokenizer, arguments.hidden_size, arguments.layers, seed=1)
        result["model_megabytes"] = size / 2**20
        result["peak_memory_in_models"] = memory(names, size)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
