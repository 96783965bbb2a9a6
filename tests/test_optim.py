"""Optimizer: groups by name, and every update against plain loops in float64."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

from massl_ray.config import HeadSection
from massl_ray.method.network import Encoder, Head
from massl_ray.method.optim import build_optimizer, clip_per_parameter, set_schedule, update_teacher


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Odd(nn.Module):
    """A bias with two dimensions, a one-dimensional gain, a scalar, and something frozen."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Module()
        self.layer.bias = nn.Parameter(torch.ones(2, 2))
        self.gain, self.scalar = nn.Parameter(torch.ones(3)), nn.Parameter(torch.tensor(1.0))
        self.token = nn.Parameter(torch.ones(1, 1, 4))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def groups_by_name(module: nn.Module) -> dict[bool, set[str]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = build_optimizer(module).param_groups
    assert [group["decays"] for group in groups] == [True, False]
    return {group["decays"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


def test_biases_and_one_dimensional_parameters_do_not_decay():
    assert groups_by_name(Odd()) == {True: {"token"}, False: {"layer.bias", "gain", "scalar"}}


def test_groups_of_an_encoder():
    encoder = Encoder(timm.create_model("test_vit", num_classes=0), Head(64, HeadSection(hidden_dim=8, dim=4, batch_norm=True)))
    groups = groups_by_name(encoder)
    assert groups[True] | groups[False] == {name for name, _ in encoder.named_parameters()}
    assert {"backbone.cls_token", "backbone.pos_embed", "backbone.blocks.0.attn.qkv.weight", "head.mlp.0.weight"} <= groups[True]
    assert {"backbone.norm.weight", "backbone.blocks.0.attn.qkv.bias", "head.mlp.0.bias", "head.mlp.1.weight"} <= groups[False]


def test_schedule_reaches_both_groups():
    optimizer = build_optimizer(Odd())
    set_schedule(optimizer, 0.25, 0.125)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.125), (0.25, 0.0)]


def small_network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()


def set_gradients(module: nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for scale, parameter in enumerate(module.parameters()):
        parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=random) * 0.1 * 3.0**scale


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e9])
def test_clip_equals_a_loop_over_tensors(max_norm):
    module = small_network()
    set_gradients(module, 5)
    module[1].weight.grad = None
    before = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    norms = clip_per_parameter(module.parameters(), max_norm)
    after = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    expected_norms = [math.sqrt((gradient**2).sum().item()) for gradient in before]
    assert norms.tolist() == pytest.approx(expected_norms, rel=1e-13)
    for gradient, clipped, norm in zip(before, after, expected_norms, strict=True):
        factor = min(1.0, max_norm / (norm + 1e-6))
        torch.testing.assert_close(clipped, gradient * factor, rtol=1e-13, atol=0)
    assert module[1].weight.grad is None
    if max_norm == 3.0:
        assert min(expected_norms) < 3.0 < max(expected_norms)  # some scaled, some left as they were


def test_clip_leaves_a_zero_gradient_at_zero():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.zeros(3)
    assert clip_per_parameter([parameter], 3.0).tolist() == [0.0]
    assert parameter.grad.tolist() == [0.0, 0.0, 0.0]


def test_teacher_follows_like_a_loop():
    student, teacher = small_network(0), small_network(1)
    expected = {name: value.tolist() for name, value in teacher.named_parameters()}
    for momentum in (0.992, 0.5, 0.0, 1.0):
        if momentum == 1.0:
            student = small_network(7)  # must not be seen
        for (name, value), source in zip(teacher.named_parameters(), student.parameters(), strict=True):
            old, new = torch.tensor(expected[name], dtype=torch.float64), source.detach()
            expected[name] = [momentum * x + (1 - momentum) * y for x, y in zip(old.flatten(), new.flatten(), strict=True)]
            expected[name] = torch.stack(expected[name]).view(value.shape).tolist()
        update_teacher(teacher, student, momentum)
        for name, value in teacher.named_parameters():
            torch.testing.assert_close(value.detach(), torch.tensor(expected[name], dtype=torch.float64), rtol=1e-13, atol=1e-15)


def test_teacher_leaves_the_student_and_its_own_graph_alone():
    student, teacher = small_network(0), small_network(1)
    before = copy.deepcopy(student.state_dict())
    update_teacher(teacher, student, 0.9)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert all(parameter.grad_fn is None for parameter in teacher.parameters())


def test_steps_equal_adamw_by_hand():
    """Three steps with rates and decays that change, against Loshchilov and Hutter's algorithm 2 with torch's defaults."""
    module = small_network()
    optimizer = build_optimizer(module)
    values = {name: value.detach().clone() for name, value in module.named_parameters()}
    first = {name: torch.zeros_like(value) for name, value in values.items()}
    second = {name: torch.zeros_like(value) for name, value in values.items()}
    for step, (lr, decay) in enumerate([(0.1, 0.04), (0.02, 0.4), (0.3, 0.2)], start=1):
        set_gradients(module, step)
        set_schedule(optimizer, lr, decay)
        optimizer.step()
        for name, parameter in module.named_parameters():
            gradient, decays = parameter.grad, parameter.ndim > 1
            values[name] = values[name] * (1 - lr * decay * decays)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            values[name] = values[name] - lr * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(parameter.detach(), values[name], rtol=1e-12, atol=1e-14)
