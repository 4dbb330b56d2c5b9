"""
What GD²PO buys, and when: a contextual bandit in which hundreds of seeds cost a minute.

    python benchmarks/bandit.py --output outputs/bandit

A prompt is a context, a completion one of its actions. The policy is a softmax over features shared by all prompts,
trained on-policy on what `gd2po_trl.compute_advantages` returns. K rewards with a chosen correlation, noise and scale
are linear in the features. Every value reported is exact: the reward's expectation under the policy, in standard
deviations of the reward over all actions. All seeds are trained at once; whitening and every other statistic of a
batch stays within its seed (`torch.func.vmap`).

Writes `bandit.json` (all settings, every seed's result, intervals, tests) and `bandit.md` (the tables).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from bandit_report import markdown, summarize

from gd2po_trl import METHODS, compute_advantages
from gd2po_trl.advantages import subsample_at


PROMPTS, ACTIONS, FEATURES = 64, 64, 16
STEPS = 300
# Learning rates from which each method gets its own, on seeds that are used for nothing else.
LEARNING_RATES = {"adam": [0.03, 0.1, 0.3, 1.0, 3.0, 10.0], "sgd": [10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]}
DEFAULT_LEARNING_RATE = {"adam": 0.1, "sgd": 10.0}
TUNING_SEED = 10_000


@dataclass(frozen=True)
class Rewards:
    """
    The rewards of a bandit.

    Args:
        scales (`tuple[float, ...]`): What each reward is multiplied by; its length is K.
        correlation (`float`): Correlation of every pair of rewards over the actions.
        noise (`tuple[float, ...]` or `float`): Standard deviation of the noise on each observed reward, in standard
            deviations of the reward.
        binary (`bool`): Whether a reward is 1 where it (noise included) exceeds its mean and 0 elsewhere.
        weights (`tuple[float, ...]`, *optional*): Reward weights given to the estimator.
    """

    scales: tuple[float, ...]
    correlation: float = 0.0
    noise: tuple[float, ...] | float = 0.5
    binary: bool = False
    weights: tuple[float, ...] | None = None

    @property
    def is_even(self) -> bool:
        """Whether all rewards have the same scale and noise."""
        return len(set(self.scales)) == 1 and not isinstance(self.noise, tuple)


@dataclass(frozen=True)
class Estimator:
    """
    How rewards become advantages: settings of `compute_advantages`, or a control built on it.

    Args:
        settings (`dict`): Keyword arguments of `compute_advantages`.
        sum_first (`bool`): Sum the rewards, then normalize: GRPO.
        equal_units (`bool`): Multiply a reward's weight by 1 / its within-group spread, measured on the first batch.
        control (`str`, *optional*): `"random"` and `"largest"` are GDPO on as many rollouts as Hard would keep, drawn
            at random or with the largest |advantage|. `"filter"` is GDPO's whitened advantages, set to 0 where
            rewards conflict. `"weighting"` is GDPO with the consensus weight but without the filter.
        share (`float`): Which share of the rollouts is trained; 1 all that have an advantage.
        choice (`str`): How they are chosen: `"budget"` as `update_share` does, `"uniform"` at random, each counting
            1 / `share` times as much, `"size"` those with the largest |advantage|, `"variance"` in each group those
            among whose sums of normalized rewards the variance is largest, normalized anew (PODS).
        group_size (`int`, *optional*): Rollouts per prompt, where it is not the experiment's.
    """

    settings: dict
    sum_first: bool = False
    equal_units: bool = False
    control: str | None = None
    share: float = 1.0
    choice: str = "budget"
    group_size: int | None = None

    def __call__(self, rewards: torch.Tensor, draw: torch.Tensor, group_size: int, weights) -> torch.Tensor:
        """
        Advantages `(B,)` of one seed from its rewards `(B, K)`, uniform random numbers `draw` `(B,)` and the rewards'
        weights `(K,)`.
        """
        if self.share < 1 and self.choice == "variance":
            return self._largest_variance(rewards, group_size, weights)
        advantages = self._advantages(rewards, draw, group_size, weights)
        if self.share == 1:
            return advantages
        if self.choice == "budget":
            return subsample_at(advantages, self.share, draw[0])
        priority = draw if self.choice == "uniform" else advantages.abs()
        chosen = priority.argsort(descending=True).argsort() < round(self.share * len(draw))
        return torch.where(chosen, advantages, 0.0) / (self.share if self.choice == "uniform" else 1.0)

    def _largest_variance(self, rewards: torch.Tensor, group_size: int, weights) -> torch.Tensor:
        combined = compute_advantages(rewards, group_size, reward_weights=weights, **self.settings).combined
        descending, order = combined.view(-1, group_size).sort(dim=1, descending=True)
        size = round(self.share * group_size)
        # The subset of the largest variance is made of the highest and the lowest: try how many of each.
        rank = torch.arange(group_size)
        subsets = torch.stack([(rank < high) | (rank >= group_size - size + high) for high in range(size + 1)])
        members = torch.stack([descending[:, subset.nonzero().squeeze(1)] for subset in subsets])
        best = subsets[members.var(2).argmax(0)]
        chosen = torch.zeros_like(best).scatter(1, order, best)
        values = torch.where(chosen, combined.view(-1, group_size), torch.nan).view(-1, 1)
        return compute_advantages(values, group_size, conflict_filter=None, whitening=None).advantages

    def _advantages(self, rewards: torch.Tensor, draw: torch.Tensor, group_size: int, weights) -> torch.Tensor:
        if self.sum_first:
            total = (rewards * weights).sum(1, keepdim=True)
            return compute_advantages(total, group_size, **self.settings).advantages
        if self.control is None:
            return compute_advantages(rewards, group_size, reward_weights=weights, **self.settings).advantages
        hard = compute_advantages(rewards, group_size, reward_weights=weights, **preset("gd2po_hard"))
        if self.control == "filter":
            plain = compute_advantages(rewards, group_size, reward_weights=weights, **self.settings)
            return plain.advantages * hard.kept
        if self.control == "weighting":
            # Group means of `combined` are 0, so that passing it as the only reward leaves only the whitening to do.
            weighted = (hard.combined * hard.consensus).unsqueeze(1)
            return compute_advantages(weighted, group_size, scale_rewards="none", **self.settings).advantages
        priority = draw if self.control == "random" else hard.combined.abs()
        keep = priority.argsort(descending=True).argsort() < hard.kept.sum()
        return compute_advantages(
            rewards, group_size, reward_weights=weights, token_counts=keep.to(rewards.dtype), **self.settings
        ).advantages


def preset(method: str, **changes) -> dict:
    """What a method of `METHODS` passes to `compute_advantages`, with `changes`."""
    settings = {key: METHODS[method][key] for key in ("conflict_filter", "consensus_weighting")}
    return {**settings, **changes}


GDPO = preset("gdpo")
ESTIMATORS: dict[str, Estimator] = {
    "grpo": Estimator(preset("grpo", whitening=None), sum_first=True),
    "gdpo": Estimator(GDPO),
    "gd2po_hard": Estimator(preset("gd2po_hard")),
    "gd2po_snr": Estimator(preset("gd2po_snr")),
    "random, same share": Estimator(GDPO, control="random"),
    "largest, same share": Estimator(GDPO, control="largest"),
}
# Every line changes one thing against an earlier one.
ABLATION: dict[str, Estimator] = {
    "gdpo": Estimator(GDPO),
    "gdpo, whitening scales only": Estimator(preset("gdpo", whitening_shift_mean=False)),
    "gdpo, no whitening": Estimator(preset("gdpo", whitening=None)),
    "gdpo + filter after whitening": Estimator(GDPO, control="filter"),
    "gdpo + weighting": Estimator(GDPO, control="weighting"),
    "no whitening: filter": Estimator(preset("gd2po_hard", consensus_weighting=None, whitening=None)),
    "no whitening: filter + weighting": Estimator(preset("gd2po_hard", whitening=None)),
    "filter, whitening of kept": Estimator(preset("gd2po_hard", consensus_weighting=None)),
    "gd2po_hard, whitening scales only": Estimator(preset("gd2po_hard", whitening_shift_mean=False)),
    "gd2po_hard, weighting after whitening": Estimator(preset("gd2po_hard", consensus_weighting="after_whitening")),
    "gd2po_hard": Estimator(preset("gd2po_hard")),
}
TAUS = {
    "gdpo": Estimator(GDPO),
    **{f"snr {tau:g}": Estimator(preset("gd2po_snr", snr_threshold=tau)) for tau in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0)},
    "gd2po_hard": Estimator(preset("gd2po_hard")),
}

NO_DIVISION = preset("gdpo", scale_rewards="none")
# What divides a reward, and a budget for the update against other ways to train fewer rollouts.
BUDGET: dict[str, Estimator] = {
    "grpo": Estimator(preset("grpo", whitening=None), sum_first=True),
    "gdpo": Estimator(GDPO),
    "gdpo, budget 1/2": Estimator(GDPO, share=0.5),
    "gdpo, budget 1/4": Estimator(GDPO, share=0.25),
    "no division": Estimator(NO_DIVISION),
    "no division, equal units": Estimator(NO_DIVISION, equal_units=True),
    "no division, equal units, budget 1/2": Estimator(NO_DIVISION, equal_units=True, share=0.5),
    "no division, equal units, budget 1/4": Estimator(NO_DIVISION, equal_units=True, share=0.25),
    "gd2po_hard": Estimator(preset("gd2po_hard")),
    "gd2po_hard, budget 1/2": Estimator(preset("gd2po_hard"), share=0.5),
    "gd2po_hard, budget 1/4": Estimator(preset("gd2po_hard"), share=0.25),
    "gd2po_hard, no division, equal units": Estimator(preset("gd2po_hard", scale_rewards="none"), equal_units=True),
    "gdpo, uniform 1/2": Estimator(GDPO, share=0.5, choice="uniform"),
    "gdpo, uniform 1/4": Estimator(GDPO, share=0.25, choice="uniform"),
    "gdpo, largest 1/2": Estimator(GDPO, share=0.5, choice="size"),
    "gdpo, largest 1/4": Estimator(GDPO, share=0.25, choice="size"),
    "gdpo, PODS 1/2": Estimator(GDPO, share=0.5, choice="variance"),
    "no division, equal units, uniform 1/4": Estimator(NO_DIVISION, equal_units=True, share=0.25, choice="uniform"),
}
# The same number of rollouts in the update, drawn from groups of 4, 8 and 16.
EQUAL_COST: dict[str, Estimator] = {
    "gdpo": Estimator(GDPO),
    "gdpo, 16 rollouts, budget 1/4": Estimator(GDPO, share=0.25, group_size=16),
    **{
        f"no division, equal units{way}": Estimator(
            NO_DIVISION, equal_units=True, share=4 / size, choice=choice, group_size=size
        )
        for way, choice, size in (
            ("", "budget", 4),
            (", 8 rollouts, budget 1/2", "budget", 8),
            (", 16 rollouts, budget 1/4", "budget", 16),
            (", 16 rollouts, PODS 1/4", "variance", 16),
            (", 16 rollouts, largest 1/4", "size", 16),
        )
    },
}


@dataclass(frozen=True)
class Experiment:
    """One table: estimators compared on one bandit. `tuned` gives each its own learning rate."""

    title: str
    rewards: Rewards
    estimators: dict[str, Estimator] = field(default_factory=lambda: ESTIMATORS)
    optimizer: str = "adam"
    group_size: int = 4
    steps: int = STEPS
    tuned: bool = False
    show_each: bool = False


def experiments() -> list[Experiment]:
    """All tables, in the order of the report."""
    three = Rewards((1.0, 1.0, 1.0))
    core = {name: ESTIMATORS[name] for name in ("grpo", "gdpo", "gd2po_hard", "gd2po_snr")}
    cheap = {name: ESTIMATORS[name] for name in ("gdpo", "gd2po_hard", "gd2po_snr", "largest, same share")}
    return [
        Experiment("K = 2, independent", Rewards((1.0, 1.0))),
        Experiment("K = 3, independent", three),
        Experiment("K = 5, independent", Rewards((1.0,) * 5)),
        Experiment("K = 5, independent, four times as long", Rewards((1.0,) * 5), cheap, steps=4 * STEPS),
        Experiment("K = 2, correlation -0.5", Rewards((1.0, 1.0), correlation=-0.5)),
        Experiment("K = 3, correlation -0.3", replace(three, correlation=-0.3)),
        Experiment("K = 3, correlation 0.5", replace(three, correlation=0.5)),
        Experiment("K = 3, no noise", replace(three, noise=0.0)),
        Experiment("K = 3, noise 2", replace(three, noise=2.0)),
        Experiment("K = 3, noise 0 / 0 / 4", replace(three, noise=(0.0, 0.0, 4.0)), show_each=True),
        Experiment("K = 3, binary rewards", replace(three, binary=True)),
        Experiment("K = 2, scales 3 : 0.5", Rewards((3.0, 0.5)), core, show_each=True),
        Experiment("K = 2, weights 1 : 0.25", Rewards((1.0, 1.0), weights=(1.0, 0.25)), core, show_each=True),
        Experiment("K = 3, Adam, learning rate per method", three, tuned=True),
        Experiment("K = 5, Adam, learning rate per method", Rewards((1.0,) * 5), tuned=True),
        Experiment("K = 3, SGD, equal learning rate", three, optimizer="sgd"),
        Experiment("K = 3, SGD, learning rate per method", three, optimizer="sgd", tuned=True),
        Experiment("K = 3, one thing at a time", three, ABLATION),
        Experiment("K = 3, binary rewards, one thing at a time", replace(three, binary=True), ABLATION),
        Experiment("K = 3, SNR threshold", three, TAUS),
        Experiment("K = 5, SNR threshold", Rewards((1.0,) * 5), TAUS),
        *(Experiment(f"K = 3, group size {size}", three, cheap, group_size=size) for size in (2, 8, 16)),
        *(
            Experiment(f"Division and budget: {title}", rewards, BUDGET, tuned=tuned, show_each=not rewards.is_even)
            for title, rewards, tuned in (
                ("K = 3", three, False),
                ("K = 3, learning rate per method", three, True),
                ("K = 5", Rewards((1.0,) * 5), False),
                ("K = 5, learning rate per method", Rewards((1.0,) * 5), True),
                ("K = 3, correlation -0.3", replace(three, correlation=-0.3), False),
                ("K = 3, no noise", replace(three, noise=0.0), False),
                ("K = 3, noise 0 / 0 / 4", replace(three, noise=(0.0, 0.0, 4.0)), False),
                ("K = 3, binary rewards", replace(three, binary=True), False),
                ("K = 2, scales 3 : 0.5", Rewards((3.0, 0.5)), False),
            )
        ),
        Experiment("K = 3, equal update cost", three, EQUAL_COST),
    ]


@dataclass(frozen=True)
class World:
    """
    S bandits: `features` `(S, prompts * actions, features)` and `values` `(S, prompts * actions, K)`, each reward with
    mean 0 and standard deviation 1 over the actions.
    """

    features: torch.Tensor
    values: torch.Tensor


def make_world(rewards: Rewards, num_seeds: int, seed: int) -> World:
    """Draw `num_seeds` bandits; the same seed draws the same bandits for every estimator."""
    generator = torch.Generator().manual_seed(seed)
    num_rewards = len(rewards.scales)
    features = torch.randn(num_seeds, PROMPTS * ACTIONS, FEATURES, generator=generator) / FEATURES**0.5
    covariance = torch.full((num_rewards, num_rewards), rewards.correlation, dtype=torch.float64)
    covariance.fill_diagonal_(1.0)
    directions = torch.randn(num_seeds, FEATURES, num_rewards, generator=generator)
    values = features @ (directions @ torch.linalg.cholesky(covariance).float().T)
    return World(features, (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True))


def observe(rewards: Rewards, values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Rewards as the estimator sees them, from values of sampled actions and standard normal `noise` like them."""
    seen = values + noise * torch.tensor(rewards.noise)
    return (seen > 0).float() * torch.tensor(rewards.scales) if rewards.binary else seen * torch.tensor(rewards.scales)


