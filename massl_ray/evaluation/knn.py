"""k-nearest-neighbour classification on frozen features."""

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot


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
