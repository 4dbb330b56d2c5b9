"""Reward models as reward functions: they judge a response, loaded into this process."""

import importlib.util
import math
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..errors import RewardError, UsageError
from ..messages import Messages
from .conversation import ConversationEncoder, check_integer, render_chat, resolve_template
from .direction import check_direction, is_safe_rlhf, published_direction, resolve_direction
from .loading import load_scoring_module, on_device, padding_token, read_config, scores_last_token


logger = logging.get_logger(__name__)

NON_FINITE = ("error", "skip")


class RewardModel:
    """
    A reward model as a reward function for TRL.

    Reads SafeRLHF-type score heads, `Artessay/Qwen2.5-7B-SafeRLHF-RM` and `-CM` and
    `PKU-Alignment/beaver-7b-*-reward` and `-cost` among them, in their published layout, and any single-label
    `AutoModelForSequenceClassification`. Code from the Hub is never run. Config and tokenizer are read at once, so
    that a wrong path is an early error; the weights at the first call or by [`~RewardModel.load`].

    The reward is `sign * score`. Of the published models only beaver's cost model scores harm, so that `harmless`
    is its negative; the CM of Qwen2.5-7B-SafeRLHF scores harmlessness, whatever its name says.

    Args:
        model (`str`): Folder or Hub id.
        name (`str`, *optional*): Label of the reward in logs and errors. Defaults to the last part of `model`.
        sign (`int`, *optional*):
            1 or -1. Defaults to -1 for a model that is known to score harm (beaver's cost models by name, safe-rlhf
            checkpoints by `score_type: cost` in their config), else to 1.
        higher_is (`str`, *optional*):
            What a higher reward, after the sign, means: `"helpful"`, `"harmless"` or `"harmful"`. Loading then
            scores a few built-in pairs, and warns if the reward looks inverted. Defaults to what is known of a
            published model; without either nothing is checked.
        template (`str`, *optional*):
            `"chat"`, `"beaver"`, or a text with `{prompt}` and `{response}`. Defaults to `"beaver"` for safe-rlhf
            checkpoints, else to `"chat"`.
        max_length (`int`, *optional*, defaults to `2048`):
            Longest conversation in tokens, at most the model's own maximum.
        truncation_side (`str`, *optional*, defaults to `"left"`):
            Which end of a longer conversation is cut off. `"right"`, as the published GD²PO run has it, cuts the
            response.
        input_tokenizer (`str`, *optional*):
            Folder or Hub id of the policy, if responses are to be read as in the published runs: with the end token
            that closed them, unless it is the tokenizer's `eos_token`. So a response of Qwen2.5-Instruct that ended in
            `<|endoftext|>` keeps it. By default no end token is read, as TRL's text has none.
        batch_size (`int`, *optional*, defaults to `16`): Conversations per forward pass.
        batch_by_length (`bool`, *optional*, defaults to `True`):
            Whether to batch conversations of similar length, which saves padding. Rewards come in the given order.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Of the weights: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"` for that of the checkpoint.
        device (`str`, *optional*): Defaults to the trainer's device.
        load_in_8bit (`bool`, *optional*, defaults to `False`): Load the backbone in 8 bit with bitsandbytes.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Load the backbone in 4 bit (nf4, double quantization) with bitsandbytes.
        offload (`bool`, *optional*, defaults to `False`):
            Keep the weights in CPU memory between calls, so that several reward models need the accelerator memory
            of one.
        attn_implementation (`str`, *optional*): As in transformers.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.
        nan (`str`, *optional*, defaults to `"error"`):
            What a score that is not finite becomes: `"error"` raises, `"skip"` gives `None`, an unscored completion.
        self_check (`bool`, *optional*, defaults to `True`): Whether loading checks the direction.

    Raises:
        [`UsageError`]: at construction, for a model or an option that cannot work.
        [`RewardError`]: in a call, naming the model, if the forward pass fails or a score is not finite.
    """

    def __init__(
        self,
        model: str,
        name: str | None = None,
        *,
        sign: int | None = None,
        higher_is: str | None = None,
        template: str | None = None,
        max_length: int = 2048,
        truncation_side: str = "left",
        input_tokenizer: str | None = None,
        batch_size: int = 16,
        batch_by_length: bool = True,
        dtype: str = "bfloat16",
        device: str | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        offload: bool = False,
        attn_implementation: str | None = None,
        revision: str | None = None,
        nan: str = "error",
        self_check: bool = True,
    ):
        if not isinstance(model, (str, Path)) or not str(model):
            raise UsageError(f"model={model!r} of a reward model must be its folder or Hub id.")
        self.model = str(Path(model).expanduser()) if str(model).startswith("~") else str(model)
        self.__name__ = name or self.model.rstrip("/").split("/")[-1]
        who = f"reward model {self.model!r}"
        check_integer("batch_size", batch_size, 1, of=f" of {who}")
        check_integer("max_length", max_length, 2)
        switches = {"batch_by_length": batch_by_length, "offload": offload, "self_check": self_check}
        for switch, value in {**switches, "load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}.items():
            if not isinstance(value, bool):
                raise UsageError(f"{switch}={value!r} of {who} must be true or false.")
        try:
            self.device = None if device is None else torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise UsageError(f"device={device!r} of {who} must be a device such as cpu, cuda or cuda:1.") from error
        if nan not in NON_FINITE:
            raise UsageError(f"nan={nan!r} of {who} must be one of {', '.join(NON_FINITE)}.")
        self.batch_size, self.batch_by_length, self.nan = batch_size, batch_by_length, nan
        self.offload, self.self_check = offload, self_check
        self.attn_implementation, self.revision = attn_implementation, revision
        self.quantization = _quantization(self.model, load_in_8bit, load_in_4bit, offload)
        self.config = read_config(self.model, revision)
        self.dtype = _torch_dtype(dtype, self.config, self.model)
        published = published_direction(self.model, self.config)
        self.sign, self.higher_is = resolve_direction(published, sign, higher_is, self.model)
        tokenizer = read_tokenizer(self.model, revision)
        self.policy_tokenizer = None if input_tokenizer is None else read_tokenizer(input_tokenizer)
        longest = getattr(self.config.get_text_config(), "max_position_embeddings", None) or max_length
        template = resolve_template(
            template, tokenizer, self.model, default="beaver" if is_safe_rlhf(self.config) else "chat"
        )
        # A sequence classifier finds the last token of a row by the padding token of its config, which the tokenizer's
        # need not be; where that is the end of the conversation, it scores the token before.
        self.pad_token_id = padding_token(self.config)
        self.encoder = ConversationEncoder(
            tokenizer,
            template,
            min(max_length, longest),
            truncation_side,
            skipped_end=self.pad_token_id if scores_last_token(self.config) else None,
        )
        self._module: PreTrainedModel | None = None

    def load(self) -> "RewardModel":
        """Loads the weights, if they are not loaded yet, and checks the direction."""
        if self._module is not None:
            return self
        target, count = self._target_device(), torch.cuda.device_count()
        if target.type == "cuda" and (target.index or 0) >= count:
            raise UsageError(
                f"device={str(target)!r} of reward model {self.model!r}: there are {count} CUDA devices here."
            )
        self._module = load_scoring_module(
            self.model,
            self.config,
            dtype=self.dtype,
            device=torch.device("cpu") if self.offload else target,
            quantization=self.quantization,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
        )
        if self.self_check and self.higher_is is not None:
            agreement = check_direction(self.__call__, self.higher_is, self.__name__, self.model)
            logger.info(
                f"reward '{self.__name__}': {agreement:.0%} of the built-in pairs say higher_is={self.higher_is}"
            )
        return self

    def unload(self) -> None:
        """Frees the weights; the next call loads them again."""
        self._module = None

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        full_prompt: Sequence[str | Messages] | None = None,
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Args:
            prompts (`Sequence[str | list[dict]]`): Plain or conversational prompts.
            completions (`Sequence[str | list[dict]]`): One per prompt.
            completion_ids (`Sequence[list[int]]`, *optional*): The policy's tokens, which `input_tokenizer` reads.
            full_prompt (`Sequence[str | list[dict]]`, *optional*): Column with the prompts as they were before
                `long_prompts: truncate_left` shortened them for the policy; read instead of `prompts`.
            **columns: Ignored.

        Returns:
            `list[float | None]`: `sign * score` per completion, in the given order.
        """
        self.load()
        already_cut = self.encoder.num_truncated
        endings = None
        if self.policy_tokenizer is not None and completion_ids is not None:
            endings = [_ending(self.policy_tokenizer, ids) for ids in completion_ids]
        encoded = self.encoder(prompts if full_prompt is None else full_prompt, completions, endings)
        if self.encoder.num_truncated > already_cut:
            logger.warning_once(
                f"reward model {self.model!r} reads at most {self.encoder.max_length} tokens; of longer "
                f"conversations the {self.encoder.truncation_side} end is cut off."
            )
        try:
            scores = self._score(encoded)
        except (RuntimeError, IndexError) as error:
            raise RewardError(
                f"reward model '{self.__name__}' ({self.model}) failed on {len(encoded)} completions: {error}. If "
                "memory ran out, lower its batch_size or max_length, or set offload or load_in_4bit."
            ) from error
        return finite_or(scores, self.sign, self.nan, f"reward model '{self.__name__}' ({self.model})")

    def _score(self, encoded: list[list[int]]) -> list[float]:
        order = list(range(len(encoded)))
        if self.batch_by_length:
            # Longest first: if memory runs out, it does so at once.
            order.sort(key=lambda row: -len(encoded[row]))
        target = self._target_device()
        scores = [0.0] * len(encoded)
        on_target: Any = on_device(self._module, target) if self.offload else nullcontext(self._module)
        with on_target as forward, torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                input_ids, attention_mask = self._pad([encoded[row] for row in rows])
                logits = forward(input_ids=input_ids.to(target), attention_mask=attention_mask.to(target)).logits
                for row, score in zip(rows, logits[:, 0].float().tolist(), strict=True):
                    scores[row] = score
        return scores

    def _pad(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, rows))
        pad_token_id = self.pad_token_id
        if pad_token_id is None:
            # None is set, so that any will do with which no row ends: such a row is scored at its last token.
            ends = {row[-1] for row in rows if row}
            pad_token_id = next(token for token in range(len(rows) + 1) if token not in ends)
            module: Any = self._module  # loaded, since there are rows
            module.config.get_text_config().pad_token_id = pad_token_id
        input_ids = torch.full((len(rows), length), pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, ids in enumerate(rows):
            input_ids[index, : len(ids)] = torch.tensor(ids)
            attention_mask[index, : len(ids)] = 1
        return input_ids, attention_mask

    def _target_device(self) -> torch.device:
        if self.device is not None:
            return self.device
        # The state is not created here: that is the trainer's, which knows whether to use the CPU.
        if PartialState._shared_state:
            return PartialState().device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_tokenizer(model: str, revision: str | None = None) -> Any:
    """The tokenizer of a reward model. Raises [`UsageError`] if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises a bare one for a damaged file
        raise UsageError(f"the tokenizer of reward model {model!r} cannot be read: {error}") from error


def trl_scores_another_token(model: str, config: Any) -> bool:
    """
    Whether TRL, which sets a classifier's padding token to its tokenizer's, or else to the end of sequence, makes it
    score another token at the end of a conversation than the checkpoint by itself does.
    """
    tokenizer = read_tokenizer(model)
    if tokenizer.chat_template is None or not scores_last_token(config):
        return False
    chat = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    ids = tokenizer(render_chat(tokenizer, [chat])[0], add_special_tokens=False)["input_ids"]
    last = ids[-1] if ids else None
    trl_pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return (last == trl_pad) != (last == padding_token(config))


def _ending(tokenizer: Any, ids: Sequence[int]) -> str:
    """The special token that closed a completion, if it is not the tokenizer's end token."""
    last = tokenizer.added_tokens_decoder.get(int(ids[-1])) if len(ids) > 0 else None
    return str(last) if last is not None and last.special and str(last) != tokenizer.eos_token else ""


def finite_or(scores: Sequence[float | None], sign: int, nan: str, who: str) -> list[float | None]:
    """`sign * score` per row; a score that is not finite becomes `None` (`nan="skip"`) or raises [`RewardError`]."""
    rewards: list[float | None] = []
    for row, score in enumerate(scores):
        if score is None or not math.isfinite(score):
            if nan == "error":
                raise RewardError(
                    f"{who} gave {score} for completion {row} of {len(scores)}. Set nan: skip to leave such "
                    "completions unscored; if it happens often, try another dtype."
                )
            rewards.append(None)
        else:
            rewards.append(sign * score)
    return rewards


def _torch_dtype(dtype: str, config: Any, model: str) -> torch.dtype:
    if dtype == "auto":
        return config.dtype or torch.float32
    named = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if dtype not in named:
        raise UsageError(f"dtype={dtype!r} of reward model {model!r} must be one of {', '.join([*named, 'auto'])}.")
    return named[dtype]


def _quantization(model: str, load_in_8bit: bool, load_in_4bit: bool, offload: bool) -> dict[str, Any] | None:
    if not (load_in_8bit or load_in_4bit):
        return None
    if load_in_8bit and load_in_4bit:
        raise UsageError(f"reward model {model!r}: set load_in_8bit or load_in_4bit, not both.")
    if offload:
        raise UsageError(f"reward model {model!r}: quantized weights cannot be offloaded; leave offload out.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"reward model {model!r}: 8-bit and 4-bit loading need bitsandbytes. Install it with "
            "`pip install bitsandbytes`."
        )
    if load_in_8bit:
        return {"load_in_8bit": True}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