def within_group_spread(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Root of the mean sample variance `(S, K)` of `rewards` `(S, B, K)` over the groups in which a reward varies."""
    variance = rewards.view(len(rewards), -1, group_size, rewards.shape[2]).var(2)
    return (variance.sum(1) / (variance > 0).sum(1).clamp(min=1)).sqrt()


def policy_gradient(world: World, probabilities: torch.Tensor, index: torch.Tensor, advantages: torch.Tensor):
    """Gradient `(S, features)` of `-mean(advantage * log probability)` for sampled actions `index` `(S, B)`."""
    weight = torch.zeros(world.features.shape[:2]).scatter_add_(1, index, advantages / index.shape[1])
    per_prompt = weight.view_as(probabilities).sum(-1, keepdim=True)
    residual = weight - (probabilities * per_prompt).view_as(weight)
    return -(residual.unsqueeze(1) @ world.features).squeeze(1)


def simulate(
    rewards: Rewards,
    estimator: Estimator,
    *,
    num_seeds: int,
    seed: int,
    optimizer: str = "adam",
    learning_rate: float,
    group_size: int = 4,
    steps: int = STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Train one policy per seed.

    Returns:
        `tuple` of the value of each reward before each step and after the last, `(S, steps + 1, K)`, and the share of
        rollouts with an advantage in each step, `(S, steps)`.
    """
    world = make_world(rewards, num_seeds, seed)
    values = torch.where(world.values > 0, 1.0, 0.0) if rewards.binary else world.values
    values = (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True)
    num_rewards = values.shape[2]
    # Its own stream, so that estimators see the same random numbers whatever they draw.
    generator = torch.Generator().manual_seed(seed + 1)
    theta = torch.zeros(num_seeds, FEATURES)
    update = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[optimizer]([theta], lr=learning_rate)
    group_size = estimator.group_size or group_size
    estimate: Callable = torch.func.vmap(lambda seen, draw, weights: estimator(seen, draw, group_size, weights))
    weights = torch.tensor(rewards.weights or (1.0,) * num_rewards).expand(num_seeds, -1)
    offsets = torch.arange(PROMPTS).unsqueeze(1) * ACTIONS
    history, trained = [], []
    for step in range(steps + 1):
        probabilities = (world.features @ theta.unsqueeze(2)).view(num_seeds, PROMPTS, ACTIONS).softmax(-1)
        history.append(torch.einsum("sa,sak->sk", probabilities.view(num_seeds, -1), values) / PROMPTS)
        if step == steps:
            break
        uniform = torch.rand(num_seeds, PROMPTS, group_size, generator=generator)
        actions = torch.searchsorted(probabilities.cumsum(-1), uniform).clamp(max=ACTIONS - 1)
        index = (actions + offsets).view(num_seeds, -1)
        sampled = world.values.gather(1, index.unsqueeze(2).expand(-1, -1, num_rewards))
        seen = observe(rewards, sampled, torch.randn(sampled.shape, generator=generator))
        if step == 0 and estimator.equal_units:
            weights = weights / within_group_spread(seen, group_size)
        advantages = estimate(seen, torch.rand(index.shape, generator=generator), weights)
        trained.append((advantages != 0).float().mean(1))
        theta.grad = policy_gradient(world, probabilities, index, advantages)
        update.step()
    return torch.stack(history, 1), torch.stack(trained, 1)


def choose_learning_rate(experiment: Experiment, estimator: Estimator, num_seeds: int) -> float:
    """The learning rate with the highest final total on the tuning seeds."""

    def final_total(learning_rate: float) -> float:
        history, _ = simulate(
            experiment.rewards,
            estimator,
            num_seeds=num_seeds,
            seed=TUNING_SEED,
            optimizer=experiment.optimizer,
            learning_rate=learning_rate,
            group_size=experiment.group_size,
            steps=experiment.steps,
        )
        return history[:, -1].sum(1).mean().item()

    return max(LEARNING_RATES[experiment.optimizer], key=final_total)


def run_experiment(experiment: Experiment, num_seeds: int, tuning_seeds: int) -> dict:
    """All estimators of one experiment, as one JSON-ready entry."""
    curves, learning_rates = {}, {}
    for name, estimator in experiment.estimators.items():
        learning_rates[name] = (
            choose_learning_rate(experiment, estimator, tuning_seeds)
            if experiment.tuned
            else DEFAULT_LEARNING_RATE[experiment.optimizer]
        )
        curves[name] = simulate(
            experiment.rewards,
            estimator,
            num_seeds=num_seeds,
            seed=0,
            optimizer=experiment.optimizer,
            learning_rate=learning_rates[name],
            group_size=experiment.group_size,
            steps=experiment.steps,
        )
    return {
        "title": experiment.title,
        "rewards": asdict(experiment.rewards),
        "optimizer": experiment.optimizer,
        "group_size": experiment.group_size,
        "steps": experiment.steps,
        "learning_rate_per_method": experiment.tuned,
        "show_each": experiment.show_each,
        "methods": summarize(curves, learning_rates, baseline="gdpo"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=48, help="bandits per method (default: 48)")
    parser.add_argument("--tuning-seeds", type=int, default=16, help="bandits per learning rate tried (default: 16)")
    parser.add_argument("--only", default="", help="run only the tables whose title contains this text")
    parser.add_argument("--output", type=Path, default=Path("outputs/bandit"), help="folder for the results")
    args = parser.parse_args()

    started = time.perf_counter()
    settings = {
        "seeds": args.seeds,
        "tuning_seeds": args.tuning_seeds,
        "prompts": PROMPTS,
        "actions": ACTIONS,
        "features": FEATURES,
        "learning_rates": LEARNING_RATES,
        "default_learning_rate": DEFAULT_LEARNING_RATE,
    }
    document = {"settings": settings, "experiments": []}
    args.output.mkdir(parents=True, exist_ok=True)
    for experiment in experiments():
        if args.only in experiment.title:
            document["experiments"].append(run_experiment(experiment, args.seeds, args.tuning_seeds))
            (args.output / "bandit.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            (args.output / "bandit.md").write_text(markdown(document), encoding="utf-8")
            print(f"{time.perf_counter() - started:6.0f} s  {experiment.title}", flush=True)


if __name__ == "__main__":
    main()
