"""Sums of numbered leaves in one fixed order, in whatever contiguous parts they are made.

Leaf i is node (0, i); node (level, index) is the sum of (level - 1, 2 index) and (level - 1, 2 index + 1), or the first alone at
the ragged edge. The order of additions is that of the tree, so partial sums of any contiguous runs, made anywhere, meet in
the same bits. From left to right a stack is enough: a node is added to the top of it as long as that is its sibling.
"""

from collections.abc import Iterable
from dataclasses import dataclass

Node = tuple[int, int]  # level, index


@dataclass(frozen=True)
class Fold:
    """How nodes, given from left to right, are summed on a stack.

    Attributes:
        merges: for each node, how often the top of the stack is added to what lies below it once the node is on it.
        left: the nodes on the stack in the end, the leftmost at the bottom: one, the root, when every leaf is in.
        depth: the most sums that wait at once, not counting a node that is being added.
    """

    merges: tuple[int, ...]
    left: tuple[Node, ...]
    depth: int


def fold(nodes: Iterable[Node], num_leaves: int) -> Fold:
    """Plan the sum of neighbouring `nodes` of a tree over `num_leaves`."""
    stack: list[Node] = []
    merges, depth = [], 0
    for level, index in nodes:
        merges.append(0)
        while 1 << level < num_leaves:
            sibling = level, index ^ 1
            if stack and stack[-1] == sibling:
                stack.pop()
                merges[-1] += 1
            elif sibling[1] << level < num_leaves:
                break
            level, index = level + 1, index // 2
        stack.append((level, index))
        depth = max(depth, len(stack))
    return Fold(tuple(merges), tuple(stack), depth)
