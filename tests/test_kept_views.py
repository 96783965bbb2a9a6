"""Views made once are the views that training makes."""

import os
import time

import numpy as np
import pytest
import torch

from massl_ray.benches import kept_views
from massl_ray.benches.kept_views import made_batches, view_batches
from massl_ray.benches.labelled_sets import open_folders
from massl_ray.benches.learn_cell import Cell, Recipe, run_of
from massl_ray.data.making import ViewMaker


@pytest.fixture
def made(tiny_images, tmp_path, monkeypatch):
    monkeypatch.setenv("MASSL_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_views, "KEPT", 2)
    images = open_folders("mine", str(tiny_images))

    def run(seed=0, *flags):
        return run_of(Recipe(ours=flags).config(Cell("mine", "ours", seed, 3)), images)

    return images, run, tmp_path / "cache/learn-views"


def same(one, two):
    return torch.equal(one.global_views, two.global_views) and torch.equal(one.local_views, two.local_views)


def test_kept_and_later_ones_are_those_of_training(made):
    images, run, folder = made
    batches = list(view_batches(run(), images.content, 3))
    make = ViewMaker(images.train, run().config, 64, 0, 0, 64)
    expected = make({"id": np.arange(3 * 64)})
    assert np.array_equal(torch.cat([batch.global_views for batch in batches]).numpy(), expected["global_views"])
    assert np.array_equal(torch.cat([batch.local_views for batch in batches]).numpy(), expected["local_views"])
    assert len(list(folder.iterdir())) == 1


def test_they_are_made_once(made, monkeypatch):
    images, run, folder = made
    first = list(view_batches(run(), images.content, 2))
    monkeypatch.setattr(kept_views, "_write", None)  # would raise
    assert all(map(same, first, view_batches(run(0, "--loss.koleo_weight", "0.37"), images.content, 2)))


def test_what_they_depend_on_has_a_place_of_its_own(made):
    images, run, folder = made
    for which, flags in enumerate(((), ("--views.flip", "0"), ("--train.global_batch_size", "128"))):
        batch = next(view_batches(run(0, *flags), images.content, 2))
        assert same(batch, next(made_batches(run(0, *flags), 0, 1))) and len(list(folder.iterdir())) == which + 1
    next(view_batches(run(1), images.content, 2))
    next(view_batches(run(), "other images", 2))
    assert len(list(folder.iterdir())) == 5


def test_what_killed_processes_left_goes_after_an_hour(made):
    images, run, folder = made
    for name, age_s in (("old", 4000), ("new", 60)):
        (folder / f"{name}.unfinished-x").mkdir(parents=True)
        os.utime(folder / f"{name}.unfinished-x", (time.time() - age_s,) * 2)
    next(view_batches(run(), images.content, 2))
    left = [path.name for path in folder.iterdir()]
    assert "new.unfinished-x" in left and "old.unfinished-x" not in left and len(left) == 2
