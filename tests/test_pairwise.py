"""Sums in one order: the same bits from any cut into contiguous parts, against the recursion written down plainly."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from massl_ray.training.pairwise import PairwiseSum, nodes_of


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


@given(st.integers(1, 70).flatmap(lambda number: st.tuples(st.just(number), cuts(number), st.randoms())))
def test_any_parts_in_any_order_give_the_same_bits(case):
    number, places, random = case
    edges = sorted({0, *[place for place in places if place < number], number})
    whole, parts = PairwiseSum(number), []
    for first, last in zip(edges, edges[1:], strict=False):
        part, order = PairwiseSum(number), list(range(first, last))
        random.shuffle(order)
        for index in order:
            part.add(0, index, [leaves(number)[index]])
        assert set(part.nodes) == nodes_of(first, last, number)
        parts += part.nodes.items()
    random.shuffle(parts)
    for (level, index), values in parts:
        whole.add(level, index, values)
    (((level, index), (total,)),) = whole.nodes.items()
    assert index == 0 and (1 << level) >= number
    assert torch.equal(total, by_recursion(leaves(number)))


def test_the_order_matters_for_these_values():
    assert any(not torch.equal(torch.stack(leaves(n)).sum(0), by_recursion(leaves(n))) for n in range(3, 20))


def test_a_worker_with_whole_subtrees_sends_one_node():
    assert nodes_of(0, 8, 16) == {(3, 0)} and nodes_of(8, 16, 16) == {(3, 1)} and nodes_of(0, 16, 16) == {(4, 0)}
    assert nodes_of(4, 5, 5) == {(2, 1)} and nodes_of(0, 5, 5) == {(3, 0)}
    assert nodes_of(1, 4, 8) == {(0, 1), (1, 1)}


def test_several_tensors_at_once():
    total = PairwiseSum(3)
    for index in range(3):
        total.add(0, index, [torch.tensor([float(index)]), torch.tensor([10.0 * index])])
    assert [value.tolist() for value in total.nodes[2, 0]] == [[3.0], [30.0]]
