"""Adapted statistics: against moments taken in float64 by hooks, and what adapting must leave alone."""

import numpy as np
import pytest
import torch
from torch import nn

from massl_ray.config import Config
from massl_ray.data.order import samples_at
from massl_ray.evaluation import adapted as module
from massl_ray.evaluation.adapted import adapt_statistics, adapted_to_run, has_statistics, shuffled, training_views
from massl_ray.method.network import build_encoder
from massl_ray.method.step import MicroBatch, prepare_views
from massl_ray.method.views import make_views
from massl_ray.training.collectives import Local
from massl_ray.training.run import Run
from massl_ray.training.state import build_state, state_sha256, step_settings, to_tensors
from tests.helpers import listed, read, tiny_run

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny_images, tmp_path) -> Run:
    return tiny_run(tiny_images, tmp_path / "run", "--model.backbone", "test_resnet", "--train.steps", "6", "--run.seed", "3")


def norms(backbone: nn.Module) -> list[nn.BatchNorm2d]:
    return [part for part in backbone.modules() if isinstance(part, nn.BatchNorm2d)]


def moments(backbone: nn.Module, batches: list[torch.Tensor]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each batch norm the means over batches of mean and unbiased variance of what it is given, by numpy in float64, while
    every batch norm works with its batch's own."""
    found: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}

    def look(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].detach().double().numpy().transpose(0, 2, 3, 1).reshape(-1, inputs[0].shape[1])
        found.setdefault(id(layer), []).append((rows.mean(0), rows.var(0, ddof=1)))

    handles = [layer.register_forward_pre_hook(look) for layer in norms(backbone)]
    backbone.train()
    with torch.no_grad():
        for batch in batches:
            backbone(batch)
    for handle in handles:
        handle.remove()
    return [tuple(np.mean(part, 0) for part in zip(*found[id(layer)], strict=True)) for layer in norms(backbone)]  # type: ignore[misc]


def test_statistics_are_those_of_the_views(run):
    backbone, batches = build_encoder(run.config).backbone, list(training_views(run.images, run.config))
    found = norms(adapt_statistics(backbone, iter(batches)))
    expected = moments(build_encoder(run.config).backbone, batches)
    assert len(found) == len(expected) > 5
    for layer, (mean, variance) in zip(found, expected, strict=True):
        assert layer.running_mean is not None and layer.running_var is not None
        assert np.allclose(layer.running_mean.numpy(), mean, rtol=1e-4, atol=1e-5)
        assert np.allclose(layer.running_var.numpy(), variance, rtol=1e-4, atol=1e-6)
        assert abs(layer.running_mean.numpy()).max() > 0.01  # not as they were


