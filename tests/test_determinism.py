"""The same bits each time: resizing by products on any device; whole steps where there is a GPU."""

import pytest
import timm
import torch
from torch.nn.functional import interpolate

from massl_ray.method.determinism import compute_alike, names_no_deterministic_way, resize, resize_alike


@pytest.mark.parametrize("size", [(6, 6), (7, 5), (20, 16), (14, 14)])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_resize_is_torchs_with_its_gradient(size, mode):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 14, 14, dtype=torch.float64, generator=generator, requires_grad=True)
    ours, theirs = resize(images, size, mode), interpolate(images, size=size, mode=mode, antialias=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    upstream = torch.randn(theirs.shape, dtype=torch.float64, generator=generator)
    (grad,), (expected,) = torch.autograd.grad(ours, images, upstream), torch.autograd.grad(theirs, images, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-13)


def test_a_backbones_embeddings_are_resized_by_products(monkeypatch):
    """timm resizes position embeddings for local views; afterwards that never reaches torch's own kernel."""
    backbone = timm.create_model("test_vit", num_classes=0, img_size=64, dynamic_img_size=True).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = backbone(images)
    sizes = []
    monkeypatch.setattr("massl_ray.method.determinism.resize", lambda *args: sizes.append(args[1]) or resize(*args))
    resize_alike(backbone)
    torch.testing.assert_close(backbone(images), expected, rtol=1e-6, atol=1e-7)  # timm resizes in fp32
    assert sizes == [(2, 2)]


def test_a_cpu_needs_nothing():
    compute_alike(torch.device("cpu"))
    assert not torch.are_deterministic_algorithms_enabled()


def test_who_refuses():
    refusal = "max_pool2d_with_indices_backward_cuda does not have a deterministic implementation, but you set ..."
    assert names_no_deterministic_way(RuntimeError(refusal))
    assert not names_no_deterministic_way(RuntimeError("CUDA out of memory"))
