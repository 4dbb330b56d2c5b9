"""`gd2po eval`."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from ..errors import UsageError
from ..evaluation.settings import BACKENDS, DTYPES, GenerationSettings, check_model_exists
from ..terminal import set_up_logging
from ..user_input import as_mapping


API_BANK = """\
Greedy completions for API-Bank (level 1: 399 dialogues, level 2: 67, level 3: 131), scored for accuracy, format and
length. Comparable with published figures is --protocol reference; the default, strict, mends the published scorer's
defects (any right call among wrong ones counts, a call without a name is given the right one, and so on)."""

SAFE_ALIGNMENT = """\
Greedy completions, one per prompt, and their mean under each reward and under the sum, per data set; with --baseline
also how often the model beats the baseline, and by harm category where the data name one. The published mean@1 leaves
out prompts that occur more than once in their set: --protocol reference.

  gd2po eval safe-alignment --model MODEL --data alpaca --data beavertails_evaluation \\
    --reward 'helpful={type: reward_model, model: PKU-Alignment/beaver-7b-v1.0-reward}' \\
    --reward 'harmless={type: reward_model, model: PKU-Alignment/beaver-7b-v1.0-cost}'"""

REWARDS = """\
Any rewards on any data, before and after a training: greedy completions, one per prompt, the mean of each reward, and
the difference with its 95 % interval. Rewards may read columns of the data, as in training.

  gd2po eval rewards --model outputs/my_run
  gd2po eval rewards --model outputs/my_run --data held_out.jsonl --reward my_rewards.brevity --limit 100

The folder of a run says what it does not need to be told: its recipe.yaml names the rewards, the data (eval_dataset,
or else dataset) and the model before the training. --config names another recipe."""

BFCL = """\
Greedy completions for the single-turn questions of the Berkeley Function-Calling Leaderboard, version 4, in ToolRL's
prompt, and result files for its own checker. Nothing is scored here: the package bfcl-eval, which carries the
questions, does that in an environment of its own; the command is printed at the end."""

GOES_ON = """