def test_the_first_layer_by_hand(run):
    """One convolution before a batch norm: its inputs are known without any hook."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    batches = [torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) + seed for seed in range(3)]
    weight = net[0].weight.detach().double().numpy().reshape(4, 3)
    rows = [np.einsum("nchw,oc->nhwo", batch.double().numpy(), weight).reshape(-1, 4) for batch in batches]
    layer = adapt_statistics(net, batches)[1]  # type: ignore[index]
    assert np.allclose(layer.running_mean.numpy(), np.mean([row.mean(0) for row in rows], 0), atol=1e-6)
    assert np.allclose(layer.running_var.numpy(), np.mean([row.var(0, ddof=1) for row in rows], 0), atol=1e-5)


def test_the_order_of_batches_does_not_matter(run):
    backbone, batches = build_encoder(run.config).backbone, list(training_views(run.images, run.config))[:9]
    one, other = (adapt_statistics(backbone, order).state_dict() for order in (batches, batches[::-1]))
    assert state_sha256(one) == state_sha256(other) != state_sha256(adapt_statistics(backbone, batches[:8]).state_dict())


def test_training_and_the_generators_do_not_notice(run):
    state = build_state(run.config, run.resolved, CPU, Local())
    state.teacher.train()
    before = {name: value.clone() for name, value in to_tensors(state).items()}
    draws, modes = torch.get_rng_state(), [part.training for part in state.teacher.modules()]
    found = adapt_statistics(state.teacher.backbone, training_views(run.images, run.config))
    after = to_tensors(state)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(draws, torch.get_rng_state()) and modes == [part.training for part in state.teacher.modules()]
    assert not any(part.training for part in found.modules())
    assert [layer.momentum for layer in norms(found)] == [layer.momentum for layer in norms(state.teacher.backbone)]
    shared = {id(tensor) for tensor in (*found.parameters(), *found.buffers())} & {
        id(tensor) for tensor in (*state.teacher.parameters(), *state.teacher.buffers())
    }
    assert not shared
    for (name, ours), theirs in zip(found.named_parameters(), state.teacher.backbone.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_only_normalization_layers_are_in_training_mode(run):
    """Dropout would draw from a generator that others draw from, and change the figures."""
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    batch = torch.ones(4, 3, 2, 2)
    assert torch.equal(adapt_statistics(net, [batch])[1].running_mean, torch.ones(3))  # type: ignore[index]


def test_transformers_cost_nothing(run):
    def never():
        raise AssertionError("a batch was asked for")
        yield

    vit = build_encoder(run.config.model_copy(update={"model": run.config.model.model_copy(update={"backbone": "test_vit"})}))
    assert not has_statistics(vit.backbone) and adapt_statistics(vit.backbone, never()) is vit.backbone
    assert has_statistics(build_encoder(run.config).backbone)


def test_without_a_batch():
    with pytest.raises(ValueError, match="not one batch"):
        adapt_statistics(nn.Sequential(nn.BatchNorm2d(3)), [])


# ---- views -----------------------------------------------------------------------------------------------------------


def by_hand(run: Run, position: int, batch: int) -> torch.Tensor:
    """What the step normalizes of the micro-batch of `batch` images that begins at a position of the run."""
    epochs, samples = samples_at(np.arange(position, position + batch), len(run.images), run.config.run.seed)
    seed = run.config.run.seed
    pairs = [
        make_views(read(run.images.path(int(sample))), run.config.views, seed=seed, epoch=int(epoch), sample=int(sample))
        for epoch, sample in zip(epochs, samples, strict=True)
    ]
    micro = MicroBatch(*(torch.from_numpy(np.stack(views)) for views in zip(*pairs, strict=True)), None)
    return prepare_views(micro, step_settings(run.config, run.resolved, CPU))[0]


def test_views_are_those_of_the_first_steps(run):
    """40 batches of 8, in micro-batches of 2: what the teacher is given in training, in the same order, whoever trains."""
    made = list(training_views(run.images, run.config))
    assert len(made) == 40 * 4
    for place in (0, 3, 5, 158):
        assert torch.allclose(made[place], by_hand(run, 2 * place, 2), atol=1e-5)
    again = list(training_views(run.images, replace_workers(run.config, 2)))
    assert all(torch.equal(one, other) for one, other in zip(made, again, strict=True))


def replace_workers(config: Config, number: int) -> Config:
    return config.model_copy(update={"elastic": config.elastic.model_copy(update={"min_workers": number, "max_workers": number})})


def test_seed_and_device_of_the_views(run):
    first = next(training_views(run.images, run.config))
    other = run.config.model_copy(update={"run": run.config.run.model_copy(update={"seed": 4})})
    assert not torch.equal(first, next(training_views(run.images, other)))
    on_gpu = run.config.model_copy(update={"views": run.config.views.model_copy(update={"device": "cuda"})})
    assert torch.equal(first, next(training_views(run.images, on_gpu)))


def test_no_more_images_than_that(run, monkeypatch):
    monkeypatch.setattr(module, "IMAGES", 11)
    assert [len(views) for views in training_views(run.images, run.config)] == [4] * 5
    monkeypatch.setattr(module, "IMAGES", 1)
    assert [len(views) for views in training_views(run.images, run.config)] == [4]


def test_shuffled(monkeypatch):
    images = listed("/somewhere", [f"{number:04d}.png" for number in range(100)])
    names = [shuffled(images).name(place) for place in range(100)]
    assert sorted(names) == [images.name(place) for place in range(100)] != names
    monkeypatch.setattr(module, "IMAGES", 7)
    assert [shuffled(images).name(place) for place in range(len(shuffled(images)))] == names[:7]


# ---- of a run --------------------------------------------------------------------------------------------------------


def test_of_a_run(run):
    backbone = build_encoder(run.config).backbone
    found, facts = adapted_to_run(backbone, run.config)
    expected = adapt_statistics(backbone, training_views(run.images, run.config))
    assert state_sha256(found.state_dict()) == state_sha256(expected.state_dict())
    assert facts == {"adapted": True, "adapted_on": f"training views of {run.images.root}"}


def test_of_a_run_whose_images_are_gone(run, tmp_path):
    gone = run.config.model_copy(update={"data": run.config.data.model_copy(update={"source": str(tmp_path / "gone")})})
    threads = torch.get_num_threads()
    backbone = build_encoder(gone).backbone
    found, facts = adapted_to_run(backbone, gone)
    assert found is backbone and facts["adapted"] is False and str(tmp_path / "gone") in facts["not_adapted_because"]
    for place in range(len(run.images)):
        with open(run.images.path(place), "wb"):
            pass
    found, facts = adapted_to_run(backbone, run.config)
    assert found is backbone and "can be read any more" in facts["not_adapted_because"]
    assert torch.get_num_threads() == threads
