"""KoLeo: spread a batch's embeddings by pushing each away from its nearest neighbour."""

import torch
from torch import Tensor


def koleo_loss(embeddings: Tensor) -> Tensor:
    """Mean of -log of the distance to the nearest other row.

    Args:
        embeddings: (B, D) unit rows of one view, B >= 2.

    Source: Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, equation 2.
    """
    with torch.no_grad():
        similarity = embeddings @ embeddings.T
        nearest = similarity.fill_diagonal_(-2.0).argmax(1)
    distance = torch.linalg.vector_norm(embeddings - embeddings[nearest] + 1e-8, dim=1)
    return -torch.log(distance + 1e-8).mean()
