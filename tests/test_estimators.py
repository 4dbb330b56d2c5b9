"""Estimators of the user's own: the two that ship, what one is given and may return, training, recipes, compare."""

import copy
import functools
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import letters_dataset, low_bytes, spread_bytes, tiny_args, tiny_settings

from gd2po_trl import METHODS, GD2POConfig, GD2POTrainer, compute_advantages
from gd2po_trl.comparison.variants import make_variant
from gd2po_trl.diagnostics import conflict_metrics
from gd2po_trl.errors import UsageError
from gd2po_trl.estimators import check_estimator, load_estimator, rvpo, soft_conflicts
from gd2po_trl.model_card import training_section
from gd2po_trl.recipe import load_recipe


def summed(per_reward, num_generations):
    return per_reward.sum(1)


@st.composite
def batches(draw):
    groups, size, rewards = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    value = st.one_of(st.sampled_from([0.0, 1.0, 3.0]), st.floats(-100, 100), st.just(float("nan")))
    count = groups * size * rewards
    flat = draw(st.lists(value, min_size=count, max_size=count))
    return torch.tensor(flat, dtype=torch.float64).view(groups * size, rewards), size


@given(batch=batches(), conflict_filter=st.sampled_from(["hard", "snr", None]), dtype=st.sampled_from(["32", "64"]))
def test_the_sum_as_an_estimator_changes_nothing(batch, conflict_filter, dtype):
    rewards, size = batch
    rewards = rewards.to(getattr(torch, f"float{dtype}"))
    plain = compute_advantages(rewards, size, conflict_filter=conflict_filter)
    mine = compute_advantages(rewards, size, conflict_filter=conflict_filter, estimator=summed)
    for name, value in vars(plain).items():
        assert torch.allclose(getattr(mine, name), value, atol=1e-6) and getattr(mine, name).dtype == value.dtype


@given(batch=batches(), k=st.floats(0.01, 20))
def test_rvpo_is_the_formula_between_minimum_and_mean(batch, k):
    rewards, size = batch
    options = {"conflict_filter": None, "consensus_weighting": None, "whitening": None}
    result = compute_advantages(rewards, size, estimator=functools.partial(rvpo, k=k), **options)
    for row, raw, combined in zip(result.per_reward, rewards, result.combined.tolist(), strict=True):
        scored = row[~raw.isnan()].numpy()
        if not len(scored):
            assert combined == 0
            continue
        assert combined == pytest.approx(-np.log(np.mean(np.exp(-k * scored))) / k, abs=1e-9)
        assert scored.min() - 1e-9 <= combined <= scored.mean() + 1e-9
    assert torch.equal(result.advantages, result.combined)


def test_rvpo_leaves_out_what_does_not_count():
    rewards = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, float("nan"), 2.0]])
    watched = compute_advantages(rewards, 4, reward_weights=[1, 1, 0], estimator=rvpo)
    assert torch.equal(watched.advantages, compute_advantages(rewards[:, :2], 4, estimator=rvpo).advantages)
    assert (compute_advantages(rewards[:, :1], 4, reward_weights=[0], estimator=rvpo).combined == 0).all()
    with pytest.raises(ValueError, match="`k`"):
        compute_advantages(rewards, 4, estimator=functools.partial(rvpo, k=0))


@given(batch=batches())
def test_soft_conflicts_weigh_what_the_hard_filter_drops(batch):
    rewards, size = batch
    options = {"conflict_filter": None, "consensus_weighting": None, "whitening": None}
    plain = compute_advantages(rewards, size, **options)
    soft = compute_advantages(rewards, size, estimator=soft_conflicts, **options)
    factor = torch.where(plain.conflict, plain.agreement.abs(), 1.0)
    assert torch.allclose(soft.advantages, plain.combined * factor)
    assert torch.equal(soft.agreement, plain.agreement) and torch.equal(soft.conflict, plain.conflict)


REWARDS = torch.tensor([[3.0, 0.2], [3.0, 0.6], [0.0, 0.2], [-3.0, float("nan")]])


