"""What can be read from features: linear decoding of labels, on groups that the decoder never saw."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from dit_lens.errors import OpError

FOLDS = 5


class Decoding(NamedTuple):
    """How well labels are read. accuracy: balanced, of samples held out. chance: 1 / classes. n: samples."""

    accuracy: float
    chance: float
    n: int

    @property
    def skill(self) -> float:
        """0 at chance, 1 when every held-out sample is right."""
        return (self.accuracy - self.chance) / (1 - self.chance)


def decode(features: Any, labels: Any, groups: Any, *, seed: int = 0) -> Decoding | None:
    """Reads labels from features by logistic regression, always of groups left out of the fit.

    >>> x = np.repeat(np.eye(2), 6, axis=0) + 0.01 * np.arange(24).reshape(12, 2)
    >>> decode(x, ["red"] * 6 + ["blue"] * 6, groups=np.arange(12)).skill
    1.0

    Returns None where too little is known: classes of a single group cannot be held out and are left aside, and fewer
    than two are left. features: [m, d]. labels: [m]. groups: [m], such as the prompt of each image: a decoder that
    has seen another image of the same prompt proves nothing. seed: of the folds (5, or as many as the rarest class
    has groups).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, of = np.asarray(features, np.float64), np.asarray(labels), np.asarray(groups)
    if x.ndim != 2 or len({len(x), len(y), len(of)}) != 1:
        raise OpError(f"decode takes features [m, d], labels [m] and groups [m]; got {x.shape}, {y.shape}, {of.shape}.")
    counts = {label: len(set(of[y == label])) for label in np.unique(y)}
    kept = np.isin(y, [label for label, count in counts.items() if count > 1])
    x, y, of = x[kept], y[kept], of[kept]
    classes = len(np.unique(y))
    if classes < 2:
        return None
    folds = StratifiedGroupKFold(
        min(FOLDS, *(counts[label] for label in np.unique(y))), shuffle=True, random_state=seed
    )
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message=".*y_pred contains classes not in y_true.*")
        predicted = cross_val_predict(model, x, y, groups=of, cv=folds)
        accuracy = float(balanced_accuracy_score(y, predicted))
    return Decoding(accuracy, 1 / classes, len(y))
