"""The quickstart's policy: a Llama of about 0.1 M parameters, and a tokenizer whose words are text fragments."""

import re
from typing import TYPE_CHECKING

from .task import vocabulary


if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def build_tokenizer() -> "PreTrainedTokenizerFast":
    """
    Builds the word-level tokenizer of the task.

    A text is cut into the longest known fragments from left to right, and each fragment is one token, so that
    decoding gives back the text exactly. Text outside the vocabulary becomes `<unk>`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fragments = vocabulary()
    ids = {token: index for index, token in enumerate([PAD, EOS, UNK, *fragments])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    # The first alternative that matches wins, so longer fragments go first.
    pattern = "|".join(re.escape(fragment) for fragment in sorted(fragments, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_policy(tokenizer: "PreTrainedTokenizerFast", seed: int) -> "LlamaForCausalLM":
    """
    Builds an untrained policy.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Gives the vocabulary size and the special tokens.
        seed (`int`): Seed of the initial weights.

    Returns:
        `LlamaForCausalLM`: Two layers of width 64, float32, about 0.1 M parameters.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
