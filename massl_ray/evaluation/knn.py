"""k-nearest-neighbour classification on frozen features."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from massl_ray.errors import UserError
from massl_ray.evaluation.bootstrap import INTERVAL, accuracy_figures
from massl_ray.evaluation.checks import labelled, unit
from massl_ray.evaluation.results import Result, Split

KS = (1, 10, 20, 100, 200)
VOTES = 2**24  # similarities held at once


def knn_predict(bank: Tensor, labels: Tensor, queries: Tensor, *, k: int, temperature: float, num_classes: int) -> Tensor:
    """Predicted classes (n,) of `queries` (n, D): a vote of the k nearest rows of `bank` (m, D) by cosine similarity, each
    weighing exp(similarity / temperature). Rows need not be unit vectors; k is lowered to m where the bank is smaller.

    Source: the weighted vote of Wu et al., CVPR 2018, section 3.4.
    """
    bank, queries = normalize(bank.float(), dim=1), normalize(queries.float(), dim=1)
    classes = one_hot(labels.long(), num_classes).float()
    predictions = []
    for chunk in queries.split(1024):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)
        weights = torch.exp((similarity - 1.0) / temperature)
        predictions.append((weights.unsqueeze(2) * classes[nearest]).sum(1).argmax(1))
    return torch.cat(predictions)


def knn_accuracy(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, k: int, temperature: float) -> float:
    """Top-1 accuracy, a share."""
    num_classes = int(max(labels.max(), truth.max())) + 1
    predicted = knn_predict(bank, labels, queries, k=k, temperature=temperature, num_classes=num_classes)
    return (predicted == truth.long()).float().mean().item()


def knn_figures(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, *, k: int, temperature: float) -> dict[str, float]:
    """Shares of `queries` (n, D) that are classified right by `bank` (m, D): `top1` by the k nearest rows, `top1_k1` by the nearest
    one, and where the classes of `truth` (n,) are `uneven` also `mean_per_class`, the mean over them of each one's own `top1`."""
    num_classes = int(max(labels.max(), truth.max())) + 1
    right, right_k1 = (
        (knn_predict(bank, labels, queries, k=near, temperature=temperature, num_classes=num_classes) == truth).double()
        for near in (k, 1)
    )
    figures = {"top1": right.mean().item(), "top1_k1": right_k1.mean().item()}
    if uneven(truth.numpy()):
        figures["mean_per_class"] = torch.stack([right[truth == kind].mean() for kind in truth.unique()]).mean().item()
    return figures


def uneven(labels: np.ndarray) -> bool:
    """Whether the largest of the classes among these labels (n,) has more than twice as many images as the smallest that has any:
    then top-1 accuracy is mostly that of the large ones."""
    counts = np.unique(labels, return_counts=True)[1]
    return bool(counts.max() > 2 * counts.min())


def knn(train: Split, test: Split, *, ks: Sequence[int] = KS, temperature: float = 0.07, judged: int = 20, seed: int = 0) -> Result:
    """Top-1 accuracy for each k, found in one pass, and where the test set's classes are `uneven` also its mean over classes. It is
    judged by k = `judged` and not by whichever k is best on the test images: `best_k` only says which that is."""
    both = labelled(train, test, "knn")
    ks = sorted(set(ks), key=lambda k: (k != judged, k))
    if not ks or min(ks) < 1:
        raise UserError(f"knn: each k must be 1 or more, got {', '.join(map(str, ks)) or 'none'}")
    if max(ks) > len(train):
        raise UserError(f"knn: k = {max(ks)} asks for more neighbours than the {len(train)} train images; ask for smaller k")
    predicted = knn_votes(unit(train.vectors), both.train, unit(test.vectors), ks=ks, temperature=temperature)
    found = {k: accuracy_figures(predicted[k], both.test, seed=seed) for k in ks}
    figures = {f"top1_k{k}": found[k]["top1"] for k in ks}
    best = max(ks, key=lambda k: figures[f"top1_k{k}"].value)
    if uneven(both.test):
        figures |= {f"per_class_k{k}": found[k]["per_class"] for k in ks}
    parameters = {
        "ks": list(ks),
        "temperature": temperature,
        "similarity": "cosine",
        "vote": "exp(similarity / temperature)",
        "judged_by": f"top1_k{ks[0]}",
        "best_k": best,
        "classes": both.num_classes,
        "train_images": len(train),
        "test_images": len(test),
        "seed": seed,
        "interval": INTERVAL,
    }
    return Result("knn", figures, parameters)


def knn_votes(
    bank: np.ndarray, labels: np.ndarray, queries: np.ndarray, *, ks: Sequence[int], temperature: float
) -> dict[int, np.ndarray]:
    """For each k the predicted classes (n,) of unit `queries` (n, D) by unit `bank` (m, D) with labels (m,): the vote of
    `knn_predict`, with the neighbours sought once for the largest k and counted nearest first."""
    rows, classes = torch.from_numpy(bank), torch.from_numpy(labels)
    num_classes = int(classes.max()) + 1
    found: dict[int, list[Tensor]] = {k: [] for k in sorted(ks)}
    for chunk in torch.from_numpy(queries).split(max(1, VOTES // max(len(rows), num_classes))):
        similarity, nearest = (chunk @ rows.T).topk(max(ks), dim=1)
        weights, kinds = torch.exp((similarity - 1.0) / temperature), classes[nearest]
        votes, counted = torch.zeros(len(chunk), num_classes), 0
        for k, predictions in found.items():
            votes.scatter_add_(1, kinds[:, counted:k], weights[:, counted:k])
            predictions.append(votes.argmax(1))
            counted = k
    return {k: torch.cat(predictions).numpy() for k, predictions in found.items()}
