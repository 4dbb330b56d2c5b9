"""`gd2po fit-scorers`."""

import argparse
from pathlib import Path

from ..errors import UsageError


def main(argv: list[str]) -> int:
    """Run `gd2po fit-scorers`; the exit status."""
    parser = argparse.ArgumentParser(
        prog="gd2po fit-scorers",
        description="Fits a helpfulness and a harmlessness scorer (TF-IDF and a logistic Bradley-Terry model) on "
        "human preference pairs, for the reward type text_scorer, and prints their held-out accuracy.",
    )
    parser.add_argument(
        "--dataset",
        choices=("hh_rlhf", "pku_saferlhf"),
        default="hh_rlhf",
        help="what the pairs are (default: hh_rlhf)",
    )
    where = "file, folder or Hub id of the pairs (default: the data set on the Hub)"
    parser.add_argument("--helpful", metavar="PAIRS", help=where)
    parser.add_argument("--harmless", metavar="PAIRS", help=where)
    parser.add_argument("--split", help="split of a folder or Hub id (default: train)")
    parser.add_argument("--output", required=True, metavar="DIR", help="writes DIR/helpful and DIR/harmless")
    parser.add_argument("--folds", type=int, default=5, help="folds of the cross-validation (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the folds (default: 0)")
    arguments = parser.parse_args(argv)
    if arguments.folds < 2:
        raise UsageError(f"--folds must be at least 2, got {arguments.folds}.")

    from ..datasets import load_dataset_by_name
    from ..reward_models.text_scorer import fit_text_scorer

    output = Path(arguments.output)
    scorers, pairs = {}, {}
    for dimension in ("helpful", "harmless"):
        path = getattr(arguments, dimension)
        pairs[dimension] = load_dataset_by_name(
            f"{arguments.dataset}_pairs", path, arguments.split, dimension=dimension
        )
        scorers[dimension] = fit_text_scorer(
            pairs[dimension],
            output / dimension,
            source=f"{arguments.dataset}: {Path(path).name if path else 'Hub'}",
            folds=arguments.folds,
            seed=arguments.seed,
        )
        fitted = scorers[dimension].description
        print(
            f"{dimension:<9} {fitted['num_pairs']:>7,} pairs   held-out accuracy {fitted['accuracy']:.3f} ± "
            f"{fitted['accuracy_standard_error']:.3f}   {output / dimension}"
        )
    print(f"The two order {_disagreement(scorers, pairs):.0%} of the pairs differently.")
    return 0


def _disagreement(scorers: dict, pairs: dict) -> float:
    chosen = [text for dataset in pairs.values() for text in dataset["chosen"]]
    rejected = [text for dataset in pairs.values() for text in dataset["rejected"]]
    margins = {
        name: [a - b for a, b in zip(scorer.score(chosen), scorer.score(rejected), strict=True)]
        for name, scorer in scorers.items()
    }
    products = [a * b for a, b in zip(*margins.values(), strict=True)]
    return sum(product < 0 for product in products) / len(products)
