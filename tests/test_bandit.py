"""The bandit benchmark: its seeds do not mix, its gradient is the policy gradient, its tables say what it computed."""

import itertools
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import bandit
from bandit_report import markdown, summarize, total_at


THREE = bandit.Rewards((1.0, 1.0, 0.5), correlation=-0.2)
EVERY_ESTIMATOR = {**bandit.ESTIMATORS, **bandit.ABLATION, **bandit.BUDGET}
WEIGHTS = torch.ones(3)


@pytest.mark.parametrize("name", EVERY_ESTIMATOR)
def test_batch_statistics_stay_within_a_seed(name):
    generator = torch.Generator().manual_seed(0)
    rewards, draw = torch.randn(5, 16, 3, generator=generator), torch.rand(5, 16, generator=generator)
    estimate = lambda r, d: EVERY_ESTIMATOR[name](r, d, 4, WEIGHTS)  # noqa: E731
    together = torch.func.vmap(estimate)(rewards, draw)
    alone = torch.stack([estimate(r, d) for r, d in zip(rewards, draw, strict=True)])
    torch.testing.assert_close(together, alone)
    assert together.any()


def test_controls_train_the_share_that_hard_trains():
    generator = torch.Generator().manual_seed(0)
    rewards, draw = torch.randn(64, 3, generator=generator), torch.rand(64, generator=generator)
    hard = bandit.ESTIMATORS["gd2po_hard"](rewards, draw, 4, WEIGHTS)
    largest = bandit.ESTIMATORS["largest, same share"](rewards, draw, 4, WEIGHTS)
    at_random = bandit.ESTIMATORS["random, same share"](rewards, draw, 4, WEIGHTS)
    masked = bandit.ABLATION["gdpo + filter after whitening"](rewards, draw, 4, WEIGHTS)
    plain = bandit.ESTIMATORS["gdpo"](rewards, draw, 4, WEIGHTS)
    assert (largest != 0).sum() == (at_random != 0).sum() == (hard != 0).sum() < 64
    assert torch.equal(masked, torch.where(hard != 0, plain, 0.0))


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize("choice", ["budget", "uniform", "size", "variance"])
def test_every_choice_trains_the_share_it_is_given(choice, share):
    generator = torch.Generator().manual_seed(0)
    rewards, draw = torch.randn(64, 3, generator=generator), torch.rand(64, generator=generator)
    plain = bandit.BUDGET["gdpo"](rewards, draw, 8, WEIGHTS)
    chosen = bandit.Estimator(bandit.GDPO, share=share, choice=choice)(rewards, draw, 8, WEIGHTS)
    assert (chosen != 0).sum() == 64 * share
    if choice == "size":
        assert plain[chosen == 0].abs().max() <= plain[chosen != 0].abs().min()
    if choice == "uniform":
        assert torch.equal(chosen[chosen != 0], plain[chosen != 0] / share)


def test_pods_chooses_the_subset_of_largest_variance():
    rewards = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    combined = bandit.compute_advantages(rewards, 6, **bandit.GDPO).combined.view(2, 6)
    chosen = bandit.Estimator(bandit.GDPO, share=0.5, choice="variance")(rewards, torch.rand(12), 6, torch.ones(2))
    for group, mask in zip(combined, (chosen != 0).view(2, 6), strict=True):
        best = max(itertools.combinations(range(6), 3), key=lambda subset: group[list(subset)].var())
        assert mask.nonzero().squeeze(1).tolist() == list(best)


def test_equal_units_undo_the_scale_of_a_reward():
    settings = {"num_seeds": 2, "seed": 0, "learning_rate": 0.3, "steps": 5}
    estimator = bandit.BUDGET["no division, equal units"]
    even, _ = bandit.simulate(bandit.Rewards((1.0, 1.0)), estimator, **settings)
    scaled, _ = bandit.simulate(bandit.Rewards((4.0, 0.25)), estimator, **settings)
    torch.testing.assert_close(even, scaled, rtol=1e-3, atol=1e-4)


def test_gradient_is_that_of_autograd():
    world = bandit.make_world(THREE, num_seeds=2, seed=0)
    theta = torch.randn(2, bandit.FEATURES, requires_grad=True)
    log_probabilities = (world.features @ theta.unsqueeze(2)).view(2, bandit.PROMPTS, bandit.ACTIONS).log_softmax(-1)
    offsets = torch.arange(bandit.PROMPTS).unsqueeze(1) * bandit.ACTIONS
    index = (torch.randint(bandit.ACTIONS, (2, bandit.PROMPTS, 4)) + offsets).view(2, -1)
    advantages = torch.randn(index.shape)
    loss = -(advantages * log_probabilities.view(2, -1).gather(1, index)).mean(1).sum()
    (expected,) = torch.autograd.grad(loss, theta)
    actual = bandit.policy_gradient(world, log_probabilities.detach().exp(), index, advantages)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_world_has_the_chosen_correlation():
    world = bandit.make_world(bandit.Rewards((1.0, 1.0), correlation=-0.5), num_seeds=200, seed=0)
    assert world.values.mean(1).abs().max() < 1e-4
    assert torch.allclose(world.values.std(1), torch.ones(200, 2), atol=1e-4)
    correlation = (world.values[..., 0] * world.values[..., 1]).mean()
    assert correlation == pytest.approx(-0.5, abs=0.05)


def test_training_improves_every_method_and_is_reported():
    curves = {
        name: bandit.simulate(THREE, estimator, num_seeds=3, seed=0, learning_rate=0.3, steps=20)
        for name, estimator in bandit.ESTIMATORS.items()
    }
    for values, trained in curves.values():
        assert values.shape == (3, 21, 3)
        assert trained.shape == (3, 20)
        assert (values[:, -1].sum(1) > values[:, 0].sum(1) + 1).all()
    entries = summarize(curves, dict.fromkeys(curves, 0.3), baseline="gdpo")
    hard = next(entry for entry in entries if entry["method"] == "gd2po_hard")
    totals = {name: values[:, -1].sum(1) for name, (values, _) in curves.items()}
    difference = (totals["gd2po_hard"] - totals["gdpo"]).mean().item()
    assert hard["against_baseline"]["total"]["mean"] == pytest.approx(difference)
    table = markdown(
        {"experiments": [{"title": "t", "methods": entries, "learning_rate_per_method": True, "show_each": True}]}
    )
    assert f"{difference:+.3f}" in table
    families = [
        {"title": f"t: {name}", "methods": entries, "learning_rate_per_method": False, "show_each": False}
        for name in "ab"
    ]
    overview = markdown({"experiments": families}).split("**t: Δ total / Δ worst**")[1]
    assert "| method | a | b |" in overview
    assert overview.count(f"{difference:+.3f}") == 2


def test_baseline_at_an_equal_number_of_updates():
    values = torch.arange(5.0).view(1, 5, 1)  # worth 0 before the first step, 4 after the last
    trained = torch.ones(1, 4)
    assert total_at(values, trained, torch.tensor([1.0])).item() == 1
    assert total_at(values, trained, torch.tensor([2.5])).item() == 3
    assert total_at(values, trained, torch.tensor([4.0])).item() == 4
