"""Low-shot classification: logistic regression on frozen features of a few labelled images."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import draws_figure
from massl_ray.evaluation.checks import calm, labelled
from massl_ray.evaluation.draws import Purpose, keyed, random_state, some_of_each
from massl_ray.evaluation.results import Figure, Result, Split

STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)  # C of scikit-learn: the larger, the weaker the penalty
ALONE = 0.1  # where a class has one image, so that nothing can be held out
FOLDS = 5
ITERATIONS = 1000


def lowshot(
    train: Split,
    test: Split,
    *,
    shares: Sequence[float] = (0.01, 0.1),
    per_class: Sequence[int] = (1, 5, 10),
    draws: int = 5,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
) -> Result:
    """Top-1 accuracy with shares of the train images and with n images of each class: means over draws, with intervals over
    draws. Each draw is stratified. The penalty is chosen in the first draw of a setting by cross-validation within the draw.

    Features are standardized by all train images, which takes no labels. A setting that the images cannot fill is left out,
    and `skipped` says why.
    """
    both = labelled(train, test, "lowshot")
    if draws < 1 or any(not 0 < share <= 1 for share in shares) or any(number < 1 for number in per_class):
        raise UserError("lowshot: draws and images per class must be 1 or more, shares over 0 and at most 1")
    mean, spread = train.vectors.mean(axis=0), train.vectors.std(axis=0)
    scale = np.where(spread > 1e-6 * spread.max(), 1 / np.maximum(spread, 1e-20), 0)
    rows, queries = (train.vectors - mean) * scale, (test.vectors - mean) * scale
    figures: dict[str, Figure] = {}
    settings, skipped = {}, {}
    for number, (name, counts, why_not) in enumerate(_settings(np.bincount(both.train), both.classes, shares, per_class)):
        if why_not:
            skipped[name] = why_not
            continue
        accuracies, strength = [], None
        for draw in range(draws):
            chosen = some_of_each(both.train, counts, keyed(Purpose.SUBSET, seed, number, draw))
            x, y = rows[chosen], both.train[chosen]
            strength = _strength(x, y, strengths, seed) if strength is None else strength
            accuracies.append(float(np.mean(fitted(x, y, strength).predict(queries) == both.test)))
        figures[f"top1_{name}"] = draws_figure(np.array(accuracies))
        settings[name] = {"images": int(counts.sum()), "C": strength, "top1": accuracies, "std": float(np.std(accuracies))}
    if not figures:
        raise UserError(f"lowshot: no setting can be filled by {len(train)} train images: {'; '.join(skipped.values())}")
    parameters: dict[str, Any] = {
        "settings": settings,
        "skipped": skipped,
        "draws": draws,
        "classifier": f"scikit-learn LogisticRegression, L2, lbfgs, at most {ITERATIONS} iterations",
        "C": f"of {list(strengths)} by {FOLDS}-fold cross-validation within the first draw; {ALONE} where a class has one image",
        "standardized": "by all train images",
        "classes": both.num_classes,
        "train_images": len(train),
        "test_images": len(test),
        "seed": seed,
        "interval": "95 % over draws, Student's t",
    }
    return Result("lowshot", figures, parameters)


def fitted(rows: np.ndarray, labels: np.ndarray, strength: float) -> LogisticRegression:
    """On rows (m, D), labels (m,). Stopping at the last iteration is no error: the accuracy no longer moves then. Nor are many
    classes of few images, which scikit-learn takes for a mistake."""
    with calm(rows.size), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        return LogisticRegression(C=strength, max_iter=ITERATIONS).fit(rows, labels)


def _settings(
    counts: np.ndarray, classes: Sequence[str], shares: Sequence[float], per_class: Sequence[int]
) -> list[tuple[str, np.ndarray, str]]:
    """(name, images of each class, why it cannot be) of each setting."""
    found = []
    total, smallest = int(counts.sum()), int(counts.argmin())
    for share in shares:
        wanted = np.maximum(1, np.round(share * counts)).astype(np.int64)
        few = f"{100 * share:g} % of {total} images is less than one for each of {len(counts)} classes"
        found.append((f"{100 * share:g}_percent".replace(".", "_"), wanted, few if share * total < len(counts) else ""))
    for number in per_class:
        few = f"class {classes[smallest]} has {counts[smallest]} train images, fewer than {number}"
        found.append((f"{number}_per_class", np.full(len(counts), number), few if counts[smallest] < number else ""))
    return found


def _strength(rows: np.ndarray, labels: np.ndarray, strengths: Sequence[float], seed: int) -> float:
    """The C of the best accuracy over folds of the draw itself; of equals the strongest penalty."""
    folds = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    if len(strengths) == 1 or folds < 2:
        return strengths[0] if len(strengths) == 1 else ALONE
    folded = StratifiedKFold(folds, shuffle=True, random_state=random_state(Purpose.SUBSET, seed))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The number of unique classes is greater than 50%")
        parts = list(folded.split(rows, labels))
    scores = {
        strength: sum(
            int(np.sum(fitted(rows[fit], labels[fit], strength).predict(rows[rest]) == labels[rest])) for fit, rest in parts
        )
        for strength in sorted(strengths)
    }
    return max(scores, key=lambda strength: scores[strength])
