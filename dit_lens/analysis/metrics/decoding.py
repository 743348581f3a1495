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
    x, y, group = np.asarray(features, np.float64), np.asarray(labels), np.asarray(groups)
    if x.ndim != 2 or len({len(x), len(y), len(group)}) != 1:
        raise OpError(
            "decode_labels takes features [m, d], labels [m] and groups [m]; got shapes "
            f"{x.shape}, {y.shape}, {group.shape}."
        )
    kept = find_held_out(y, group)
    x, y, group = x[kept], y[kept], group[kept]
    if not len(y):
        return None
    from sklearn.metrics import balanced_accuracy_score

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*y_pred contains classes not in y_true.*")
        accuracy = float(balanced_accuracy_score(y, predict_held_out(x, y, group, seed)))
    return Decoding(accuracy, 1 / len(np.unique(y)), len(y))


def find_held_out(labels: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Which samples can be held out, bool [m]: those of classes that occur in two groups, if there are two classes.

    labels, groups: as in :func:`decode_labels`.
    """
    found = [label for label in np.unique(labels) if len(set(groups[labels == label])) > 1]
    return np.isin(labels, found) if len(found) > 1 else np.zeros(len(labels), bool)


def predict_held_out(features: np.ndarray, labels: np.ndarray, groups: np.ndarray, seed: int = 0) -> np.ndarray:
    """The label of every sample, as a decoder predicts it that was fitted without the sample's group.

    features, labels, groups, seed: as in :func:`decode_labels`; every sample can be held out.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    fewest = min(len(set(groups[labels == label])) for label in np.unique(labels))
    folds = StratifiedGroupKFold(min(FOLDS, fewest), shuffle=True, random_state=seed)
    # Strong regularisation (C = 0.1), because there are usually fewer samples than features.
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message=".*y_pred contains classes not in y_true.*")
        return cross_val_predict(model, features, labels, groups=groups, cv=folds)
