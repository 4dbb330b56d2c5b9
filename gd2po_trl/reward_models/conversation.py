"""A prompt and a completion as the token ids that a reward model was trained to read."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..messages import Messages, text_of, written_text


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION_SIDES = ("left", "right")


def check_integer(name: str, value: Any, minimum: int, of: str = "") -> None:
    """Raise [`UsageError`] unless the option `name`, of a model, is a whole number of at least `minimum`."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < minimum:
        raise UsageError(f"{name}={value!r}{of} must be {f'at least {minimum}' if is_whole else 'a whole number'}.")


def resolve_template(
    template: str | None, tokenizer: "PreTrainedTokenizerBase | None", model: str, default: str = "chat"
) -> str:
    """
    The template of a reward model, or else `default`: `"chat"` for its tokenizer's chat template; `"beaver"` for
    `BEGINNING OF CONVERSATION: USER: {prompt} ASSISTANT:{response}` and the end-of-sequence token, with earlier turns
    as safe-rlhf's `format_prompt` writes them; any other text must contain `{prompt}` and `{response}`.

    Raises:
        [`UsageError`]: for a template that cannot work.
    """
    template = default if template is None else template
    if not isinstance(template, str):
        raise UsageError(f"template={template!r} of reward model {model!r} must be a text.")
    if template == "chat":
        if getattr(tokenizer, "chat_template", None) is None:
            raise UsageError(
                f"reward model {model!r} comes without a chat template; set template to 'beaver' "
                "(PKU-Alignment/beaver-7b-*) or to a text with {prompt} and {response}."
            )
        render_chat(tokenizer, [[{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]])
    elif template != "beaver" and not ("{prompt}" in template and "{response}" in template):
        raise UsageError(
            f"template={template!r} of reward model {model!r} must be 'chat', 'beaver', or a text with {{prompt}} and "
            "{response}."
        )
    return template


def render_chat(tokenizer: Any, conversations: list[Messages]) -> list[str]:
    """
    Conversations as texts in the chat template of a reward model's tokenizer.

    Raises:
        [`UsageError`]: if the template refuses one, a system message for example.
    """
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False)
    except Exception as error:  # whatever the code in the template raises
        roles = sorted({str(message.get("role")) for conversation in conversations for message in conversation})
        raise UsageError(
            f"the chat template of reward model {tokenizer.name_or_path!r} refuses a conversation with the roles "
            f"{', '.join(roles)}: {error}. Set template to a text with {{prompt}} and {{response}}, or mend the "
            "template."
        ) from error


def render(prompt: str | Messages, completion: str | Messages, template: str, eos_token: str) -> str:
    """
    One conversation in the `"beaver"` template or in a text with `{prompt}` and `{response}`.

    In a text, an earlier turn of a multi-turn prompt becomes a line `Role: content`. The response is what the policy
    wrote, see [`~messages.written_text`]. The end-of-sequence token after the response is not part of the result.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    response = written_text(completion)
    if template == "beaver":
        return "BEGINNING OF CONVERSATION: " + _beaver_turns(turns, eos_token) + response
    if len(turns) == 1:
        context = text_of(turns[0])
    else:
        context = "\n".join(f"{turn['role'].capitalize()}: {text_of(turn)}" for turn in turns)
    values = {"{prompt}": context, "{response}": response}
    # In one pass, so that a placeholder inside the prompt stays text.
    return re.sub(r"\{prompt\}|\{response\}", lambda match: values[match.group()], template)


def _beaver_turns(turns: Messages, eos_token: str) -> str:
    # The template has no place for a system prompt, so it goes in front of the user's first words.
    pieces, pending = [], []
    for turn in turns:
        if turn["role"] == "assistant":
            pieces.append(text_of(turn) + eos_token)
        elif turn["role"] == "system":
            pending.append(text_of(turn))
        else:
            words = "\n\n".join([*pending, text_of(turn)])
            pieces.append(f"USER: {words} ASSISTANT:")
            pending = []
    return "".join(pieces)


class ConversationEncoder:
    """
    Turns prompts and completions, conversational or plain, into token ids.

    A special token that a completion spells out is broken up with a space first: a policy must not close its own
    turn and write the user's next one.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The reward model's tokenizer.
        template (`str`): From [`resolve_template`].
        max_length (`int`): Longest conversation in tokens.
        truncation_side (`str`): Which end of a longer conversation is cut off: `"left"` drops the oldest tokens after
            the beginning-of-sequence token and keeps the end, where the score is read.
        skipped_end (`int`, *optional*): Token id that the model takes for padding where it ends a conversation: it
            scores the last other token. Such ends are left out, so that a server which scores the last token agrees.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        max_length: int,
        truncation_side: str,
        skipped_end: int | None = None,
    ):
        check_integer("max_length", max_length, 2)
        if truncation_side not in TRUNCATION_SIDES:
            raise UsageError(f"truncation_side={truncation_side!r} must be one of {', '.join(TRUNCATION_SIDES)}.")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.truncation_side = truncation_side
        self.skipped_end = skipped_end
        self.num_truncated = 0
        ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        # No model reads a conversation of no token at all.
        self._stand_in = next((token for token in ends if token is not None), 0)
        specials = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted({*specials, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def __call__(
        self,
        prompts: Sequence[str | Messages],
        completions: Sequence[str | Messages],
        endings: Sequence[str] | None = None,
    ) -> list[list[int]]:
        """
        Token ids per conversation, not padded, at most `max_length` each; counts cut ones in `num_truncated`.
        `endings` are texts to put after the completions as they are, special tokens included.
        """
        if not prompts:
            return []
        endings = [""] * len(prompts) if endings is None else endings
        completions = [
            self._defuse(written_text(completion)) + ending
            for completion, ending in zip(completions, endings, strict=True)
        ]
        if self.template == "chat":
            conversations = [
                _as_messages(prompt, "user") + _as_messages(completion, "assistant")
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            texts = [_encodable(text) for text in render_chat(self.tokenizer, conversations)]
            # The template has written the special tokens already.
            encoded = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        else:
            eos = self.tokenizer.eos_token or ""
            pairs = zip(prompts, completions, strict=True)
            texts = [_encodable(render(prompt, completion, self.template, eos)) for prompt, completion in pairs]
            encoded = self.tokenizer(texts)["input_ids"]
            if self.template == "beaver" and eos:
                end = self.tokenizer.eos_token_id
                encoded = [ids if ids and ids[-1] == end else [*ids, end] for ids in encoded]
        return [self._without_skipped_end(self._truncate(ids or [self._stand_in])) for ids in encoded]

    def _truncate(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.max_length:
            return ids
        self.num_truncated += 1
        if self.truncation_side == "right":
            return ids[: self.max_length]
        starts = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        if ids[0] in starts:
            return [ids[0], *ids[len(ids) - self.max_length + 1 :]]
        return ids[-self.max_length :]

    def _without_skipped_end(self, ids: list[int]) -> list[int]:
        end = len(ids)
        while end > 1 and ids[end - 1] == self.skipped_end:
            end -= 1
        return ids[:end]

    def _defuse(self, completion: str) -> str:
        if self._specials is None:
            return completion
        return self._specials.sub(lambda match: f"{match.group()[:1]} {match.group()[1:]}", completion)


def _encodable(text: str) -> str:
    """`text` without halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _as_messages(text: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": text}] if isinstance(text, str) else list(text)
