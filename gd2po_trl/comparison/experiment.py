"""A comparison from its first run to its report: `compare` in Python, `gd2po compare` on a terminal."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .curves import Curves, read_curves
from .presentation import Display, markdown, write_results
from .results import Results, choose_learning_rates, evaluate
from .running import Outcome, Run, launched_processes, run_all, train_command
from .variants import LADDER, MATCHED_WHITENING, Variant, check_variants, make_variant, option_words


if TYPE_CHECKING:
    from ..recipe import Recipe

# Far from any seed that a person would choose, so that learning rates are not chosen on the seeds of the comparison.
FIRST_TUNING_SEED = 1000
# Folder of the runs that choose learning rates.
TUNING = "tuning"


def compare(
    config: str | Path,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 5,
    settings: Mapping[str, Any] | None = None,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str | None = None,
    learning_rates: Sequence[float] = (),
    tuning_seeds: int = 2,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    measure: str = "train",
    match_whitening: bool = False,
    jobs: int = 1,
    devices: Sequence[str] = (),
    launch: str = "",
    output: str | Path = "outputs/comparison",
    caption: str | None = None,
) -> Results:
    """
    Train a recipe with several methods and seeds, and tell their results apart from noise, as `gd2po compare` does.

    Every run is a process of its own. Runs that are finished already are not repeated. Writes `report.md`,
    `results.json`, `curves.png` and `trade_off.png` into `output`.

    ```python
    results = compare("recipe.yaml", ["gdpo", "gd2po_hard"], seeds=3, settings={"max_steps": 20})
    print(results.verdict)
    results.to_frame()
    ```

    Args:
        config (`str` or `Path`): The recipe.
        methods (sequence of `str`, *optional*):
            What to train: presets, and dotted paths of estimators, each trained in the place of GDPO's sum under the
            name of the function. All four presets by default.
        seeds (`int`, *optional*, defaults to 5): Trains with seeds 1 to this.
        settings (mapping, *optional*): Recipe keys for every run, such as `{"max_steps": 20}`.
        variants (mapping of mappings, *optional*):
            Further variants by name: their `method` and recipe keys, such as
            `{"snr_0.5": {"method": "gd2po_snr", "snr_threshold": 0.5}}`.
        baseline (`str`, *optional*): What the others are compared with. `"gdpo"` by default, or else the first.
        learning_rates (sequence of `float`, *optional*): Choose each variant's own from these, on seeds of their own.
        tuning_seeds (`int`, *optional*, defaults to 2): Seeds per learning rate tried.
        ranges (mapping of `tuple[float, float]`, *optional*):
            Range by which a reward is normalized. Lowest and highest batch mean of all runs by default.
        measure (`str`, *optional*, defaults to `"train"`):
            Rewards of the training rollouts, or with `"eval"` those of the recipe's evaluations.
        match_whitening (`bool`, *optional*, defaults to `False`):
            Add variants that tell filter, consensus weight and whitening apart.
        jobs (`int`, *optional*, defaults to 1): Runs at the same time.
        devices (sequence of `str`, *optional*): CUDA devices, with one run at a time on each; `jobs` is not used.
        launch (`str`, *optional*):
            Words for `accelerate launch`, which then starts each run, such as
            `"--config_file recipes/accelerate_configs/fsdp2.yaml"`.
        output (`str` or `Path`, *optional*, defaults to `"outputs/comparison"`): Folder of the runs and the report.
        caption (`str`, *optional*): The command that the report names.

    Returns:
        [`Results`]: tables, intervals and tests, `verdict`, `to_frame()` and, in a notebook, the report.

    Raises:
        [`UsageError`]: for a mistake in the arguments or the recipe, which is found before the first run starts, if
            another comparison is at work in the same folder, a folder holds a run with other settings, or a run ended
            because its input is wrong.
    """
    from ..gd2po_config import METHODS

    chosen = [make_variant(method) for method in (METHODS if methods is None else methods)]
    for name, keys in (variants or {}).items():
        own = dict(keys)
        chosen.append(make_variant(str(own.pop("method", "")), name, option_words(own, f"variant '{name}'")))
    chosen += MATCHED_WHITENING if match_whitening else ()
    check_variants(chosen)
    names, output = [variant.name for variant in chosen], Path(output)
    baseline = baseline or ("gdpo" if "gdpo" in names else names[0])
    if baseline not in names:
        raise UsageError(f"--baseline '{baseline}' is none of the variants: {', '.join(names)}.")
    for name, value in {"seeds": seeds, "tuning-seeds": tuning_seeds, "jobs": jobs}.items():
        if value < 1:
            raise UsageError(f"--{name} is {value}; it must be at least 1.")
    if len(set(devices)) < len(devices):
        raise UsageError("--devices names a device twice; each has one run at a time.")
    trainings = _Trainings(Path(config), chosen, option_words(settings or {}, "settings"), launch, measure, output)
    trainings.slots = {"jobs": jobs, "devices": devices}
    ranges = dict(ranges or {})
    _check_ranges(ranges, trainings.weights)
    _check_learning_rates(learning_rates, [trainings.overrides, *(variant.overrides for variant in chosen)])

    with _only_comparison_in(output):
        _announce(trainings, seeds, baseline, len(learning_rates) * tuning_seeds)
        rates: dict[str, float] = {}
        search: list[dict[str, Any]] = []
        if learning_rates:
            rates, search = _choose_learning_rates(trainings, learning_rates, tuning_seeds, ranges)
        numbers = list(range(1, seeds + 1))
        runs = {
            variant.name: [trainings.run(variant, seed, "runs", rates.get(variant.name)) for seed in numbers]
            for variant in chosen
        }
        outcomes = trainings.train([run for of_a_seed in zip(*runs.values(), strict=True) for run in of_a_seed])
        results = evaluate(
            {name: [outcomes[run.folder] for run in some] for name, some in runs.items()},
            chosen,
            numbers,
            baseline=baseline,
            weights=trainings.weights,
            ranges=ranges,
            contrasts=LADDER if match_whitening else (),
        )
        results.learning_rates, results.folder = rates, output
        results.notes += [trainings.note] * bool(trainings.note)
        _write(results, caption or f"compare({str(config)!r}, seeds={seeds})", search)
    return results


class _Trainings:
    """
    The recipes of the variants, and their runs.

    Making one reads every recipe, so that a mistake shows before the first run starts.
    """

    def __init__(
        self,
        config: Path,
        variants: list[Variant],
        overrides: tuple[str, ...],
        launch: str,
        measure: str,
        output: Path,
    ):
        from ..estimators import load_estimator
        from ..recipe import load_recipe

        self.config, self.variants, self.overrides, self.output = config, variants, overrides, output
        self.launch, self.measure = shlex.split(launch), measure
        self.slots: dict[str, Any] = {}
        self.display = Display()
        self.processes = launched_processes(self.launch)
        self.recipes = {
            variant.name: load_recipe(config, (*overrides, *variant.overrides, "--method", variant.method))
            for variant in variants
        }
        for recipe in self.recipes.values():
            load_estimator(recipe.training.estimator, recipe.training.estimator_kwargs)
        _check_recipes(self.recipes, measure)
        first, *others = self.recipes
        self.weights = _weights(self.recipes[first])
        if not any(self.weights.values()):
            raise UsageError("All `reward_weights` are 0: there is nothing to compare.")
        differing = [name for name in others if _directions(self.recipes[name]) != _directions(self.recipes[first])]
        self.note = (
            f"`reward_weights` say which rewards `sum` and `worst` are made of, and that low is good where one is "
            f"negative. Those of {first} are used for all; {', '.join(differing)} trained with others."
            if differing
            else ""
        )

    def run(self, variant: Variant, seed: int, parent: str, learning_rate: float | None) -> Run:
        """The run of a variant with a seed, in a folder below `parent`."""
        settings = {**self.recipes[variant.name].settings, "seed": seed}
        for key in ("output_dir", "resume_from_checkpoint"):
            settings.pop(key, None)
        overrides, folder = list(self.overrides), self.output / parent / variant.name
        if learning_rate is not None:
            settings["learning_rate"] = learning_rate
            overrides += ["--learning_rate", repr(learning_rate)]
            folder = folder / f"{learning_rate:g}" if parent == TUNING else folder
        folder = folder / f"seed-{seed}"
        command = train_command(self.config, variant, seed, folder, overrides, self.launch)
        return Run(variant, seed, folder, command, json.loads(json.dumps(settings, default=str)))

    def train(self, runs: list[Run]) -> dict[Path, tuple[Outcome, Curves | None]]:
        """Train `runs`; how they ended and what they logged, by folder."""
        with self.display as display:
            outcomes = run_all(runs, **self.slots, report=display.line, watch=display.watch)
        result: dict[Path, tuple[Outcome, Curves | None]] = {}
        for outcome in outcomes:
            training = self.recipes[outcome.run.variant.name].training
            rollouts = training.per_device_train_batch_size * training.gradient_accumulation_steps * self.processes
            curves = None
            if outcome.state is not None:
                try:
                    curves = read_curves(outcome.state, list(self.weights), rollouts, held_out=self.measure == "eval")
                except UsageError as error:
                    raise UsageError(f"{outcome.run.label}: {error}") from error
            result[outcome.run.folder] = (outcome, curves)
        return result


@contextmanager
def _only_comparison_in(output: Path) -> Iterator[None]:
    """Make the folder and keep other comparisons out of it."""
    from filelock import FileLock, Timeout

    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another comparison is at work in '{output}'; wait, or name another --output.") from None
    except OSError as error:
        raise UsageError(f"Cannot write to --output '{output}': {error.strerror}.") from error
    try:
        yield
    finally:
        lock.release()


def _announce(trainings: _Trainings, seeds: int, baseline: str, tuning: int) -> None:
    names, devices, jobs = list(trainings.recipes), trainings.slots["devices"], trainings.slots["jobs"]
    places = f"one at a time on each of the devices {', '.join(devices)}" if devices else f"{jobs} at a time"
    count = len(names) * seeds
    trainings.display.line(
        f"{count} run{'s' * (count > 1)}: {', '.join(names)}, each with {seeds} seed{'s' * (seeds > 1)}, {places}. "
        f"Compared with {baseline}. Logs and results go to {trainings.output}."
    )
    if tuning:
        trainings.display.line(f"Before that, {len(names) * tuning} runs choose the learning rates.")


def _choose_learning_rates(
    trainings: _Trainings, rates: Sequence[float], count: int, ranges: dict[str, tuple[float, float]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + count)
    runs = {
        (variant.name, rate): [trainings.run(variant, seed, TUNING, rate) for seed in seeds]
        for variant in trainings.variants
        for rate in rates
    }
    trainings.display.line(f"Choosing learning rates on seeds {', '.join(map(str, seeds))}.")
    outcomes = trainings.train([run for some in runs.values() for run in some])
    curves: dict[str, dict[float, list[Curves | None]]] = {variant.name: {} for variant in trainings.variants}
    for (name, rate), some in runs.items():
        curves[name][rate] = [outcomes[run.folder][1] for run in some]
    chosen, search = choose_learning_rates(curves, trainings.weights, ranges)
    for name in curves:
        if name not in chosen:
            folder = trainings.output / TUNING / name
            raise UsageError(f"{name} fails at every learning rate tried; the logs are in '{folder}'.")
        trainings.display.line(f"Learning rate of {name}: {chosen[name]:g}")
    return chosen, search


def _write(results: Results, caption: str, search: list[dict[str, Any]]) -> None:
    from .figures import draw_curves, draw_trade_off

    folder = results.folder or Path()
    results.report = markdown(results, caption, search)
    (folder / "report.md").write_text(results.report, encoding="utf-8")
    write_results(folder / "results.json", results, caption, search)
    results.written = ["report.md", "results.json"]
    if results.finished:
        draw_curves(results, folder / "curves.png")
        draw_trade_off(results, folder / "trade_off.png")
        results.written += ["curves.png", "trade_off.png"]


def _check_ranges(ranges: Mapping[str, tuple[float, float]], weights: Mapping[str, float]) -> None:
    for name, (low, high) in ranges.items():
        if name not in weights:
            raise UsageError(f"--ranges: '{name}' is none of the rewards ({', '.join(weights)}).")
        if not low < high:
            raise UsageError(f"--ranges {name}={low:g}:{high:g}: the range is empty.")


def _check_learning_rates(rates: Sequence[float], overrides: Sequence[tuple[str, ...]]) -> None:
    if any(not 0 < rate < float("inf") for rate in rates):
        raise UsageError(f"--learning-rates has {min(rates):g}; a learning rate is positive.")
    if rates and any("--learning_rate" in words for words in overrides):
        raise UsageError("--learning-rates chooses `learning_rate`: leave it out of --set and --variant.")


def _check_recipes(recipes: "dict[str, Recipe]", measure: str) -> None:
    from ..reward_gates import check_gates

    if measure not in ("train", "eval"):
        raise UsageError(f"--measure is {measure!r}; it must be 'train' or 'eval'.")
    first = next(iter(recipes))
    rewards = list(_weights(recipes[first]))
    for name, recipe in recipes.items():
        arguments = recipe.arguments
        names = list(_weights(recipe))
        if set(names) != set(rewards):
            raise UsageError(
                f"{name} has the rewards {', '.join(names)}, and {first} has {', '.join(rewards)}; "
                "only runs with the same rewards can be compared. A reward of weight 0 (`reward_weights`) is logged "
                "and not trained on."
            )
        try:
            check_gates(recipe.training.reward_gates or {}, names)
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error
        if measure == "eval" and isinstance(arguments.eval_dataset, dict):
            raise UsageError(
                f"--measure eval: {name}: `eval_dataset` holds several sets ({', '.join(arguments.eval_dataset)}), "
                "and a comparison has one measure. Name one of them, such as --set eval_dataset=pku_saferlhf."
            )
        if measure == "eval" and recipe.training.eval_strategy == "no":
            raise UsageError(
                f"--measure eval: {name}: `eval_strategy` is 'no'. Set it to 'steps' with `eval_steps`, and "
                "`eval_dataset`, in the recipe or with --set."
            )


def _weights(recipe: "Recipe") -> dict[str, float]:
    """By reward, where a function with parts is as many."""
    from ..rewards import reward_names

    beside = None if recipe.path is None else recipe.path.parent
    names = reward_names(recipe.arguments.reward_funcs, recipe.arguments.reward_kwargs, beside=beside)
    weights = recipe.training.reward_weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UsageError(f"`reward_weights` has {len(weights)} entries for the rewards {', '.join(names)}.")
    return dict(zip(names, weights, strict=True))


def _directions(recipe: "Recipe") -> dict[str, int]:
    """Per reward 1, -1, or 0 where it has no weight."""
    return {name: (weight > 0) - (weight < 0) for name, weight in _weights(recipe).items()}
