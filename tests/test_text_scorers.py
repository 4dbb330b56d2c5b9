"""TF-IDF scorers fitted on preference pairs, and the command that fits them."""

import json
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gd2po_trl.cli import main
from gd2po_trl.datasets import load_dataset_by_name
from gd2po_trl.errors import UsageError
from gd2po_trl.reward_models.text_scorer import TextScorer, fit_text_scorer
from gd2po_trl.rewards import resolve_reward


KIND = ("please", "sorry", "thank you", "glad to help", "of course")
RUDE = ("shut up", "idiot", "go away", "whatever", "no way")


def made_up_pairs(rows=100):
    """Kind responses are preferred; the noun is the prompt's and tells nothing."""
    pairs = {"prompt": [], "chosen": [], "rejected": [], "chosen_side": []}
    for row in range(rows):
        noun = f"thing{row % 20}"
        pairs["prompt"].append(f"Tell me about {noun}.")
        pairs["chosen"].append(f"{KIND[row % 5]} {noun} {KIND[row // 5 % 5]}")
        pairs["rejected"].append(f"{RUDE[row % 5]} {noun} {RUDE[row // 7 % 5]}")
        pairs["chosen_side"].append(row % 3 % 2)
    return pairs


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return fit_text_scorer(made_up_pairs(), tmp_path_factory.mktemp("scorer") / "kind", source="made up")


def test_learns_what_people_prefer(scorer):
    assert scorer.accuracy == 1.0
    kind, rude, unknown, empty = scorer([""] * 4, ["glad to help", "shut up", "zzz qqq", ""])
    assert kind > 0 > rude
    assert unknown == empty == 0


def test_plain_and_conversational_completions_score_the_same(scorer):
    messages = [{"role": "assistant", "content": "thank you"}]
    assert scorer(["a"] * 2, ["thank you", messages], answer=["x", "y"])[0] == scorer(["b"], [messages])[0]
    assert scorer(["a"], [[{"role": "assistant", "content": None}]]) == [0]
    assert scorer([], []) == []


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_has_a_score(scorer, text):
    (score,) = scorer([""], [text])
    # The features have length at most 1, so no text can outbid the weights.
    assert abs(score) <= sum(scorer._weight**2) ** 0.5 + 1e-9


@pytest.mark.parametrize("sides", [[0, 1] * 50, [1] * 95 + [0] * 5])
def test_the_sides_decide_nothing(tmp_path, sides):
    pairs = made_up_pairs()
    one = fit_text_scorer(pairs, tmp_path / "one")
    other = fit_text_scorer({**pairs, "chosen_side": sides}, tmp_path / "other")
    assert one.score(["please", "idiot"]) == pytest.approx(other.score(["please", "idiot"]), abs=1e-4)


def test_labels_without_information_are_not_learned(tmp_path):
    """The held-out accuracy is about a half where the responses say nothing: neither side nor prompt leaks."""
    draw = random.Random(0)
    pairs = made_up_pairs(400)
    for column in ("chosen", "rejected"):
        pairs[column] = [" ".join(draw.choices(KIND + RUDE, k=4)) for _ in range(400)]
    # Each pair twice, under one prompt: a fold that held one of the two out would have seen the other.
    pairs = {column: [value for value in values for _ in range(2)] for column, values in pairs.items()}
    pairs["prompt"] = [f"prompt {row // 2}" for row in range(800)]
    assert 0.42 < fit_text_scorer(pairs, tmp_path / "noise").accuracy < 0.58


def test_files_are_a_function_of_the_pairs_and_hold_no_code(tmp_path):
    fit_text_scorer(made_up_pairs(), tmp_path / "a")
    fit_text_scorer(made_up_pairs(), tmp_path / "b")
    files = sorted(file.name for file in (tmp_path / "a").iterdir())
    assert files == ["text_scorer.json", "text_scorer.safetensors"]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    description = json.loads((tmp_path / "a" / "text_scorer.json").read_text())
    assert (description["num_pairs"], description["folds"], description["accuracy"]) == (100, 5, 1.0)


