"""The token-chain benchmark: exact values, its gradient, and that it learns."""

import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import token_chains as chains
from bandit import BUDGET, Rewards


THREE = Rewards((1.0, 1.0, 1.0))


def random_policy(num_seeds=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_seeds, chains.TOKENS, chains.TOKENS, generator=generator).softmax(-1)


def sampled_values(policy, tables, size=40_000):
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(chains.TOKENS, (1, size), generator=generator)
    steps = chains.sample(policy, prompts, generator)
    return tables[0].flatten(1)[:, steps[0]].sum(-1)


def test_exact_values_are_the_mean_of_samples():
    tables, policy = chains.make_tables(THREE, 1, seed=0), random_policy()
    values = sampled_values(policy, tables)
    error = values.std(1) / values.shape[1] ** 0.5
    assert ((values.mean(1) - chains.exact_values(policy, tables)[0]).abs() < 5 * error).all()


def test_rewards_have_mean_0_and_variance_1_under_the_first_policy():
    tables = chains.make_tables(THREE, 1, seed=0)
    values = sampled_values(torch.full((1, chains.TOKENS, chains.TOKENS), 1 / chains.TOKENS), tables)
    assert values.mean(1).tolist() == pytest.approx([0.0] * 3, abs=0.03)
    assert values.std(1).tolist() == pytest.approx([1.0] * 3, abs=0.03)


def test_gradient_is_that_of_autograd():
    theta = torch.randn(2, chains.TOKENS, chains.TOKENS, requires_grad=True)
    steps = torch.randint(chains.TOKENS**2, (2, 8, chains.LENGTH))
    advantages = torch.randn(2, 8)
    log_probabilities = theta.log_softmax(-1).flatten(1).gather(1, steps.flatten(1)).view(2, 8, chains.LENGTH).sum(2)
    (expected,) = torch.autograd.grad(-(advantages * log_probabilities).mean(1).sum(), theta)
    actual = chains.policy_gradient(theta.detach().softmax(-1), steps, advantages)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gdpo", "no division, equal units, budget 1/4", "gd2po_hard"])
def test_training_improves(name):
    values, trained = chains.simulate(THREE, BUDGET[name], num_seeds=2, seed=0, steps=20)
    assert values.shape == (2, 21, 3) and trained.shape == (2, 20)
    assert (values[:, -1].sum(1) > values[:, 0].sum(1) + 1).all()
