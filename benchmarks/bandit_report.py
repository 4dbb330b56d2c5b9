"""From the bandit's curves to its tables: values per seed, paired differences against the baseline, markdown."""

import torch

from gd2po_trl.comparison.seed_statistics import Interval, holm, mean_interval, paired_test


# The quantities that are tested against the baseline; together, over all methods, they are one family for Holm.
TESTED = ("total", "worst", "total_auc", "worst_auc", "total_at_equal_updates")


def summarize(curves: dict[str, tuple[torch.Tensor, torch.Tensor]], learning_rates: dict, baseline: str) -> list[dict]:
    """
    Results per method.

    Args:
        curves (`dict`): For each method the value of each reward, `(S, T + 1, K)`, and the trained share, `(S, T)`.
        learning_rates (`dict`): Learning rate of each method.
        baseline (`str`): The method that the others are compared with, seed by seed.

    Returns:
        `list` of one entry per method: `total` (sum over the rewards) and `worst` (the seed's worst reward) at the end
        of training, `_auc` their means over training. `total_at_equal_updates` compares a method at its end with the
        baseline at the moment when the baseline had trained as many rollouts as the method in all.
    """
    base_values, base_trained = curves[baseline]
    base = quantities(base_values)
    entries, p_values = [], []
    for name, (values, trained) in curves.items():
        own = quantities(values)
        entry = {
            "method": name,
            "learning_rate": learning_rates[name],
            "trained_share": trained.mean().item(),
            "each": values[:, -1].mean(0).tolist(),
            **{key: as_dict(mean_interval(own[key].tolist())) for key in own},
            "per_seed": {key: [round(value, 5) for value in own[key].tolist()] for key in own},
        }
        if name != baseline:
            pairs = {key: (own[key], base[key]) for key in own}
            pairs["total_at_equal_updates"] = (own["total"], total_at(base_values, base_trained, trained.sum(1)))
            entry["against_baseline"] = {}
            for key in TESTED:
                test = paired_test(*(side.tolist() for side in pairs[key]))
                p_values.append((entry["against_baseline"], key, test.p_t))
                entry["against_baseline"][key] = {
                    **as_dict(test.difference),
                    "p_t": test.p_t,
                    "p_sign_flip": test.p_sign_flip,
                }
        entries.append(entry)
    for (tests, key, _), corrected in zip(p_values, holm([p for *_, p in p_values]), strict=True):
        tests[key]["p_holm"] = corrected
    return entries


def quantities(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sum over the rewards and worst reward of each seed, at the end and on average over training, each `(S,)`."""
    return {
        "total": values[:, -1].sum(1),
        "worst": values[:, -1].amin(1),
        "total_auc": values.sum(2).mean(1),
        "worst_auc": values.amin(2).mean(1),
    }


def total_at(values: torch.Tensor, trained: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Sum over the rewards of each seed, `(S,)`, after the first step at which `trained` reaches `budget` `(S,)`."""
    step = 1 + torch.searchsorted(trained.cumsum(1), budget.unsqueeze(1))
    return values.sum(2).gather(1, step.clamp(max=trained.shape[1])).squeeze(1)


def as_dict(interval: Interval) -> dict[str, float]:
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def markdown(document: dict) -> str:
    """The tables of `bandit.json`, and one overview of all whose titles begin alike, up to a colon."""
    families: dict[str, list[dict]] = {}
    for experiment in document["experiments"]:
        family, colon, _ = experiment["title"].partition(": ")
        if colon:
            families.setdefault(family, []).append(experiment)
    overviews = [overview(family, members) for family, members in families.items()]
    return "\n".join([*(table(experiment) for experiment in document["experiments"]), *overviews])


def overview(family: str, experiments: list[dict]) -> str:
    """Differences to the baseline in total and worst reward, one column per experiment."""
    titles = [experiment["title"].removeprefix(f"{family}: ") for experiment in experiments]
    lines = [f"**{family}: Δ total / Δ worst**", "", "| method | " + " | ".join(titles) + " |"]
    lines.append("| --- " * (len(titles) + 1) + "|")
    for entry in experiments[0]["methods"]:
        cells = [entry["method"]]
        for experiment in experiments:
            own = next(other for other in experiment["methods"] if other["method"] == entry["method"])
            tests = own.get("against_baseline")
            values = [own["total"]["mean"], own["worst"]["mean"]]
            cells.append(
                " / ".join(f"{tests[key]['mean']:+.3f}{star(tests[key])}" for key in ("total", "worst"))
                if tests
                else f"{values[0]:.2f} / {values[1]:.2f}"
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def table(experiment: dict) -> str:
    tuned, show_each = experiment["learning_rate_per_method"], experiment["show_each"]
    header = ["method", "trained", "total", "Δ total", "worst", "Δ worst", "Δ area total", "Δ area worst"]
    header += ["Δ total at equal updates"]
    header += ["each reward"] if show_each else []
    header += ["learning rate"] if tuned else []
    lines = [f"**{experiment['title']}**", "", "| " + " | ".join(header) + " |", "| --- " * len(header) + "|"]
    for entry in experiment["methods"]:
        tests = entry.get("against_baseline", {})
        cells = [entry["method"], f"{entry['trained_share']:.0%}"]
        for key in ("total", "worst"):
            cells += [plus_minus(entry[key]), difference(tests.get(key))]
        cells += [difference(tests.get(key)) for key in TESTED[2:]]
        cells += [" / ".join(f"{value:.2f}" for value in entry["each"])] if show_each else []
        cells += [f"{entry['learning_rate']:g}"] if tuned else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plus_minus(interval: dict) -> str:
    return f"{interval['mean']:.2f} ± {(interval['high'] - interval['low']) / 2:.2f}"


def difference(test: dict | None) -> str:
    """A paired difference with its interval; a star where Holm's correction leaves p < 0.05."""
    if test is None:
        return "–"
    return f"{test['mean']:+.3f}{star(test)} [{test['low']:+.3f}, {test['high']:+.3f}]"


def star(test: dict) -> str:
    return "\\*" if test["p_holm"] < 0.05 else ""
