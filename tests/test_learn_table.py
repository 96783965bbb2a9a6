"""Means, standard errors and the comparison, by hand; the picture shows what the table says."""

import io

import pytest
from PIL import Image

from massl_ray.benches.learn_table import FIGURES, compared, draw, mean_and_error, table, text


def cell(name, method, seed, steps, knn, linear=None):
    return dict.fromkeys(FIGURES) | {
        "set": name,
        "method": method,
        "seed": seed,
        "steps": steps,
        "knn": knn,
        "linear": linear or knn,
    }


CELLS = [
    cell("a", "untrained", 0, 0, 0.5),
    *(cell("a", "ours", seed, 20, knn) for seed, knn in enumerate((0.6, 0.7, 0.8))),
    *(cell("a", "simclr", seed, 20, knn) for seed, knn in enumerate((0.6, 0.6))),
    *(cell("a", "dino", seed, 20, knn) for seed, knn in enumerate((0.5, 0.6))),
    cell("b", "ours", 0, 20, 0.3, 0.9),
    cell("b", "simclr", 0, 20, 0.2, 0.4),
    cell("b", "dino", 0, 20, 0.4, 0.1),
    cell("c", "ours", 0, 20, 0.9),  # no peers here
]


def test_means_and_errors():
    assert mean_and_error([0.6, 0.7, 0.8]) == pytest.approx((0.7, 0.1 / 3**0.5))
    assert mean_and_error([0.6]) == (0.6, None) and mean_and_error([0.6, None]) == (None, None) == mean_and_error([])


def test_rows():
    rows = {(row["set"], row["method"]): row for row in table(CELLS)}
    ours = rows["a", "ours"]
    assert ours["seeds"] == 3 and ours["knn"] == pytest.approx(0.7) and ours["knn_se"] == pytest.approx(0.1 / 3**0.5)
    assert rows["a", "untrained"]["steps"] == 0 and rows["a", "ours"]["rank"] is None


def test_ours_beside_the_best_peer():
    """On a over seeds 0 and 1: .65 to simclr's .6; on b .3 to dino's .4 in k-NN, .9 to simclr's .4 in linear."""
    (line,) = compared(CELLS)
    assert line["sets"] == 2 and line["steps"] == 20
    assert line["knn"] == pytest.approx((0.05 - 0.1) / 2) and line["knn_se"] == pytest.approx(0.15 / 2)
    assert line["knn_ratio"] == pytest.approx((0.65 / 0.6 + 0.3 / 0.4) / 2) and line["knn_ahead"] == 1
    assert line["linear"] == pytest.approx((0.05 + 0.5) / 2) and line["linear_ahead"] == 2
    assert compared(CELLS[:4]) == []


def test_what_people_read():
    rates = {"ours": {"lr_factor": 2.0, "lr": 8e-3, "knn_held_out": {"1": 0.61, "2": 0.62, "4": None}}}
    result = {
        "work": "a net",
        "rates": rates,
        "table": table(CELLS),
        "compared": compared(CELLS),
        "missing": 3,
        "skipped": ["No x."],
    }
    shown = text(result)
    assert "70.0 ± 5.8" in shown and "-2.5 ± 7.5" in shown and "3 cells are still missing" in shown and shown.endswith("No x.")
    assert "2 x the preset's = 0.008" in shown and "4 -" in shown
    line = next(line for line in shown.splitlines() if line.startswith("a") and "untrained" in line)
    assert "50.0" in line


def test_the_picture_is_drawn_of_any_number_of_panels():
    more = [*CELLS, cell("a", "ours", 0, 200, 0.9)]
    for cells, panels in ((CELLS[:1], 1), (CELLS, 1), (more, 2)):
        width = Image.open(io.BytesIO(draw(table(cells)))).width
        assert width == pytest.approx(110 * panels * max(5.0, 1.1 * len({each["set"] for each in cells}) + 1.5), abs=2)
