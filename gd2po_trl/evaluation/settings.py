"""How completions are made, and whether the model that makes them is still the same."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..field_help import help_from_docstring


# What a Hugging Face model folder keeps its weights, tokenizer and chat template in; optimizer states are `.pt`.
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


_NOT_OF_THE_MODEL = ("run.json", "results.json", "trainer_state.json", "training_args.bin")


BACKENDS = ("transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@help_from_docstring
@dataclass(frozen=True)
class GenerationSettings:
    """
    How completions are made. Decoding is always greedy, without the penalties of the model's own generation config.

    Args:
        model (`str`):
            Folder or Hub id of a causal language model, or the folder of a PEFT adapter.
        adapter (`str`, *optional*):
            Folder or Hub id of a PEFT adapter on top of the model.
        backend (`str`, defaults to `"transformers"`):
            What generates: `"transformers"` or `"vllm"`.
        max_new_tokens (`int`, defaults to `4096`):
            Tokens per completion, fewer where the context window ends before.
        max_prompt_tokens (`int`, *optional*):
            Longer prompts are shortened from the left. Whole prompts by default.
        batch_size (`int`, *optional*):
            Prompts per batch, and so the most that a kill can lose. 8 by default, 256 with vLLM.
        dtype (`str`, defaults to `"auto"`):
            Of the weights; `"auto"` is as saved.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Variables of the chat template, as the model was trained with: `{"date_string": "26 Jul 2024"}`.
        max_model_len (`int`, *optional*):
            Context window in tokens, prompt and completion together. The model's own by default.
        tensor_parallel_size (`int`, *optional*):
            GPUs that vLLM splits the model over. 1 by default.
        gpu_memory_utilization (`float`, *optional*):
            Share of each GPU's memory that vLLM takes. vLLM's own by default.
    """

    model: str
    adapter: str | None = None
    backend: str = "transformers"
    max_new_tokens: int = 4096
    max_prompt_tokens: int | None = None
    batch_size: int | None = None
    dtype: str = "auto"
    chat_template_kwargs: dict[str, Any] | None = None
    max_model_len: int | None = None
    tensor_parallel_size: int | None = None
    gpu_memory_utilization: float | None = None

    def __post_init__(self):
        for name, allowed in (("backend", BACKENDS), ("dtype", DTYPES)):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        for name in ("max_new_tokens", "max_prompt_tokens", "batch_size", "max_model_len", "tensor_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1.")
        share = self.gpu_memory_utilization
        if share is not None and not 0 < share <= 1:
            raise UsageError(f"gpu_memory_utilization is {share}; it must be above 0 and at most 1.")
        for name in ("tensor_parallel_size", "gpu_memory_utilization"):
            if getattr(self, name) is not None and self.backend != "vllm":
                raise UsageError(f"{name} is a setting of vLLM; give --backend vllm as well, or leave it out.")
        config = Path(self.model) / "adapter_config.json"
        if self.adapter is None and config.is_file():
            try:
                base = json.loads(config.read_text())["base_model_name_or_path"]
            except (ValueError, KeyError, TypeError):
                base = None
            if not isinstance(base, str) or not base:
                raise UsageError(
                    f"{config} names no base model; give the base as --model and {self.model} as --adapter."
                )
            object.__setattr__(self, "adapter", self.model)
            object.__setattr__(self, "model", base)

    @property
    def rows_per_batch(self) -> int:
        return self.batch_size or (256 if self.backend == "vllm" else 8)

    def identity(self) -> dict[str, Any]:
        """
        Everything that completions depend on. What fits the work to the machine is not part of it, such as the batch
        size: a smaller one must cure a full GPU.
        """
        return {
            "model": fingerprint_model(self.model, "config.json"),
            "adapter": None if self.adapter is None else fingerprint_model(self.adapter, "adapter_config.json"),
            "backend": self.backend,
            "decoding": "greedy",
            "max_new_tokens": self.max_new_tokens,
            "max_prompt_tokens": self.max_prompt_tokens,
            "dtype": self.dtype,
            "chat_template_kwargs": self.chat_template_kwargs or None,
            "max_model_len": self.max_model_len,
        }


def check_model_exists(settings: GenerationSettings) -> None:
    """Raises [`UsageError`] if there is no such model, without reading its weights."""
    if Path(settings.model).is_dir():
        _check_model_folder(settings.model, "config.json")
    else:
        fingerprint_model(settings.model, "config.json")


def _check_model_folder(name: str, config_file: str) -> None:
    if not (Path(name) / config_file).is_file():
        raise UsageError(f"The folder {name} holds no {config_file}, so it is no model (or adapter) to evaluate.")


def fingerprint_model(name: str, config_file: str) -> str:
    """
    A text that changes with the content of a model: the SHA-256 over a local folder's files, or a Hub id's commit.

    Raises:
        [`UsageError`]: if there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        _check_model_folder(name, config_file)
        digest = hashlib.sha256()
        # What an evaluation in this folder writes is no part of the model, nor is the log of its training.
        files = {file for pattern in _MODEL_FILES for file in folder.glob(pattern)}
        for file in sorted(file for file in files if file.name not in _NOT_OF_THE_MODEL):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return f"sha256:{digest.hexdigest()[:32]}"

    from transformers.utils import cached_file
    from transformers.utils.hub import extract_commit_hash

    try:
        config = cached_file(name, config_file)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(f"No model {name!r}: neither a folder nor readable on the Hub ({reason})") from error
    return f"{name}@{extract_commit_hash(config, None)}"