A killed run goes on where it stopped when the command is repeated. The folder --output then holds predictions.jsonl,
results.json and the scores (scores.jsonl; of bfcl result/, for its checker)."""

LEADERBOARD = """\
The API-Bank evaluations in some folders and below, by overall accuracy: accuracy per level, format, length and words
of thought. One table for each protocol, as their figures cannot be compared."""


def main(argv: list[str]) -> int:
    """Run `gd2po eval`; the exit status."""
    arguments = _parser().parse_args(argv)
    set_up_logging()
    if arguments.task == "leaderboard":
        return arguments.run(arguments)
    if arguments.model is None and arguments.predictions is None:
        raise UsageError("what to evaluate? Give --model, or --predictions with text generated before.")
    if arguments.model is not None and arguments.predictions is not None:
        raise UsageError("give --model or --predictions, not both.")
    if arguments.predictions is not None and arguments.adapter is not None:
        raise UsageError("--adapter goes with --model, not with --predictions.")
    if arguments.adapter is not None and len(arguments.model) > 1:
        raise UsageError("--adapter goes with one --model; the folder of an adapter is a model as well.")
    arguments.chat_template_kwargs = as_mapping("--chat-template-kwargs", arguments.chat_template_kwargs)
    models = arguments.model or [None]
    if len(models) > 1:
        return _run_each(arguments, models)
    arguments.model = models[0]
    return arguments.run(arguments)


def _run_each(arguments: argparse.Namespace, models: list[str]) -> int:
    """Evaluates several models, one after the other."""
    root = Path(arguments.output or Path("eval") / arguments.task)
    runs = []
    for model, name in zip(models, _names_of(models), strict=True):
        # Unasked, `rewards` writes into the folder of each model.
        own = arguments.task == "rewards" and arguments.output is None and Path(model).is_dir()
        output = None if own else str(root / name)
        runs.append(argparse.Namespace(**{**vars(arguments), "model": model, "output": output}))
        check_model_exists(_settings(runs[-1]))  # before the first of them has run
    for run in runs:
        print(f"{run.model}:")
        run.run(run)
    if arguments.task == "api-bank":
        from ..tasks.tool_calling.api_bank import LEADERBOARD_FILE, find_runs, print_leaderboard

        print_leaderboard(find_runs([root]), root / LEADERBOARD_FILE)
    return 0


def _names_of(models: list[str]) -> list[str]:
    """Folder names for models: the last part of each path, or as many parts as tell them apart."""
    if len(set(models)) < len(models):
        raise UsageError(f"--model names {next(model for model in models if models.count(model) > 1)} twice.")
    parts = [Path(model).resolve().parts if Path(model).exists() else Path(model).parts for model in models]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["_".join(part[-length:]).strip("/") for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UsageError("--model names one folder twice.")


def _leaderboard(arguments: argparse.Namespace) -> int:
    from ..tasks.tool_calling.api_bank import find_runs, print_leaderboard

    print_leaderboard(find_runs(arguments.folders), arguments.output)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gd2po eval", description="Evaluate a policy.", allow_abbrev=False)
    tasks = parser.add_subparsers(metavar="TASK", required=True)

    def add_task(name: str, run: Any, summary: str, description: str) -> argparse.ArgumentParser:
        style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        task = tasks.add_parser(name, help=summary, description=description, **style)
        task.set_defaults(run=run, task=name)
        return task

    task = add_task("api-bank", _api_bank, "tool calling on API-Bank", API_BANK + GOES_ON)
    _add_common(task, max_new_tokens=4096, max_prompt_tokens=None)
    task.add_argument(
        "--data", metavar="FOLDER", help="folder with level-1-api_processed.json, ... from ToolRL's repository"
    )
    task.add_argument("--levels", default="1,2,3", help="comma-separated levels (default: 1,2,3)")
    task.add_argument("--limit", type=int, metavar="N", help="first N rows of each level (default: all)")
    task.add_argument(
        "--protocol",
        choices=("strict", "reference"),
        default="strict",
        help="reference is comparable with published figures, strict mends their defects (default: strict)",
    )

    task = add_task("bfcl", _bfcl, "tool calling on BFCL, scored by bfcl-eval", BFCL + GOES_ON)
    _add_common(task, max_new_tokens=4096, max_prompt_tokens=None)
    task.add_argument("--data", required=True, metavar="FOLDER", help="bfcl_eval/data of an installed bfcl-eval")
    task.add_argument("--categories", metavar="NAMES", help="comma-separated (default: all of a single turn)")
    task.add_argument("--limit", type=int, metavar="N", help="first N questions of each category (default: all)")
    task.add_argument(
        "--prompts",
        metavar="PATH",
        help="rows of rlla_4k, whose system prompt is used with BFCL's tools in it (default: those of the Hub)",
    )

    task = add_task("safe-alignment", _safe_alignment, "helpfulness and harmlessness", SAFE_ALIGNMENT + GOES_ON)
    _add_common(task, max_new_tokens=1024, max_prompt_tokens=512)
    _add_data_and_rewards(task, required=True)
    task.add_argument(
        "--baseline", metavar="WHAT", help="predictions (file or folder) or a model to compute win rates against"
    )
    task.add_argument(
        "--protocol",
        choices=("all", "reference"),
        default="all",
        help="reference averages, as published, the prompts that occur once in their data set, all every row; the "
        "results hold both means (default: all)",
    )

    task = add_task("rewards", _rewards, "any rewards on any data", REWARDS + GOES_ON)
    _add_common(task, max_new_tokens=None, max_prompt_tokens=None)
    task.add_argument("--config", metavar="RECIPE", help="recipe to read (default: recipe.yaml in the model's folder)")
    _add_data_and_rewards(task, required=False)
    task.add_argument(
        "--baseline",
        metavar="WHAT",
        help="the model before the training, or predictions; 'none' compares nothing (default: the recipe's model)",
    )

    task = add_task("leaderboard", _leaderboard, "API-Bank runs, best first", LEADERBOARD)
    task.add_argument(
        "folders", nargs="*", default=["eval/api-bank"], metavar="FOLDER", help="(default: eval/api-bank)"
    )
    task.add_argument("--output", metavar="FILE", help="also write the figures to this JSON file")
    return parser


def _add_data_and_rewards(task: argparse.ArgumentParser, required: bool) -> None:
    default = "" if required else " (default: the recipe's)"
    task.add_argument(
        "--data",
        action="append",
        required=required,
        metavar="DATA",
        help="prompts: a file with a `prompt` column and those that rewards read, a short name (alpaca, hh_rlhf, "
        "pku_saferlhf, beavertails, beavertails_evaluation), NAME=PATH, or 'LABEL={name: ..., path: ..., split: "
        f"...}}'; repeat for several{default}",
    )
    task.add_argument(
        "--reward",
        action="append",
        required=required,
        metavar="REWARD",
        help="what to score with: LABEL, LABEL=TYPE or 'LABEL={type: ..., ...}' as in a recipe's reward_kwargs, or a "
        f"recipe.yaml whose rewards to use; repeat for several{default}",
    )
    task.add_argument("--limit", type=int, metavar="N", help="first N prompts of each data set (default: all)")


def _add_common(task: argparse.ArgumentParser, max_new_tokens: int | None, max_prompt_tokens: int | None) -> None:
    task.add_argument(
        "--model",
        nargs="+",
        help="folder or Hub id of a causal language model, or the folder of a PEFT adapter; several are evaluated one "
        "after the other, each in a folder of its own",
    )
    task.add_argument(
        "--predictions",
        metavar="FILE",
        help="score text generated elsewhere, without a model: lines of JSON with `id` and `completion`",
    )
    task.add_argument(
        "--output",
        metavar="DIR",
        help="folder of the run, with several models of their folders (default: eval/TASK/MODEL, eval/TASK; none with "
        "--predictions)",
    )
    defaults = {"max_new_tokens": max_new_tokens, "max_prompt_tokens": max_prompt_tokens}
    choices = {"backend": BACKENDS, "dtype": DTYPES}
    for item in fields(GenerationSettings):
        if item.name != "model":
            default = defaults.get(item.name, item.default)
            shown = "as in training" if item.name in defaults and max_new_tokens is None else default
            task.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=next((kind for kind in (int, float) if kind in (item.type, *get_args(item.type))), str),
                default=default,
                choices=choices.get(item.name),
                help=item.metadata["help"] + ("" if shown is None else f" (default: {shown})"),
            )


def _output(arguments: argparse.Namespace) -> Path | None:
    """The folder of the run; `None` where it writes nothing."""
    if arguments.output is not None:
        folder = Path(arguments.output)
    elif arguments.model is None:
        return None
    elif arguments.task == "rewards" and Path(arguments.model).is_dir():
        folder = Path(arguments.adapter or arguments.model) / "eval"
    else:
        folder = Path("eval") / arguments.task / Path(arguments.adapter or arguments.model).resolve().name
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not place.is_dir():
        raise UsageError(f"--output is {folder}, but {place} is a file; give a folder.")
    return folder


def _settings(arguments: argparse.Namespace, **changes: Any) -> GenerationSettings:
    names = [field.name for field in fields(GenerationSettings)]
    return GenerationSettings(**{**{name: getattr(arguments, name) for name in names}, **changes})


def _predict(arguments: argparse.Namespace, rows: list) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Completions by row id, and what the results say about where they come from."""
    from ..evaluation.predictions import read_predictions
    from ..evaluation.running import generate_predictions

    if arguments.predictions is not None:
        predictions = read_predictions(arguments.predictions, rows)
        if missing := len(rows) - len(predictions):
            print(f"Warning: {arguments.predictions} holds no completion for {missing} of {len(rows)} rows.")
        return predictions, {"predictions": str(arguments.predictions)}
    settings = _settings(arguments)
    predictions = generate_predictions(rows, settings, _output(arguments))
    return predictions, {"model": settings.model, "adapter": settings.adapter, "settings": settings.identity()}


