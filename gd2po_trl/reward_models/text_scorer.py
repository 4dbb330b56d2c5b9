"""
Small text scorers fitted on human preference pairs: TF-IDF features and a logistic Bradley-Terry model.

They are weak, but they score real text in microseconds, and a helpfulness and a harmlessness scorer really
conflict. Needs scikit-learn (`pip install scikit-learn`).
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..messages import written_text


if TYPE_CHECKING:
    import numpy as np
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

DESCRIPTION = "text_scorer.json"
WEIGHTS = "text_scorer.safetensors"
_FORMAT = 1
_VECTORIZER = {"lowercase": True, "ngram_range": [1, 2], "min_df": 2, "sublinear_tf": True, "norm": "l2"}
# Inverse regularization strength of the logistic regression, scikit-learn's default; not tuned.
_C = 1.0


class TextScorer:
    """
    A fitted text scorer as a reward function for TRL.

    The reward is the Bradley-Terry score of the completion alone: the log odds that people prefer it to a
    completion of score 0.

    Args:
        path (`str`): Folder that [`fit_text_scorer`], or `gd2po fit-scorers`, has written.
        name (`str`, *optional*): Label of the reward in logs. Defaults to the folder's name.

    Raises:
        [`UsageError`]: if the folder holds no scorer, or scikit-learn is not installed.
    """

    def __init__(self, path: str, name: str | None = None):
        _require_sklearn()
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        if not isinstance(path, (str, Path)):
            raise UsageError(f"path={path!r} of a text scorer must be a folder.")
        folder = Path(path).expanduser()
        self.__name__ = name or folder.name
        try:
            self.description: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
            if self.description["format"] != _FORMAT:
                raise ValueError(f"format {self.description['format']} is not {_FORMAT}")
            self._vectorizer = _vectorizer(self.description["vectorizer"], self.description["terms"], weights["idf"])
            self._weight = weights["weight"]
            if len(self._weight) != len(self.description["terms"]):
                raise ValueError(f"{len(self._weight)} weights for {len(self.description['terms'])} terms")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UsageError(
                f"{str(folder)!r} is no folder of a fitted text scorer ({error}). `gd2po fit-scorers --output DIR` "
                "writes DIR/helpful and DIR/harmless."
            ) from error

    @property
    def accuracy(self) -> float:
        """Share of held-out pairs that the scorer orders as people did, from cross-validation when it was fitted."""
        return self.description["accuracy"]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """
        Args:
            prompts (`Sequence[str | list[dict]]`): Ignored.
            completions (`Sequence[str | list[dict]]`): Plain or conversational.
            **columns: Ignored.

        Returns:
            `list[float]`: One score per completion; 0 for one without a known term.
        """
        return self.score([written_text(completion) for completion in completions])

    def score(self, texts: Sequence[str]) -> list[float]:
        """The score per text."""
        return (self._vectorizer.transform(texts) @ self._weight).tolist() if len(texts) else []


def fit_text_scorer(pairs: Any, folder: str | Path, *, source: str = "", folds: int = 5, seed: int = 0) -> TextScorer:
    """
    Fits a scorer on preference pairs, and writes it.

    Logistic regression without intercept on the difference of the two responses' TF-IDF vectors, which is a
    Bradley-Terry model whose strengths are linear in the features (Bradley and Terry 1952). The held-out accuracy
    comes from cross-validation in which vocabulary and weights are fitted on the training folds only, and all pairs
    of one prompt fall into one fold.

    Args:
        pairs (`Dataset` or `dict[str, list]`):
            Columns `prompt`, `chosen`, `rejected` (text) and `chosen_side` (0 or 1), as the loaders of preference
            pairs give them. The side decides which response is subtracted from which, so that both classes occur.
        folder (`str` or `Path`): Where to write; created if it is not there.
        source (`str`, *optional*): What the pairs are, for the record.
        folds (`int`, *optional*, defaults to `5`): Folds of the cross-validation.
        seed (`int`, *optional*, defaults to `0`):
            Of the folds. The result is a function of pairs, folds and seed alone.

    Returns:
        [`TextScorer`]: Read back from `folder`.

    Raises:
        [`UsageError`]: for too few pairs.
    """
    _require_sklearn()
    import numpy as np
    from safetensors.numpy import save_file

    chosen, rejected, prompts = list(pairs["chosen"]), list(pairs["rejected"]), list(pairs["prompt"])
    first = np.asarray(pairs["chosen_side"]) == 0
    if len(chosen) < 10 * folds or len(set(prompts)) < folds or first.all() or not first.any():
        raise UsageError(
            f"{source or 'the data'} has {len(chosen)} preference pairs; a scorer needs at least {10 * folds}, "
            "with the chosen response on both sides."
        )
    accuracy = _cross_validate(chosen, rejected, first, prompts, folds, seed)
    vectorizer, weight = _fit(chosen, rejected, first)
    terms = vectorizer.get_feature_names_out().tolist()
    description = {
        "format": _FORMAT,
        "source": source,
        "num_pairs": len(chosen),
        "accuracy": accuracy,
        "accuracy_standard_error": math.sqrt(accuracy * (1 - accuracy) / len(chosen)),
        "folds": folds,
        "seed": seed,
        "vectorizer": _VECTORIZER,
        "C": _C,
        "terms": terms,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    weights = {"idf": vectorizer.idf_, "weight": weight}
    save_file(
        {name: np.ascontiguousarray(value, dtype=np.float64) for name, value in weights.items()}, folder / WEIGHTS
    )
    return TextScorer(str(folder))


def _require_sklearn() -> None:
    if importlib.util.find_spec("sklearn") is None:
        raise UsageError("text scorers need scikit-learn. Install it with `pip install scikit-learn`.")


def _cross_validate(
    chosen: list[str], rejected: list[str], first: "np.ndarray", prompts: list[str], folds: int, seed: int
) -> float:
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold

    right = 0.0
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, held_out in splitter.split(chosen, first, groups=prompts):
        vectorizer, weight = _fit([chosen[i] for i in train], [rejected[i] for i in train], first[train])
        margin = vectorizer.transform([chosen[i] for i in held_out]) @ weight
        margin -= vectorizer.transform([rejected[i] for i in held_out]) @ weight
        right += np.sum(margin > 0) + 0.5 * np.sum(margin == 0)
    return float(right / len(chosen))


def _fit(chosen: list[str], rejected: list[str], first: "np.ndarray") -> tuple["TfidfVectorizer", "np.ndarray"]:
    import numpy as np
    from scipy.sparse import diags
    from sklearn.linear_model import LogisticRegression

    vectorizer = _vectorizer(_VECTORIZER)
    try:
        vectorizer.fit(chosen + rejected)
    except ValueError as error:
        raise UsageError(f"the responses of the preference pairs have no words in common ({error}).") from error
    difference: csr_matrix = vectorizer.transform(chosen) - vectorizer.transform(rejected)
    difference = (diags(np.where(first, 1.0, -1.0)) @ difference).tocsr()
    model = LogisticRegression(C=_C, fit_intercept=False, max_iter=1000).fit(difference, first)
    return vectorizer, model.coef_[0]


def _vectorizer(settings: dict[str, Any], terms: list[str] | None = None, idf: Any = None) -> "TfidfVectorizer":
    from sklearn.feature_extraction.text import TfidfVectorizer

    settings = {**settings, "ngram_range": tuple(settings["ngram_range"])}
    if terms is None:
        return TfidfVectorizer(**settings)
    vectorizer = TfidfVectorizer(**settings, vocabulary={term: index for index, term in enumerate(terms)})
    vectorizer.idf_ = idf
    return vectorizer