def test_too_few_pairs_and_one_sided_pairs(tmp_path):
    with pytest.raises(UsageError, match="few has 40 preference pairs; a scorer needs at least 50"):
        fit_text_scorer(made_up_pairs(40), tmp_path, source="few")
    with pytest.raises(UsageError, match="on both sides"):
        fit_text_scorer({**made_up_pairs(), "chosen_side": [0] * 100}, tmp_path)


@pytest.mark.parametrize("damage", ["missing", "text", "format", "weights", "terms"])
def test_damaged_folder_is_one_error(tmp_path, damage):
    folder = tmp_path / "scorer"
    fit_text_scorer(made_up_pairs(), folder)
    file = folder / "text_scorer.json"
    description = json.loads(file.read_text())
    if damage == "missing":
        file.unlink()
    elif damage == "text":
        file.write_text("{")
    elif damage == "format":
        file.write_text(json.dumps({**description, "format": 2}))
    elif damage == "weights":
        (folder / "text_scorer.safetensors").write_bytes(b"nonsense")
    else:
        file.write_text(json.dumps({**description, "terms": description["terms"][1:]}))
    with pytest.raises(UsageError, match=r"is no folder of a fitted text scorer .*gd2po fit-scorers"):
        TextScorer(str(folder))


def test_without_scikit_learn_the_remedy_is_named(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        TextScorer(str(tmp_path))
    with pytest.raises(UsageError, match="pip install scikit-learn"):
        fit_text_scorer(made_up_pairs(), tmp_path)


def pairs_file(path, **labels):
    pairs = made_up_pairs()
    rows = [
        {"prompt": prompt, "response_0": chosen, "response_1": rejected, **labels}
        for prompt, chosen, rejected in zip(pairs["prompt"], pairs["chosen"], pairs["rejected"], strict=True)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def test_command_fits_both_scorers_for_a_recipe(tmp_path, capsys):
    helpful = pairs_file(tmp_path / "helpful.json", better_response_id=0)
    harmless = pairs_file(tmp_path / "harmless.json", better_response_id=1)
    output = tmp_path / "scorers"
    arguments = ["--helpful", helpful, "--harmless", harmless, "--output", str(output)]
    assert main(["fit-scorers", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "held-out accuracy 1.000" in printed and "order 100% of the pairs differently" in printed
    for label, better in (("helpful", "glad to help"), ("harmless", "shut up")):
        reward = resolve_reward(label, {"type": "text_scorer", "path": str(output / label)})
        assert reward.__name__ == label
        first, second = reward(prompts=["a", "a"], completions=["glad to help", "shut up"])
        assert (first > second) == (better == "glad to help")


def test_command_takes_both_labels_of_one_file(tmp_path):
    both = pairs_file(tmp_path / "pku_saferlhf.json", better_response_id=0, safer_response_id=1)
    arguments = ["--dataset", "pku_saferlhf", "--helpful", both, "--harmless", both, "--output", str(tmp_path / "s")]
    assert main(["fit-scorers", *arguments]) == 0
    helpful, harmless = (
        TextScorer(str(tmp_path / "s" / name)).score(["shut up"])[0] for name in ("helpful", "harmless")
    )
    assert helpful < 0 < harmless


def test_command_names_a_missing_file_and_wrong_folds(tmp_path, capsys):
    missing = str(tmp_path / "nowhere.json")
    assert main(["fit-scorers", "--helpful", missing, "--harmless", missing, "--output", str(tmp_path)]) == 2
    assert "nowhere.json" in capsys.readouterr().err
    assert main(["fit-scorers", "--folds", "1", "--output", str(tmp_path)]) == 2
    assert "--folds must be at least 2" in capsys.readouterr().err


def test_scikit_learn_is_not_imported_before_it_is_needed():
    code = (
        "import sys, gd2po_trl.reward_models.text_scorer; sys.exit('sklearn' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_accuracy_on_human_preferences(shared_dir, tmp_path):
    """About 0.61 on HH-RLHF's test pairs, better than a coin and far from perfect."""
    file = shared_dir / "data" / "hh_rlhf" / "hh_rlhf_harmless_test.json"
    pairs = load_dataset_by_name("hh_rlhf_pairs", str(file), dimension="harmless")
    assert fit_text_scorer(pairs, tmp_path / "harmless").accuracy == pytest.approx(0.615, abs=0.02)