def _baseline(arguments: argparse.Namespace, rows: list, remedy: str = "") -> Any:
    """Completions to compare with, or the settings that will make them; `None` without a baseline."""
    from ..evaluation.predictions import is_predictions, read_predictions

    if arguments.baseline is None:
        return None
    if is_predictions(arguments.baseline):
        return read_predictions(arguments.baseline, rows)
    if _output(arguments) is None:
        raise UsageError("a baseline model needs --output, where its completions go.")
    settings = _settings(arguments, model=arguments.baseline, adapter=None)
    try:
        settings.identity()  # a baseline that does not exist must fail before the model has run
    except UsageError as error:
        raise UsageError(f"{error}{remedy}") from error
    return settings


def _predict_both(arguments: argparse.Namespace, rows: list, baseline: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """As [`_predict`], of the `model` and of the `baseline`, if there is one."""
    predictions, source = _predict(arguments, rows)
    if isinstance(baseline, GenerationSettings):
        from ..evaluation.running import generate_predictions

        baseline = generate_predictions(rows, baseline, _output(arguments) / "baseline", description="Baseline")
    sets = {"model": predictions} if baseline is None else {"model": predictions, "baseline": baseline}
    return sets, {**source, "baseline": arguments.baseline}


def _report(arguments: argparse.Namespace, task: Any, results: dict[str, Any], scores: list[dict[str, Any]]) -> int:
    from ..evaluation.running import write_results

    # Written first: a terminal or a pipe may be gone by now.
    path = None if (folder := _output(arguments)) is None else write_results(folder, results, scores)
    task.print_results(results)
    if path is not None:
        print(f"Results: {path}")
    return 0


def _api_bank(arguments: argparse.Namespace) -> int:
    from ..tasks.tool_calling import api_bank

    try:
        levels = sorted({int(level) for level in arguments.levels.split(",")})
    except ValueError:
        raise UsageError(f"--levels is {arguments.levels!r}; give numbers such as 1,3.") from None
    rows = api_bank.load_rows(arguments.data, levels, arguments.limit)
    predictions, source = _predict(arguments, rows)
    results, scores = api_bank.score_predictions(rows, predictions, arguments.protocol)
    return _report(arguments, api_bank, {**results, **source}, scores)


def _bfcl(arguments: argparse.Namespace) -> int:
    from ..tasks.tool_calling import bfcl

    if (folder := _output(arguments)) is None:
        raise UsageError("--predictions needs --output, where the result files go.")
    categories = arguments.categories.split(",") if arguments.categories else bfcl.CATEGORIES
    rows = bfcl.load_rows(arguments.data, categories, arguments.limit, arguments.prompts)
    predictions, source = _predict(arguments, rows)
    results, scores = bfcl.write_result_files(rows, predictions, folder)
    return _report(arguments, bfcl, {**results, **source}, scores)


def _safe_alignment(arguments: argparse.Namespace) -> int:
    from ..evaluation.inputs import data_options, reward_options
    from ..evaluation.scoring import compute_scores, resolve_rewards, score_labels
    from ..recipe.values import without_secrets
    from ..tasks.safe_alignment import evaluation as task

    rewards = resolve_rewards(options := reward_options(arguments.reward))
    rows = task.load_rows(data_options(arguments.data), arguments.limit)
    sets, source = _predict_both(arguments, rows, _baseline(arguments, rows))
    scores = compute_scores(rows, sets, rewards)
    baseline = scores.get("baseline")
    labels = score_labels(rewards)
    results = task.summarize(rows, sets["model"], scores["model"], labels, baseline, arguments.protocol)
    lines = [{"id": row.id, **scores["model"][row.id]} for row in rows]
    if baseline is not None:
        lines = [{**line, "baseline": baseline[line["id"]]} for line in lines]
    return _report(arguments, task, {**results, **source, "rewards": without_secrets(options)}, lines)


def _rewards(arguments: argparse.Namespace) -> int:
    from ..evaluation import rewards as task
    from ..evaluation.inputs import data_of, data_options, reward_options, rewards_of
    from ..evaluation.scoring import compute_scores, resolve_rewards, score_labels
    from ..recipe.values import without_secrets

    recipe, model = _recipe_of(arguments), arguments.adapter or arguments.model
    options = reward_options(arguments.reward) if arguments.reward else rewards_of(recipe)
    if not options:
        where = arguments.config or model or "the predictions"
        raise UsageError(
            f"which rewards? There is no recipe with `reward_funcs` in {where}; give --reward or --config."
        )
    rewards = resolve_rewards(options, columns=True)
    labels = score_labels(rewards)
    given = (not arguments.reward and recipe.get("reward_weights")) or [1.0] * len(labels)
    if len(given) != len(labels):
        raise UsageError(f"`reward_weights` has {len(given)} entries for the rewards {', '.join(labels)}.")
    weights = dict(zip(labels, given, strict=True))
    rows = task.load_rows(
        data_options(arguments.data) if arguments.data else data_of(recipe), rewards, arguments.limit
    )
    arguments.max_new_tokens = arguments.max_new_tokens or recipe.get("max_completion_length") or 512
    arguments.max_prompt_tokens = arguments.max_prompt_tokens or recipe.get("max_prompt_tokens")
    key = "chat_template_kwargs"
    arguments.chat_template_kwargs = arguments.chat_template_kwargs or as_mapping(key, recipe.get(key))
    before = recipe.get("model_name_or_path")
    if arguments.baseline is None and model is not None and before and Path(before).resolve() != Path(model).resolve():
        arguments.baseline = before
    elif arguments.baseline == "none":
        arguments.baseline = None
    baseline = _baseline(arguments, rows, remedy=" --baseline none compares with nothing.")

    sets, source = _predict_both(arguments, rows, baseline)
    if model is not None:
        task.add_completion_ids(sets.values(), model)
    scores = compute_scores(rows, sets, rewards, **task.reward_arguments(model))
    results = task.summarize(rows, sets["model"], scores["model"], weights, scores.get("baseline"))
    lines = [{"id": row.id, **{label: scores["model"][row.id][label] for label in labels}} for row in rows]
    if "baseline" in scores:
        lines = [
            {**line, "before": {label: scores["baseline"][line["id"]][label] for label in labels}} for line in lines
        ]
    results |= {**source, "rewards": without_secrets(options), "weights": weights}
    return _report(arguments, task, results, lines)


def _recipe_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keys of the recipe that --config names or the model's folder holds; none where there is no recipe."""
    from ..recipe.files import read_recipe_file

    if arguments.config is not None:
        return read_recipe_file(Path(arguments.config))
    for folder in (arguments.adapter, arguments.model):
        if folder is not None and (Path(folder) / "recipe.yaml").is_file():
            return read_recipe_file(Path(folder) / "recipe.yaml")
    return {}