def test_what_an_estimator_is_given():
    seen = {}

    def raw(rewards, size, *, token_counts, reward_weights=None, **others):
        seen.update(others, rewards=rewards.clone(), size=size, counts=token_counts, weights=reward_weights)
        rewards.zero_(), others["per_reward"].zero_()  # its own copies
        return rewards[:, 0]

    before = REWARDS.clone()
    result = compute_advantages(
        REWARDS, 4, reward_weights=[1.0, 2.0], token_counts=[4, 3, 2, 1], conflict_filter=None, estimator=raw
    )
    plain = compute_advantages(REWARDS, 4, reward_weights=[1.0, 2.0], token_counts=[4, 3, 2, 1], conflict_filter=None)
    assert set(seen) == {"per_reward", "conflict", "agreement", "rewards", "size", "counts", "weights"}
    assert torch.equal(REWARDS.nan_to_num(), before.nan_to_num()) and seen["size"] == 4
    assert torch.allclose(seen["rewards"].float(), before, equal_nan=True) and seen["rewards"].dtype == torch.float64
    assert seen["counts"].tolist() == [4, 3, 2, 1] and seen["weights"].tolist() == [1, 2]
    assert torch.equal(result.per_reward, plain.per_reward) and torch.equal(seen["conflict"], plain.conflict)
    metrics = [conflict_metrics(REWARDS, each, ["a", "b"], 4)["cancellation"] for each in (result, plain)]
    assert metrics[0] == metrics[1], "the rewards cancel as much, whatever is made of them"


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (lambda a, g: a, "shape"),
        (lambda a, g: a.sum(1).tolist(), "floating tensor"),
        (lambda a, g: a.sum(1) > 0, "torch.bool"),
        (lambda a, g: None, "None"),
        (lambda a, g: a.sum(1) / 0, "not finite"),
        (lambda a: a.sum(1), "TypeError"),
        (lambda a, g, unknown: a.sum(1), "unknown"),
        (lambda a, g: {}["key"], "KeyError"),
    ],
)
def test_what_it_must_not_return(estimator, words):
    with pytest.raises(ValueError, match=f"(?s)The estimator '<lambda>'.*{words}"):
        compute_advantages(REWARDS, 4, estimator=estimator)


def test_nothing_is_asked_of_it_for_rollouts_that_no_reward_scored():
    rewards = torch.tensor([[3.0], [float("nan")], [0.0], [1.0]])
    result = compute_advantages(rewards, 4, estimator=lambda rewards, size: rewards[:, 0])
    assert result.advantages.isfinite().all() and result.advantages[1] == 0


# Configuration and loading


class Scaled:
    def __init__(self, factor=1.0):
        self.factor = factor

    def __call__(self, per_reward, num_generations):
        return self.factor * per_reward.sum(1)


def config(**overrides):
    return GD2POConfig("unused", use_cpu=True, bf16=False, **overrides)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": 3}, "`estimator`"),
        ({"estimator_kwargs": {"k": 1}}, "`estimator_kwargs`"),
        ({"estimator": rvpo, **METHODS["grpo"]}, "sum_then_normalize"),
        ({"estimator": rvpo, "estimator_kwargs": "[1]"}, "`estimator_kwargs`"),
    ],
)
def test_settings_that_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        config(**settings)


def test_a_config_with_a_function_can_be_saved_copied_and_logged():
    args = config(estimator=lambda per_reward, size: per_reward.sum(1))
    name = f"{__name__}.test_a_config_with_a_function_can_be_saved_copied_and_logged.<locals>.<lambda>"
    assert json.loads(args.to_json_string())["estimator"] == name
    assert pickle.loads(pickle.dumps(args)).estimator == name
    assert copy.deepcopy(args).estimator is copy.copy(args).estimator is args.estimator
    assert f"| `estimator` | `{name}` |" in training_section(args, ["a"], [1.0])
    assert config(estimator=functools.partial(rvpo, k=2)).estimator_name() == "gd2po_trl.estimators.rvpo"
    assert config(estimator=Scaled(2)).estimator_name() == f"{__name__}.Scaled"
    assert config(estimator="none").estimator is None


