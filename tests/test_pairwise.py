"""Sums in one order: the same bits from any cut into contiguous parts, against the recursion written down plainly."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from massl_ray.training.pairwise import Fold, Node, fold


def leaves(number: int) -> list[Tensor]:
    """Values whose sum depends on the order."""
    random = torch.Generator().manual_seed(number)
    return [torch.randn(4, generator=random) * 10.0 ** (index % 7) for index in range(number)]


def by_recursion(values: list[Tensor]) -> Tensor:
    if len(values) == 1:
        return values[0]
    half = 1
    while 2 * half < len(values):
        half *= 2
    return by_recursion(values[:half]) + by_recursion(values[half:])


def cuts(number: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, max(1, number - 1)), max_size=6, unique=True).map(sorted)


def summed(values: list[Tensor], plan: Fold) -> list[Tensor]:
    """What a stack machine that follows the plan is left with."""
    stack: list[Tensor] = []
    for value, merges in zip(values, plan.merges, strict=True):
        assert len(stack) <= plan.depth
        stack.append(value)
        for _ in range(merges):
            stack.append(stack.pop() + stack.pop())
    return stack


def nodes_of(first: int, last: int, number: int) -> tuple[Node, ...]:
    return fold([(0, leaf) for leaf in range(first, last)], number).left


@given(st.integers(1, 70).flatmap(lambda number: st.tuples(st.just(number), cuts(number))))
def test_any_parts_give_the_same_bits(case):
    number, places = case
    edges = sorted({0, *[place for place in places if place < number], number})
    nodes: list[Node] = []
    sums: list[Tensor] = []
    for first, last in zip(edges, edges[1:], strict=False):
        plan = fold([(0, leaf) for leaf in range(first, last)], number)
        sums += summed(leaves(number)[first:last], plan)
        nodes += plan.left
    plan = fold(nodes, number)
    ((level, index),), (total,) = plan.left, summed(sums, plan)
    assert index == 0 and (1 << level) >= number
    assert torch.equal(total, by_recursion(leaves(number)))


def test_the_order_matters_for_these_values():
    assert any(not torch.equal(torch.stack(leaves(n)).sum(0), by_recursion(leaves(n))) for n in range(3, 20))


def test_a_worker_with_whole_subtrees_sends_one_node():
    assert nodes_of(0, 8, 16) == ((3, 0),) and nodes_of(8, 16, 16) == ((3, 1),) and nodes_of(0, 16, 16) == ((4, 0),)
    assert nodes_of(4, 5, 5) == ((2, 1),) and nodes_of(0, 5, 5) == ((3, 0),)
    assert nodes_of(1, 4, 8) == ((0, 1), (1, 1))


def test_few_sums_wait():
    assert fold([(0, leaf) for leaf in range(64)], 64).depth == 6
    assert fold([(0, leaf) for leaf in range(8)], 8) == Fold((0, 1, 0, 2, 0, 1, 0, 3), ((3, 0),), 3)
