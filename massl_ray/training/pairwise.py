"""Sums of numbered leaves in one fixed order, whichever order and in whatever parts they come.

Leaf i is node (0, i); node (level, index) is the sum of (level - 1, 2 index) and (level - 1, 2 index + 1), or the first alone at
the ragged edge. The order of additions is that of the tree, so partial sums of any contiguous runs, made anywhere, meet in
the same bits. Floating point addition commutes, so it does not matter which of two nodes is known first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Node = tuple[int, int]  # level, index


class PairwiseSum:
    """A partial sum over `num_leaves`.

    Attributes:
        nodes: subtrees known so far that await their sibling; one, the root, when every leaf is in.
    """

    def __init__(self, num_leaves: int):
        self.num_leaves = num_leaves
        self.nodes: dict[Node, list[Tensor]] = {}

    def add(self, level: int, index: int, values: Sequence[Tensor]) -> None:
        """Take in one node. `values` are kept and may be written to."""
        total = list(values)
        for known in climb(self.nodes, level, index, self.num_leaves):
            if known is not None:
                torch._foreach_add_(total, self.nodes.pop(known))
            level, index = level + 1, index // 2
        self.nodes[level, index] = total


def climb(known, level: int, index: int, num_leaves: int):
    """The siblings in `known` that lift node (level, index) towards the root; None where the ragged edge has no sibling."""
    while 1 << level < num_leaves:
        sibling = level, index ^ 1
        if sibling[1] << level >= num_leaves:
            yield None
        elif sibling in known:
            yield sibling
        else:
            return
        level, index = level + 1, index // 2


def nodes_of(first: int, last: int, num_leaves: int) -> set[Node]:
    """The subtrees that leaves [first, last) complete."""
    known: set[Node] = set()
    for leaf in range(first, last):
        level, index = 0, leaf
        for sibling in climb(known, level, index, num_leaves):
            known.discard(sibling)  # type: ignore[arg-type]
            level, index = level + 1, index // 2
        known.add((level, index))
    return known
