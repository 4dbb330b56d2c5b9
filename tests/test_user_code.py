"""Rewards of the user's own: where they are looked for, what was meant by a name that is not there, their options."""

import os
from pathlib import Path

import pytest

from gd2po_trl.errors import UsageError
from gd2po_trl.rewards import resolve_reward


FILES = {
    "own_rewards.py": "def brevity(completions, max_words=10, **kwargs):\n    return [0.0]\nLIMIT = 3\n",
    "broken_syntax.py": "def f(:\n    pass\n",
    "raises_name.py": "def f(completions, **kwargs):\n    return [0.0]\n\nundefined_name\n",
    "exits.py": "import sys\nsys.exit('usage: exits.py FILE')\n",
    "lacks_package.py": "import a_package_that_nobody_has\n",
    "sub/deep_rewards.py": "def brevity(completions, **kwargs):\n    return [0.0] * len(completions)\n",
    "other-folder/odd_rewards.py": "def brevity(completions, **kwargs):\n    return [0.0] * len(completions)\n",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with modules of the user's."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def message(kind: str, beside: Path | None = None, **kwargs) -> str:
    with pytest.raises(UsageError) as error:
        resolve_reward("mine", {"type": kind, **kwargs}, beside=beside)
    assert "\n" not in str(error.value) and "'mine'" in str(error.value), str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("own_reward.brevity", ["own_reward", "Did you mean own_rewards.brevity?", "{here}"]),
        ("nothing_like_it.brevity", ["nothing_like_it", "current folder", "{here}"]),
        ("own_rewards.brevty", ["Did you mean own_rewards.brevity?", "own_rewards.py"]),
        ("own_rewards.zzz", ["has no `zzz`", "It has: brevity."]),
        ("own_rewards.LIMIT", ["not a function", "brevity"]),
        ("own_rewards.py", ["own_rewards.NAME"]),
        ("own_rewards.py:brevity", ["own_rewards.brevity"]),
        ("own_rewards:brevity", ["own_rewards.brevity"]),
        ("./sub/deep_rewards.py", ["sub.deep_rewards.NAME"]),
        ("sub/deep_rewards.py:brevity", ["sub.deep_rewards.brevity"]),
        ("own_rewards", ["own_rewards.NAME"]),
        ("broken_syntax.f", ["SyntaxError", "broken_syntax.py, line 1"]),
        ("raises_name.f", ["NameError", "undefined_name", "raises_name.py, line 4"]),
        ("exits.f", ["SystemExit", "exits.py, line 2"]),
        ("lacks_package.f", ["imports a_package_that_nobody_has", "not installed"]),
        ("sub.nothing.f", ["no module sub.nothing"]),
        ("own_rewards.inner.f", ["own_rewards.inner"]),
    ],
)
def test_each_says_what_was_meant_and_where_it_was_looked_for(folder, kind, words):
    said = message(kind)
    assert all(word.format(here=folder) in said for word in words), said


def test_a_file_beside_the_recipe(folder):
    assert resolve_reward("mine", {"type": "sub.deep_rewards.brevity"}).__name__ == "mine"
    said = message("deep_rewards.brevity", beside=folder / "sub")
    assert "beside the recipe" in said and "sub.deep_rewards.brevity" in said and str(folder) in said
    said = message("odd_rewards.brevity", beside=folder / "other-folder")
    assert "beside the recipe" in said and f"run the command in {folder / 'other-folder'}" in said
    os.chdir(folder / "sub")
    assert "beside the recipe" not in message("absent_rewards.brevity", beside=folder / "sub")


def plain(completions, max_words=10, **kwargs):
    return [0.0] * len(completions)


def keyword_only(completions, *, scale, **kwargs):
    return [0.0] * len(completions)


class Strict:
    def __init__(self, max_words=10):
        self.max_words = max_words

    def __call__(self, completions, **kwargs):
        return [float(self.max_words)] * len(completions)


class Forwards(Strict):
    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("plain", {"max_word": 30}, ["`max_word`", "Did you mean `max_words`?"]),
        ("plain", {"threshold": 30}, ["`threshold`", "max_words"]),
        ("plain", {"completions": ["a"]}, ["`completions`"]),
        ("plain", {"kwargs": {}}, ["`kwargs`"]),
        ("keyword_only", {"scal": 1}, ["`scal`", "Did you mean `scale`?"]),
        ("Strict", {"max_word": 30}, ["`max_word`", "Did you mean `max_words`?"]),
        ("Forwards", {"facto": 30}, ["`facto`", "Did you mean `factor`?"]),
        ("Forwards", {"max_wordz": 30}, ["max_wordz"]),
    ],
)
def test_an_option_that_nothing_takes_is_refused(name, kwargs, words):
    said = message(f"{__name__}.{name}", **kwargs)
    assert all(word in said for word in words), said


def test_options_that_are_taken():
    for name, kwargs in (("plain", {"max_words": 3}), ("keyword_only", {"scale": 2}), ("Strict", {"max_words": 3})):
        assert callable(resolve_reward("mine", {"type": f"{__name__}.{name}", **kwargs}))
    reward = resolve_reward("mine", {"type": f"{__name__}.Forwards", "factor": 2.0, "max_words": 3})
    assert reward(prompts=["a"], completions=["b"]) == [3.0]


@pytest.mark.parametrize("label", ["correctness", "format", "length"])
def test_options_of_the_built_in_rewards(label):
    with pytest.raises(UsageError, match=r"Did you mean `max_words`|takes no keyword argument `max_word`"):
        resolve_reward(label, {"max_word": 3})
