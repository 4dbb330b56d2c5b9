"""
The bandit's questions once more where a completion has several tokens: chains of 8 tokens from a bigram policy.

    python benchmarks/token_chains.py --output outputs/token_chains

A prompt is a token, a completion the 8 that follow. The policy is a table of logits, next token by token; a reward
adds up a random table of its own over the steps of the chain and is observed with noise. Every value reported is
exact, in standard deviations of the reward under the first policy. Estimators, controls and statistics are those of
`bandit.py`; writes `token_chains.json` and `token_chains.md`.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from bandit import BUDGET, Estimator, Rewards, within_group_spread
from bandit_report import markdown, summarize


TOKENS, LENGTH, PROMPTS, GROUP_SIZE, STEPS, LEARNING_RATE = 16, 8, 64, 4, 300, 0.1
METHODS = (
    "grpo",
    "gdpo",
    "gdpo, budget 1/4",
    "no division, equal units",
    "no division, equal units, budget 1/4",
    "no division, equal units, uniform 1/4",
    "gd2po_hard",
)
EXPERIMENTS = {
    "K = 3": Rewards((1.0, 1.0, 1.0)),
    "K = 5": Rewards((1.0,) * 5),
}


def make_tables(rewards: Rewards, num_seeds: int, seed: int) -> torch.Tensor:
    """What a step earns, `(S, K, tokens, tokens)`: a whole chain has mean 0 and variance 1 under the first policy."""
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(num_seeds, len(rewards.scales), TOKENS, TOKENS, generator=generator)
    # Under a uniform policy the tokens are independent. A step earns a deviation that its first token explains and the
    # rest; with the means of rows and columns taken out, steps are uncorrelated and their variances add up.
    tables = (
        tables - tables.mean(-1, keepdim=True) - tables.mean(-2, keepdim=True) + tables.mean((-2, -1), keepdim=True)
    )
    return tables / (LENGTH * tables.square().mean((-2, -1), keepdim=True)).sqrt()


def exact_values(policy: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Expected reward `(S, K)` of a chain under `policy` `(S, tokens, tokens)`, from a uniformly drawn prompt."""
    earned = (policy.unsqueeze(1) * tables).sum(-1)  # (S, K, tokens): by the next step, given the token before it
    state = torch.full((len(policy), 1, TOKENS), 1 / TOKENS)
    total = torch.zeros(tables.shape[:2])
    for _ in range(LENGTH):
        total = total + (state * earned).sum(-1)
        state = state @ policy
    return total


def sample(policy: torch.Tensor, prompts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Indices `(S, B, LENGTH)` into a table of `tokens * tokens` of the steps of chains that begin at `prompts`."""
    cumulative = policy.cumsum(-1)
    token, steps = prompts, []
    for _ in range(LENGTH):
        rows = cumulative.gather(1, token.unsqueeze(2).expand(-1, -1, TOKENS))
        uniform = torch.rand(token.shape, generator=generator).unsqueeze(2)
        following = torch.searchsorted(rows, uniform).squeeze(2).clamp(max=TOKENS - 1)
        steps.append(token * TOKENS + following)
        token = following
    return torch.stack(steps, 2)


def policy_gradient(policy: torch.Tensor, steps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Gradient `(S, tokens, tokens)` of `-mean(advantage * log probability of the chain)`."""
    weights = (advantages / steps.shape[1]).unsqueeze(2).expand(-1, -1, LENGTH)
    weight = torch.zeros(len(steps), TOKENS * TOKENS).scatter_add_(1, steps.flatten(1), weights.flatten(1))
    weight = weight.view_as(policy)
    return policy * weight.sum(-1, keepdim=True) - weight


def simulate(
    rewards: Rewards, estimator: Estimator, *, num_seeds: int, seed: int, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Train one policy per seed.

    Returns:
        `tuple` of the value of each reward before each step and after the last, `(S, steps + 1, K)`, and the share of
        rollouts with an advantage in each step, `(S, steps)`.
    """
    tables = make_tables(rewards, num_seeds, seed)
    num_rewards = tables.shape[1]
    generator = torch.Generator().manual_seed(seed + 1)
    theta = torch.zeros(num_seeds, TOKENS, TOKENS)
    optimizer = torch.optim.Adam([theta], lr=LEARNING_RATE)
    weights = torch.tensor(rewards.weights or (1.0,) * num_rewards).expand(num_seeds, -1)
    estimate = torch.func.vmap(lambda seen, draw, own: estimator(seen, draw, GROUP_SIZE, own))
    scales = torch.tensor(rewards.scales)
    history, trained = [], []
    for step in range(steps + 1):
        policy = theta.softmax(-1)
        history.append(exact_values(policy, tables))
        if step == steps:
            break
        prompts = torch.randint(TOKENS, (num_seeds, PROMPTS), generator=generator)
        chains = sample(policy, prompts.repeat_interleave(GROUP_SIZE, dim=1), generator)
        per_step = tables.flatten(2).gather(2, chains.flatten(1).unsqueeze(1).expand(-1, num_rewards, -1))
        values = per_step.view(num_seeds, num_rewards, -1, LENGTH).sum(3).transpose(1, 2)
        seen = (values + torch.randn(values.shape, generator=generator) * torch.tensor(rewards.noise)) * scales
        if step == 0 and estimator.equal_units:
            weights = weights / within_group_spread(seen, GROUP_SIZE)
        advantages = estimate(seen, torch.rand(chains.shape[:2], generator=generator), weights)
        trained.append((advantages != 0).float().mean(1))
        theta.grad = policy_gradient(policy, chains, advantages)
        optimizer.step()
    return torch.stack(history, 1), torch.stack(trained, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=48, help="policies per method (default: 48)")
    parser.add_argument("--only", default="", help="run only the tables whose title contains this text")
    parser.add_argument("--output", type=Path, default=Path("outputs/token_chains"), help="folder for the results")
    args = parser.parse_args()
    started = time.perf_counter()
    args.output.mkdir(parents=True, exist_ok=True)
    document = {"settings": {"seeds": args.seeds, "steps": STEPS, "learning_rate": LEARNING_RATE}, "experiments": []}
    for title, rewards in EXPERIMENTS.items():
        if args.only not in title:
            continue
        curves = {name: simulate(rewards, BUDGET[name], num_seeds=args.seeds, seed=0) for name in METHODS}
        entry = {
            "title": f"Token chains: {title}",
            "learning_rate_per_method": False,
            "show_each": False,
        }
        entry["methods"] = summarize(curves, dict.fromkeys(curves, LEARNING_RATE), baseline="gdpo")
        document["experiments"].append(entry)
        (args.output / "token_chains.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (args.output / "token_chains.md").write_text(markdown(document), encoding="utf-8")
        print(f"{time.perf_counter() - started:6.0f} s  {title}", flush=True)


if __name__ == "__main__":
    main()
