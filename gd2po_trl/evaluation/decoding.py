"""Greedy decoding with transformers or vLLM: conversations in, texts out."""

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, one_line
from .settings import GenerationSettings


logger = logging.getLogger(__name__)

Prompt = list[dict[str, str]] | str


def load_decoder(settings: GenerationSettings) -> "Decoder":
    """The backend that `settings` ask for, with its tokenizer: a context manager, which frees the memory."""
    return (VLLMDecoder if settings.backend == "vllm" else TransformersDecoder)(settings)


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """
    Indices in batches of similar length, the longest first, so that memory runs out at the start or never.

    The cut depends on `lengths` and `batch_size` alone: a resumed run forms the same batches as an uninterrupted one,
    and with them bit for bit the same completions.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


class Decoder:
    """Tokenizer, stop tokens and context window, which both backends share."""

    model: Any = None
    prefills: list[str]

    def __init__(self, settings: GenerationSettings):
        from transformers import AutoConfig, AutoTokenizer, GenerationConfig

        self.settings = settings
        # Fine-tuning may add a chat template or tokens, which are then saved beside the adapter.
        has_own = settings.adapter is not None and (Path(settings.adapter) / "tokenizer_config.json").is_file()
        self.tokenizer_source = source = settings.adapter if has_own else settings.model
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
            config = AutoConfig.from_pretrained(settings.model).get_text_config()
        except Exception as error:  # `tokenizers` raises a bare one for a damaged file
            raise UsageError(
                f"Cannot load the tokenizer and config of {source}: {one_line(error, type(error).__name__)}"
            ) from error
        try:
            stop = GenerationConfig.from_pretrained(settings.model).eos_token_id
        except OSError:
            stop = None
        stops = [*_as_list(stop), *_as_list(config.eos_token_id), *_as_list(self.tokenizer.eos_token_id)]
        self.stop_ids: list[int] = sorted(set(stops))
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        if (asked := settings.max_model_len) is not None:
            if self.context is not None and asked > self.context:
                raise UsageError(
                    f"max_model_len is {asked}; the context window of {settings.model} is {self.context}."
                )
            self.context = asked

    def __enter__(self) -> "Decoder":
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self.model = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """
        Token ids of conversations, ready for the assistant's turn.

        Prompts that are text stay as they are. Without a chat template the contents of the messages are joined by
        blank lines. Prompts beyond `settings.max_prompt_tokens` are shortened from the left, conversations by whole
        turns as in training. What their ends open of the assistant's thoughts is in `prefills` afterwards.
        """
        from ..datasets.prompts import (
            opened_thoughts,
            render_conversations,
            thoughts_at_the_end,
            truncate_prompts_left,
        )

        limit = self.settings.max_prompt_tokens
        variables = self.settings.chat_template_kwargs or {}
        is_text = bool(prompts) and isinstance(prompts[0], str)
        if is_text or not self.tokenizer.chat_template:
            texts = [
                prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)
                for prompt in prompts
            ]
            self.prefills = opened_thoughts(texts, self.tokenizer)
            return [ids[-limit:] if limit else ids for ids in self.tokenizer(texts)["input_ids"]]
        try:
            if limit is not None:
                from datasets import Dataset

                dataset, shortened = truncate_prompts_left(
                    Dataset.from_dict({"prompt": list(prompts)}), self.tokenizer, limit, variables
                )
                prompts = dataset["prompt"]
                logger.info("%d of %d prompts were shortened to %d tokens.", shortened, len(prompts), limit)
            texts = render_conversations(prompts, self.tokenizer, add_generation_prompt=True, **variables)
        except UsageError as error:
            raise UsageError(f"{self.settings.model}: {error}") from error
        self.prefills = [thoughts_at_the_end(text) for text in texts]
        # The template writes the special tokens itself.
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"]

    def load_model(self, longest_prompt: int) -> None:
        """Loads the weights; `longest_prompt` in tokens lets a backend plan its memory."""
        raise NotImplementedError

    def complete(self, prompts: Sequence[list[int]]) -> list[dict[str, Any]]:
        """
        Greedy completions of token ids, in the order given; see [`generate_predictions`] for the keys.

        A prompt that fills the context window gets an empty completion and an `error`.
        """
        fitting = [prompt for prompt in prompts if self.context is None or len(prompt) < self.context]
        completions = iter(self._complete(fitting) if fitting else [])
        records = []
        for prompt in prompts:
            record = {"completion": "", "finish_reason": None, "completion_tokens": 0, "prompt_tokens": len(prompt)}
            if self.context is not None and len(prompt) >= self.context:
                record["error"] = f"the prompt's {len(prompt)} tokens fill the context window of {self.context}"
            else:
                ids = next(completions)
                end = next((position for position, token in enumerate(ids) if token in self.stop_ids), None)
                record["completion"] = self.tokenizer.decode(ids[:end], skip_special_tokens=True)
                record["finish_reason"] = "length" if end is None else "stop"
                record["completion_tokens"] = len(ids[:end])
            records.append(record)
        return records

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        """New token ids of each prompt; what follows the first stop token does not matter."""
        raise NotImplementedError


class TransformersDecoder(Decoder):
    """Batches through `generate`, left-padded."""

    def load_model(self, longest_prompt: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        settings = self.settings
        try:
            model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=settings.dtype)
            if settings.adapter is not None:
                from peft import PeftModel

                # Not merged into the weights: merging would round them to their dtype.
                model = PeftModel.from_pretrained(model, settings.adapter)
        except Exception as error:  # each file format and each adapter has errors of its own
            raise UsageError(
                f"Cannot load {settings.adapter or settings.model}: {one_line(error, type(error).__name__)}"
            ) from error
        if self.tokenizer.pad_token_id is None:
            if not self.stop_ids:
                raise UsageError(f"The tokenizer of {settings.model} has neither a padding nor an end token.")
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self.stop_ids[0])
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model = model.to(self.device).eval()

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        limit = self.settings.max_new_tokens
        rooms = [limit if self.context is None else min(limit, self.context - len(prompt)) for prompt in prompts]
        completions: list[list[int]] = [[] for _ in prompts]
        todo = list(range(len(prompts)))
        # In steps, where rooms differ: each prompt gets its own, whatever the length of those beside it.
        while todo:
            step = min(rooms[index] - len(completions[index]) for index in todo)
            new = self._generate([prompts[index] + completions[index] for index in todo], step)
            for index, ids in zip(todo, new, strict=True):
                completions[index] += ids
            todo = [
                index
                for index in todo
                if len(completions[index]) < rooms[index] and not set(self.stop_ids) & set(completions[index])
            ]
        return completions

    def _generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig

        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.device)
        width = batch["input_ids"].shape[1]
        # `generate` fills what is unset from the model's own config, which may hold a repetition penalty.
        self.model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.stop_ids or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        try:
            with torch.inference_mode():
                output = self.model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        except torch.OutOfMemoryError as error:
            raise UsageError(
                f"Out of memory with {len(prompts)} prompts of up to {width} tokens. Repeat the command with a "
                "smaller --batch-size; finished rows are kept."
            ) from error
        return output[:, width:].tolist()


class VLLMDecoder(Decoder):
    """vLLM's offline engine, fed the same token ids and stop tokens as `generate`."""

    def __init__(self, settings: GenerationSettings):
        try:
            import vllm  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "--backend vllm needs vLLM: pip install -c constraints-vllm.txt '.[vllm]' in a clone of gd2po_trl."
            ) from error
        super().__init__(settings)

    def load_model(self, longest_prompt: int) -> None:
        from vllm import LLM

        settings = self.settings
        # The window that the rows need, not the model's own: vLLM reserves cache for one sequence of full length.
        needed = longest_prompt + settings.max_new_tokens
        options: dict[str, Any] = {"max_model_len": needed if self.context is None else min(self.context, needed)}
        if settings.tensor_parallel_size is not None:
            options["tensor_parallel_size"] = settings.tensor_parallel_size
        if settings.gpu_memory_utilization is not None:
            options["gpu_memory_utilization"] = settings.gpu_memory_utilization
        self.lora_request = None
        if settings.adapter is not None:
            from peft import PeftConfig
            from vllm.lora.request import LoRARequest

            rank = getattr(PeftConfig.from_pretrained(settings.adapter), "r", None)
            if rank is None:
                raise UsageError(f"vLLM serves LoRA adapters only; use --backend transformers for {settings.adapter}.")
            # vLLM takes powers of two from 8 on.
            options |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
            self.lora_request = LoRARequest("adapter", 1, settings.adapter)
        self.model = LLM(
            model=settings.model, tokenizer=self.tokenizer_source, dtype=settings.dtype, seed=0, **options
        )

    def _complete(self, prompts: list[list[int]]) -> list[list[int]]:
        from vllm import SamplingParams

        outputs = self.model.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=self.settings.max_new_tokens, stop_token_ids=self.stop_ids),
            use_tqdm=False,
            lora_request=self.lora_request,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def _as_list(value: int | list[int] | None) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