def test_loading(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "made_up.py").write_text(
        "def total(per_reward, num_generations):\n    return per_reward.sum(1)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_estimator(None) is None and load_estimator(rvpo) is rvpo
    assert load_estimator("gd2po_trl.estimators.rvpo", {"k": 3.0}).keywords == {"k": 3.0}
    assert load_estimator(f"{__name__}.Scaled", {"factor": 2.0}).factor == load_estimator(Scaled, {"factor": 2}).factor
    for path in ("own.made_up.total", "own/made_up.py:total", "./own/made_up.py:total"):
        assert load_estimator(path)(torch.ones(2, 3), 2).tolist() == [3, 3]
    for path, kwargs, words in (
        ("rvpo", {}, "dotted path"),
        ("/abs/made_up.py:total", {}, "dotted path"),
        ("own.made_up.totl", {}, "own.made_up.total"),
        ("no_such_module.f", {}, "no_such_module"),
        ("gd2po_trl.estimators.rvpo", {"kk": 1}, "`k`"),
        ("gd2po_trl.estimators.rvpo", {"rewards": 1}, "`rewards`"),
    ):
        with pytest.raises(UsageError, match="`estimator`") as error:
            load_estimator(path, kwargs)
        assert words in str(error.value)


def test_a_mistake_shows_before_a_model_loads():
    state = torch.get_rng_state()
    check_estimator(lambda per_reward, size: per_reward.sum(1) * torch.rand(()), 3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    args = tiny_args("unused", estimator=lambda per_reward, size: per_reward.sum(0))
    with pytest.raises(ValueError, match="The estimator '<lambda>' returned"):
        GD2POTrainer("no/such-model", [low_bytes, spread_bytes], args, train_dataset=letters_dataset())


def test_compare_takes_an_estimator_like_a_method():
    variants = [
        make_variant("gdpo"),
        make_variant("gd2po_trl.estimators.rvpo"),
        make_variant("gd2po_trl/estimators.py:rvpo", "rvpo_5", ("--estimator_kwargs", '{"k": 5}')),
        make_variant("gdpo", "soft", ("--estimator", "a.b")),
    ]
    path = ("--estimator", "gd2po_trl.estimators.rvpo")
    assert [(variant.name, variant.method, variant.overrides) for variant in variants] == [
        ("gdpo", "gdpo", ()),
        ("rvpo", "gdpo", path),
        ("rvpo_5", "gdpo", (*path, "--estimator_kwargs", '{"k": 5}')),
        ("soft", "gdpo", ("--estimator", "a.b")),
    ]


# Training


@pytest.fixture
def build(tiny_policy, tmp_path):
    def _build(folder="run", **overrides):
        args = tiny_args(tmp_path / folder, **overrides)
        return GD2POTrainer(str(tiny_policy), [low_bytes, spread_bytes], args, train_dataset=letters_dataset())

    return _build


def spied(trainer):
    batches, calculate, generate = [], trainer._calculate_rewards, trainer._generate_and_score_completions

    def calculate_rewards(*args, **kwargs):
        batches.append({"rewards": calculate(*args, **kwargs)})
        return batches[-1]["rewards"]

    def generate_and_score(inputs):
        output = generate(inputs)
        batches[-1].update(advantages=output["advantages"], counts=output["completion_mask"].sum(1))
        return output

    trainer._calculate_rewards, trainer._generate_and_score_completions = calculate_rewards, generate_and_score
    return batches


@pytest.mark.parametrize("estimator", [rvpo, soft_conflicts])
@pytest.mark.parametrize("method", ["gdpo", "gd2po_hard"])
def test_training_with_it_and_resuming_bit_for_bit(build, tmp_path, estimator, method):
    settings = {**METHODS[method], "estimator": estimator, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    settings |= {"update_share": 0.5} if method == "gd2po_hard" else {}
    whole = build(**settings)
    batches = spied(whole)
    whole.train()
    if method == "gdpo":
        differs = False
        for batch in batches:
            expected = compute_advantages(
                batch["rewards"], 4, token_counts=batch["counts"], conflict_filter=None, estimator=estimator
            )
            assert torch.equal(batch["advantages"], expected.advantages)
            plain = compute_advantages(batch["rewards"], 4, token_counts=batch["counts"], conflict_filter=None)
            differs |= not torch.allclose(expected.advantages, plain.advantages, atol=1e-3)
        assert differs
    settings["estimator"] = f"{estimator.__module__}.{estimator.__name__}"
    resumed = build(folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for mine, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_recipe_names_it(tiny_policy, tmp_path, monkeypatch):
    from gd2po_trl.analysis import analyze
    from gd2po_trl.training import run_recipe

    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "say {letter}: "}}\n' for letter in "abcdefgh"))
    settings = {
        **tiny_settings(tmp_path / "out"),
        "model_name_or_path": str(tiny_policy),
        "dataset_path": "prompts.jsonl",
        "reward_funcs": ["low", "spread"],
        "reward_kwargs": {"low": {"type": "tiny.low_bytes"}, "spread": {"type": "tiny.spread_bytes"}},
        "method": "gdpo",
        "estimator": "gd2po_trl.estimators.rvpo",
        "estimator_kwargs": {"k": 2.0},
        "reward_weight_schedules": {"spread": {"linear": {0: 0.0, 2: 1.0}}},
        "log_completions": True,
        "num_completions_to_print": 0,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings))
    trainer = run_recipe(load_recipe(tmp_path / "recipe.yaml"))
    assert trainer._estimator.keywords == {"k": 2.0}
    again = load_recipe(tmp_path / "out" / "recipe.yaml").training
    assert (again.estimator, again.estimator_kwargs) == ("gd2po_trl.estimators.rvpo", {"k": 2.0})
    assert again.reward_weight_schedules == {"spread": {"linear": {"0": 0.0, "2": 1.0}}}
    warnings = analyze(tmp_path / "out").warnings
    assert any("`reward_weight_schedules`" in warning for warning in warnings), warnings
    settings["estimator"] = "gd2po_trl.estimators.rvpoo"
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings | {"output_dir": "other"}))
    with pytest.raises(UsageError, match="`estimator`"):
        run_recipe(load_recipe(tmp_path / "recipe.yaml"))
