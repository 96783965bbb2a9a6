"""Sheets of pictures: what is where, and that nothing looks finer or stronger than it is."""

import numpy as np
import pytest
from PIL import Image

from massl_ray.reporting.panels import GAP, LINE, TILE, Tile, blocks, connected, distinct, heat, masked, photo, sheet, stacked
from tests.helpers import photograph


def test_maps_are_shown_in_blocks_and_photographs_at_their_proportions():
    values = np.arange(6.0).reshape(2, 3)
    shown = blocks(values, 12)
    assert shown.shape == (12, 12) and (shown[:6, :4] == 0).all() and (shown[6:, 8:] == 5).all()
    assert np.unique(shown).tolist() == values.ravel().tolist()  # no value in between
    assert photo(np.asarray(photograph(32, 32))[..., :1]).shape == (TILE, TILE, 3)


def test_even_attention_looks_even_and_dim():
    view = np.full((32, 32, 3), 128, np.uint8)
    even, peaked = np.full((4, 4), 0.01), np.full((4, 4), 0.01)
    peaked[1, 1] = 0.5
    dim, strong = heat(view, even), heat(view, peaked)
    assert (dim == dim[0, 0]).all()
    block = strong[TILE // 4 + 5, TILE // 4 + 5]
    assert block.sum() > 1.5 * dim[0, 0].sum() and strong[0, 0].sum() < dim[0, 0].sum()
    assert (heat(view, even) == heat(view, 7 * even)).all()  # by shares
    assert np.isfinite(heat(view, np.zeros((2, 2)))).all()


def test_what_a_mask_keeps_is_as_it_was_and_has_a_line_around_it():
    view = np.zeros((32, 32, 3), np.uint8)  # black: dimming alone would not show it
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    shown = masked(view, mask)
    edge = TILE // 4
    assert shown[edge, edge + 9].any() and not shown[edge + 9, edge + 9].any() and not shown[0].any()
    white = masked(np.full((32, 32, 3), 255, np.uint8), mask)
    assert (white[edge + 9, edge + 9] == 255).all() and (white[2, 2] < 128).all()
    assert not masked(view, np.ones((4, 4), bool)).any()


def test_a_gray_mask_has_neither_colours_nor_a_line():
    mask = np.zeros((4, 4), bool)
    mask[1:3, 1:3] = True
    made = masked(np.full((40, 40, 3), (200, 100, 0), np.uint8), mask, 40, gray=True)
    assert (made[10:30, 10:30] == 100).all() and (made[:10] == 30).all() and made.shape == (40, 40, 3)


def test_sheet_puts_tiles_in_rows():
    red, blue = (np.broadcast_to(np.uint8(colour), (TILE, TILE, 3)) for colour in ([255, 0, 0], [0, 0, 255]))
    made = np.asarray(sheet([[Tile(red, "a"), Tile(blue)], [None, Tile(red, frame=(0, 255, 0))]], ["row", ""], ["one", "two"]))
    top = GAP + LINE + LINE
    middle = TILE // 2
    assert made[top + middle, GAP + middle].tolist() == [255, 0, 0]
    assert made[top + middle, 2 * GAP + TILE + middle].tolist() == [0, 0, 255]
    second = top + TILE + LINE + GAP
    assert made[second + middle, GAP + middle].tolist() == [255, 255, 255]
    assert made[second, 2 * GAP + TILE].tolist() == [0, 255, 0]
    assert made.shape == (second + TILE + GAP, GAP + 2 * (TILE + GAP), 3)


@pytest.mark.parametrize("text", ["x" * 500, "\u4e2d\u6587 \u202e", "\ud800", "a\nb\x1b[31m", ""])
def test_any_text_can_be_written(text):
    assert sheet([[Tile(np.zeros((4, 4, 3), np.uint8), text)]], [text], [text]).width == TILE + 2 * GAP


def test_lines_go_from_point_to_point():
    black = np.zeros((100, 100, 3), np.uint8)
    ends = (np.array([[0.25, 0.5], [0.5, 0.9]]), np.array([[0.75, 0.5], [0.5, 0.9]]))
    made = np.asarray(connected(black, black, ends, np.array([False, True]), 100))
    assert made.shape == (100, 224, 3)
    dot, colour = made[50, 25].astype(int), np.array(distinct(2)[0])
    assert np.abs(dot - colour).max() < 40 and np.abs(made[50, 124 + 75].astype(int) - colour).max() < 40
    assert made[50, 10].sum() == 0 and made[50, 60].sum() > 100
    assert stacked([Image.new("RGB", (50, 20))] * 2, ["a", "b" * 99]).height == GAP + 2 * (20 + LINE + 2 * GAP)


def test_neighbouring_colours_are_far_apart():
    made = np.array(distinct(24))
    assert len(np.unique(made, axis=0)) == 24 and np.abs(np.diff(made, axis=0)).sum(1).min() > 120
