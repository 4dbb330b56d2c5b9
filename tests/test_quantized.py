"""Policies and reward models in 4 bit on a CPU, with bitsandbytes: they train, save, load again and score."""

import json

import pytest
import torch
import yaml
from tiny import save_tiny_policy, save_tiny_reward_model, tiny_settings

from gd2po_trl.recipe import load_recipe
from gd2po_trl.reward_models.in_process import RewardModel
from gd2po_trl.training import run_recipe


bitsandbytes = pytest.importorskip("bitsandbytes", minversion="0.50", reason="4 bit on a CPU needs bitsandbytes 0.50")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    # Blocks of NF4 have 64 values.
    return save_tiny_policy(tmp_path_factory.mktemp("policy"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory, policy):
    """A QLoRA run, and where it wrote its adapter."""
    folder = tmp_path_factory.mktemp("qlora")
    data = folder / "data.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"say {letter}"}) for letter in "abcdefgh"))
    settings = {
        **tiny_settings(folder / "out"),
        "model_name_or_path": str(policy),
        "dataset_path": str(data),
        "reward_funcs": ["tiny.low_bytes", "tiny.spread_bytes"],
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "lora_target_modules": ["all-linear"],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return run_recipe(load_recipe(folder / "recipe.yaml")), folder / "out"


def four_bit_layers(model) -> list:
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def test_the_policy_trains_in_4_bit(run):
    trainer, _ = run
    layers = four_bit_layers(trainer.model)
    # q, k, v, o, gate, up and down of both layers; the output layer stays as it is.
    assert len(layers) == 14
    assert {(layer.weight.quant_state.quant_type, layer.weight.dtype) for layer in layers} == {("nf4", torch.uint8)}
    assert all(layer.weight.quant_state.nested for layer in layers)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    log = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(log) == 2 and all(entry["grad_norm"] > 0 for entry in log)
    # An adapter starts as 0 in its second factor.
    moved = [parameter for name, parameter in trainer.model.named_parameters() if "lora_B" in name]
    assert any(bool(parameter.any()) for parameter in moved)


def test_the_adapter_loads_again_on_4_bit_weights(run, policy):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    trainer, folder = run
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(policy, quantization_config=quantization, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    assert len(four_bit_layers(loaded)) == 14
    input_ids = torch.arange(10, 30).unsqueeze(0)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=input_ids).logits.float()
        difference = (loaded(input_ids=input_ids).logits.float() - expected).abs().max()
        with loaded.disable_adapter():
            effect = (loaded(input_ids=input_ids).logits.float() - expected).abs().max()
    # TRL trains the adapter of a quantized policy in bfloat16, and it is loaded in float32.
    assert difference < 0.1 * effect


def test_the_trained_policy_is_evaluated(run):
    """As `gd2po eval` loads it: the folder of the adapter alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, folder = run
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(["say a"], return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert generated.shape == (1, inputs["input_ids"].size(1) + 4)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_reward_models_score_in_low_precision(tmp_path, bits):
    folder = save_tiny_reward_model(tmp_path / "model", hidden_size=64, intermediate_size=128)
    settings = {"device": "cpu", "dtype": "float32", "self_check": False, "sign": 1, "template": "{prompt}{response}"}
    full = RewardModel(str(folder), **settings)
    quantised = RewardModel(str(folder), **settings, **{bits: True})
    prompts, completions = ["say a"] * 4, ["a", "bcd", "x" * 20, "what"]
    expected, scores = full(prompts, completions), quantised(prompts, completions)
    kind = bitsandbytes.nn.Linear4bit if bits == "load_in_4bit" else bitsandbytes.nn.Linear8bitLt
    layers = [name for name, module in quantised._module.named_modules() if isinstance(module, kind)]
    assert len(layers) == 14 and not any("score" in name for name in layers)
    assert scores != expected
    assert torch.corrcoef(torch.tensor([scores, expected]))[0, 1] > 0.9
