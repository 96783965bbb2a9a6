"""Products by oneDNN: equal to float64's within fp32's rounding, with gradients, and out of the way everywhere else."""

import pytest
import torch
from torch import nn

from massl_ray.method import products
from massl_ray.method.products import Linear, product, use_onednn


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (448, 256, 1024), (64, 1536, 384)])
def test_product_against_float64(shape):
    n, k, m = shape
    generator = torch.Generator().manual_seed(0)
    a, b, bias = (torch.randn(*size, generator=generator) for size in ((n, k), (m, k), (m,)))
    expected = a.double() @ b.double().T
    bound = 2e-6 * k**0.5 * a.norm(dim=1).max() * b.norm(dim=1).max()
    for result, exact in ((product(a, b), expected), (product(a, b, bias), expected + bias.double())):
        assert result.dtype == torch.float32 and (result.double() - exact).abs().max() < bound
    transposed = product(a, b.T.contiguous().T, bias)  # a view of a transposed matrix
    torch.testing.assert_close(transposed, product(a, b, bias), rtol=1e-5, atol=1e-4)


def test_other_precisions_are_torchs_own():
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    assert torch.equal(product(a, b), a @ b.T)


@pytest.mark.skipif(not products.ONEDNN, reason="this build of torch has no oneDNN")
def test_it_is_onednn_that_computes(monkeypatch):
    """The fast way is taken in fp32 on a CPU: with oneDNN's operator gone, it fails."""
    monkeypatch.delattr(torch.ops.mkldnn, "_linear_pointwise")
    product(torch.ones(2, 2).double(), torch.ones(2, 2).double())
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", lambda *arguments: "here", raising=False)
    assert product(torch.ones(2, 2), torch.ones(2, 2)) == "here"


@pytest.mark.parametrize("bias", [True, False])
def test_linear_has_the_gradients_of_torchs(bias):
    generator = torch.Generator().manual_seed(0)
    reference = nn.Linear(12, 9, bias=bias)
    ours = Linear(12, 9, bias=bias)
    ours.load_state_dict(reference.state_dict())
    x = torch.randn(2, 3, 5, 12, generator=generator)
    upstream = torch.randn(2, 3, 5, 9, generator=generator)
    gradients = []
    for layer in (reference, ours):
        inputs = x.clone().requires_grad_()
        output = layer(inputs)
        output.backward(upstream)
        gradients.append([output.detach(), inputs.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, result in zip(*gradients, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


def test_frozen_parts_get_no_gradient():
    layer = Linear(4, 3)
    layer.weight.requires_grad_(False)
    layer(torch.ones(2, 4)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None


def test_autocast_is_left_alone():
    layer = Linear(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(2, 8)).dtype == torch.bfloat16
    assert layer(torch.ones(2, 8)).dtype == torch.float32


def test_swapping_keeps_parameters_and_names():
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Sequential(nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_onednn(model)
    assert [type(part) for part in (model[0], model[2][0])] == [Linear, Linear]
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
