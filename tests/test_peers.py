"""Peers learn by their own losses, fed as they should be."""

import numpy as np
import pytest
import torch

from massl_ray.benches import peers
from massl_ray.benches.learn_cell import Cell, Recipe, _noise
from massl_ray.benches.peers import PEERS, mean_over_pairs, projection, train_peer
from massl_ray.config import fill, resolve
from massl_ray.method.network import build_encoder
from massl_ray.training.run import Run


def rows(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape)).double()


def run_of(seed: int = 0) -> Run:
    config = Recipe().config(Cell("noise", "dino", seed, 8))
    resolved = resolve(config, 512)
    return Run(fill(config, resolved), resolved, None, None, None)  # type: ignore[arg-type]


def test_pairs_by_hand():
    """Of four views: 01, 02, 03, 12, 13; never a local view with a local one."""
    views = [torch.tensor(float(number)) for number in (1, 10, 100, 1000)]
    assert mean_over_pairs(lambda a, b: a * 3 + b, views).item() == pytest.approx((13 + 103 + 1003 + 130 + 1030) / 5)


def test_simclr_in_float64():
    """The normalized temperature-scaled cross-entropy, written out."""
    first, second = rows(5, 7), rows(5, 7) * 0.3
    z = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    similarity = z @ z.T / 0.2
    expected = 0.0
    for i in range(10):
        others = [j for j in range(10) if j != i]
        expected += (torch.logsumexp(similarity[i, others], 0) - similarity[i, (i + 5) % 10]).item() / 10
    assert PEERS["simclr"].loss()([first, second], ()).item() == pytest.approx(expected, rel=1e-9)


def test_dino_in_float64():
    """Cross-entropies of teacher views with every other view; the centre is zero before the first batch."""
    student, teacher = [rows(3, 1024) / (number + 2) for number in range(3)], [rows(3, 1024), rows(3, 1024) / 3]
    expected = []
    for i in range(2):
        target = (teacher[i] / 0.04).softmax(1)
        expected += [-(target * (student[k] / 0.1).log_softmax(1)).sum(1).mean() for k in range(3) if k != i]
    assert PEERS["dino"].loss()(student, teacher).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_vicreg_of_equal_views_with_spread_is_small():
    """Invariance is zero for equal views, the hinge on the deviation and the covariances are what is left."""
    loss = PEERS["vicreg"].loss()
    x = torch.linalg.qr(rows(64, 8) - rows(64, 8).mean(0))[0] * 64**0.5
    x = x - x.mean(0)
    assert loss([x, x], ()).item() < 2 < loss([x, x.flip(0)], ()).item()


def test_a_head_of_three_layers():
    layers = [type(layer).__name__ for layer in projection(4, 5, 6, torch.nn.ReLU)]
    assert layers == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]


@pytest.mark.parametrize("name", PEERS)
def test_all_start_with_the_backbone_of_that_seed_and_learn(name, monkeypatch):
    """The first step's rate is zero, so one step leaves the weights; more do not. A teacher follows slowly."""
    run = run_of(seed=5)
    start = dict(build_encoder(run.config).backbone.named_parameters())
    moved = []
    for steps in (1, 4):
        learned = train_peer(name, run, (_noise(run.config, step) for step in range(steps)))
        after = dict(learned.backbone.named_parameters())
        moved.append(sum((after[key] - value).square().sum().item() for key, value in start.items()))
    assert moved[0] == pytest.approx(0, abs=1e-9) and moved[1] > 1e-6
    assert learned.seconds_per_step > 0


def test_dino_gives_its_teacher(monkeypatch):
    """Whose weights are a moving average: with a momentum of 1 they stay where they were."""
    run = run_of()
    start = dict(build_encoder(run.config).backbone.named_parameters())
    monkeypatch.setattr(peers, "update_teacher", lambda teacher, student, momentum: None)
    learned = train_peer("dino", run, (_noise(run.config, step) for step in range(3)))
    assert all(torch.equal(value, start[name]) for name, value in learned.backbone.named_parameters())
