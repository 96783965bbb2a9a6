"""Signs of collapse that need no labels, of the teacher's unit embeddings of a batch. All are sums without atomics: on a GPU, too,
they come out the same each time.

Letters: B images, D embedding width, S memory slots a block.
"""

import math

import torch
from torch import Tensor

from massl_ray.method.products import product

AT_ONCE = 256  # embeddings that meet a block at a time: 16 MB of similarities where S is 16,384


def signs_of_collapse(embeddings: Tensor, block: Tensor) -> Tensor:
    """(embedding_std, effective_rank, uniformity, memory_usage) of (B, D) unit rows and (S, D) rows of the memory."""
    more = torch.stack([uniformity(embeddings), memory_usage(embeddings, block)])
    return torch.cat([embedding_spread(embeddings), more])


def embedding_spread(embeddings: Tensor) -> Tensor:
    """(embedding_std, effective_rank) of (B, D) unit rows.

    embedding_std: root of the rows' total variance; 1 when they lie evenly over the sphere, 0 when they are one point.
    effective_rank: participation ratio (tr C)^2 / tr(C^2) of their covariance C, between 1 and min(B - 1, D).
    """
    centered = (embeddings - embeddings.mean(0)).float()
    gram = centered @ centered.T if len(centered) < centered.shape[1] else centered.T @ centered
    trace = gram.diagonal().sum()
    rank = trace.square() / gram.square().sum().clamp_min(1e-20)
    return torch.stack([(trace / len(centered)).clamp_min(0).sqrt(), rank]).to(embeddings.dtype)


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean of |x - y|^2 over the rows of two views (B, D): 0 where they are the same, 2 where they have nothing to do with each
    other, 4 at most.

    Source: Wang and Isola, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere", ICML 2020, alpha = 2.
    """
    return (first - second).square().sum(1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """Log of the mean of exp(-2 |x - y|^2) over pairs of (B, D) unit rows: 0 for one point (and for one row), lower is more even,
    about -4 on a sphere of many dimensions.

    Source: as of `alignment`, t = 2.
    """
    rows = len(embeddings)
    if rows < 2:
        return embeddings.new_zeros(())
    kernel = product(embeddings, embeddings).sub_(1).mul_(4).exp_()  # |x - y|^2 = 2 - 2 <x, y>
    return (kernel.fill_diagonal_(0).sum() / (rows * (rows - 1))).log()  # a row and itself are no pair


def memory_usage(embeddings: Tensor, block: Tensor) -> Tensor:
    """Entropy of which row of `block` (S, D) is nearest to each of (B, D) embeddings, over the largest there can be, ln min(S, B):
    1 if each has a row of its own, or all rows are used alike; 0 if one row is nearest to all.

    A block of the memory, not all of it, so that it costs little beside the loss, which reads all blocks for all views.
    """
    rows = block.to(embeddings.dtype)
    nearest = torch.cat([product(some, rows).argmax(1) for some in embeddings.split(AT_ONCE)])
    sharing = (nearest.unsqueeze(1) == nearest).sum(1)  # how many have the same nearest row: counts without a scatter
    entropy = (len(nearest) / sharing.to(embeddings.dtype)).log().mean()
    return entropy / math.log(max(2, min(len(rows), len(nearest))))
