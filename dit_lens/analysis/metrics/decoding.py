"""Linear decoding (a linear probe): how well labels can be predicted from features, in held-out groups."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from dit_lens.arguments.checks import checked
from dit_lens.errors import OpError

# Folds of the cross-validation, at most.
FOLDS = 5


class Decoding(NamedTuple):
    """Result of a linear decoder.

    accuracy: balanced accuracy (mean recall of the classes) on held-out samples.
    chance: balanced accuracy of a guess, 1 / number of classes.
    n: number of samples.
    """

    accuracy: float
    chance: float
    n: int

    @property
    def skill(self) -> float:
        """Accuracy rescaled to 0 at chance and 1 if every held-out sample is right, as sklearn's ``adjusted=True``."""
        return (self.accuracy - self.chance) / (1 - self.chance)


@checked
def decode_labels(features: Any, labels: Any, groups: Any, *, seed: int = 0) -> Decoding | None:
    """Predicts labels from features by logistic regression, with cross-validation over groups.

    >>> x = np.repeat(np.eye(2), 6, axis=0) + 0.01 * np.arange(24).reshape(12, 2)
    >>> decode_labels(x, ["red"] * 6 + ["blue"] * 6, groups=np.arange(12)).skill
    1.0

    A class that occurs in one group only cannot be held out and is left out. Returns None if fewer than two classes
    remain.

    features: [m, d], standardised before the fit.
    labels: [m].
    groups: [m], such as the prompt of each image. No group is in both the training and the test part of a fold,
      because a decoder could recognise another image of the same prompt.
    seed: seed of the folds, of which there are 5, or as many as the rarest class has groups.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y, group = np.asarray(features, np.float64), np.asarray(labels), np.asarray(groups)
    if x.ndim != 2 or len({len(x), len(y), len(group)}) != 1:
        raise OpError(
            "decode_labels takes features [m, d], labels [m] and groups [m]; got shapes "
            f"{x.shape}, {y.shape}, {group.shape}."
        )
    counts = {label: len(set(group[y == label])) for label in np.unique(y)}
    kept = np.isin(y, [label for label, count in counts.items() if count > 1])
    x, y, group = x[kept], y[kept], group[kept]
    classes = len(np.unique(y))
    if classes < 2:
        return None
    folds = StratifiedGroupKFold(
        min(FOLDS, *(counts[label] for label in np.unique(y))), shuffle=True, random_state=seed
    )
    # Strong regularisation (C = 0.1), because there are usually fewer samples than features.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message=".*y_pred contains classes not in y_true.*")
        predicted = cross_val_predict(model, x, y, groups=group, cv=folds)
        accuracy = float(balanced_accuracy_score(y, predicted))
    return Decoding(accuracy, 1 / classes, len(y))
