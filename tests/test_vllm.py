"""
The real vLLM engine in colocate mode: `make test-vllm`.

Where vLLM is not installed, as in the environment of `make test`, these tests are skipped; CI runs them on request.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from tiny import letters_dataset, low_bytes, save_tiny_policy, spread_bytes, tiny_args


pytestmark = pytest.mark.skipif(
    find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` makes an environment that has it"
)

# vLLM on a CPU wants to know how much memory it may take, and compiles for minutes unless told not to.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")


def test_three_steps_through_the_real_engine(tmp_path):
    import vllm._custom_ops

    from gd2po_trl import GD2POTrainer, compute_advantages

    if not torch.cuda.is_available():
        # vLLM's oneDNN kernels pack a copy of the weights on the CPU and would not see those that TRL syncs.
        vllm._custom_ops._supports_onednn = False
    policy = save_tiny_policy(
        tmp_path / "policy", hidden_size=64, intermediate_size=128, max_position_embeddings=256, torch_dtype="float32"
    )
    trainer = GD2POTrainer(
        str(policy),
        [low_bytes, spread_bytes],
        tiny_args(
            tmp_path / "run",
            use_cpu=not torch.cuda.is_available(),
            max_steps=3,
            max_completion_length=16,
            learning_rate=1e-2,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.2,
            vllm_max_model_length=128,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=letters_dataset(),
    )
    rewards, outputs = [], []
    calculate, generate = trainer._calculate_rewards, trainer._generate_and_score_completions

    def keep_rewards(*args, **kwargs):
        rewards.append(calculate(*args, **kwargs))
        return rewards[-1]

    def keep_output(inputs):
        outputs.append(generate(inputs))
        return outputs[-1]

    trainer._calculate_rewards, trainer._generate_and_score_completions = keep_rewards, keep_output
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    trainer.train()

    assert len(outputs) == 3
    for reward, output in zip(rewards, outputs, strict=True):
        expected = compute_advantages(reward, 4, token_counts=output["completion_mask"].sum(1))
        assert torch.equal(output["advantages"], expected.advantages.to(output["advantages"].device))
        # What TRL derives from the engine's log-probabilities is as TRL left it.
        mask = output["completion_mask"].bool()
        ratio = torch.exp((output["old_per_token_logps"] - output["sampling_per_token_logps"]) * mask)
        assert output["importance_sampling_ratio"].shape[0] == len(reward)
        if output["importance_sampling_ratio"].shape == ratio.shape:
            assert torch.allclose(output["importance_sampling_ratio"], ratio.clamp(max=3.0), atol=1e-5)

    moved = max((value - before[name]).abs().max().item() for name, value in trainer.model.named_parameters())
    history = [entry for entry in trainer.state.log_history if "reward" in entry]
    difference = [entry["sampling/sampling_logp_difference/mean"] for entry in history]
    print(f"largest change of a parameter {moved:.4f}; mean difference of log-probabilities {difference}")
    assert moved > 1e-2
    # Old log-probabilities and the update ran packed.
    assert trainer._update.packing_off is None and trainer._update._checked
    # Without the sync of the weights, the difference would grow with every step.
    assert max(difference) < 5e-3
