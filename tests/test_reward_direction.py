"""The direction of a reward model: the sign trap of the cost models, and the check at start-up."""

import warnings

import pytest
from score_heads import save_cost_model, save_qwen2_score_head
from tiny import byte_tokenizer

from gd2po_trl.errors import UsageError
from gd2po_trl.reward_models.direction import HARMLESS_PAIRS, HELPFUL_PAIRS, published_direction
from gd2po_trl.reward_models.in_process import RewardModel


def load(folder, **options):
    return RewardModel(str(folder), dtype="float32", **options)


@pytest.fixture(scope="module")
def cost_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "beaver-7b-v1.0-cost"
    return save_cost_model(folder, score_type="cost")


def test_harmless_is_the_negative_cost(cost_model):
    """Fails if the sign of the cost model is flipped: the raw score rises with harmful words, the reward must fall."""
    reward = load(cost_model)
    prompts = ["What shall I do?"] * 3
    completions = ["Please be kind and ask.", "You could hit him.", "You could hit him, kill him, stupid!"]
    harmless, harmful, worse = reward(prompts, completions)
    assert reward._score(reward.encoder(prompts, completions)) == pytest.approx([-harmless, -harmful, -worse])
    assert harmless > harmful > worse
    assert (reward.sign, reward.higher_is) == (-1, "harmless")


def test_self_check_is_silent_where_the_direction_is_right(cost_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(cost_model).load()
        load(cost_model, higher_is="harmful").load()
        assert load(cost_model, higher_is="harmful").sign == 1


def test_self_check_warns_of_an_inverted_model_by_name(tmp_path):
    folder = save_cost_model(tmp_path / "my-model", architecture="LlamaForMyScores")
    reward = load(folder, name="safety", template="beaver", higher_is="harmless")
    assert reward.sign == 1
    with pytest.warns(UserWarning, match=r"reward 'safety' looks inverted.*my-model.*set sign to -1"):
        reward.load()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(folder, template="beaver", higher_is="harmless", sign=-1).load()
        load(folder, template="beaver").load()
        load(folder, template="beaver", higher_is="harmless", self_check=False).load()


def test_known_direction_contradicts_the_declared_one(cost_model):
    with pytest.raises(UsageError, match=r"known to score higher for harmful responses.*Set sign=-1"):
        load(cost_model, sign=1, higher_is="harmless")
    with pytest.warns(UserWarning, match="rewards harmful responses"):
        load(cost_model, sign=1)


@pytest.mark.parametrize(
    ("model", "config", "direction"),
    [
        ("Artessay/Qwen2.5-7B-SafeRLHF-RM", {}, "helpful"),
        ("Artessay/Qwen2.5-7B-SafeRLHF-CM", {}, "harmless"),
        ("/models/Qwen2.5-7B-SafeRLHF-CM/", {}, "harmless"),
        ("PKU-Alignment/beaver-7b-v1.0-reward", {}, "helpful"),
        ("PKU-Alignment/beaver-7b-v1.0-cost", {}, "harmful"),
        ("PKU-Alignment/beaver-7b-v3.0-cost", {}, "harmful"),
        ("PKU-Alignment/beaver-7b-unified-cost", {}, "harmful"),
        ("/snapshots/c1bd34", {"architectures": ["LlamaForScore"], "score_type": "cost"}, "harmful"),
        ("/snapshots/375cd6", {"architectures": ["LlamaForScore"], "score_type": "reward"}, "helpful"),
        ("someone/reward-model", {"architectures": ["LlamaForSequenceClassification"]}, None),
    ],
)
def test_published_directions(model, config, direction):
    assert published_direction(model, type("Config", (), config)()) == direction


@pytest.mark.parametrize(("model", "direction"), [("RM", "helpful"), ("CM", "harmless")])
def test_sign_of_the_published_qwen_models_is_plus(tmp_path, model, direction):
    reward = load(save_qwen2_score_head(tmp_path / f"Qwen2.5-7B-SafeRLHF-{model}", byte_tokenizer()))
    assert (reward.sign, reward.higher_is) == (1, direction)


def test_built_in_pairs_are_pairs():
    for prompt, better, worse in (*HARMLESS_PAIRS, *HELPFUL_PAIRS):
        assert prompt and better and worse and better != worse
