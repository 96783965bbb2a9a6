"""Maps of patches from what backbones give, of images in any proportions."""

import pytest
import torch
from torch import nn

from massl_ray.evaluation.foreign import built
from massl_ray.evaluation.tokens import as_map, patch_tokens, stride


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def test_tokens_lie_row_by_row():
    plain = nn.Module()
    tokens = numbered(2, 6, 1)
    assert as_map(plain, tokens, (32, 48))[0, ..., 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert as_map(plain, tokens, (48, 32))[1, ..., 0].tolist() == [[6, 7], [8, 9], [10, 11]]
    plain.num_prefix_tokens = 2
    assert as_map(plain, tokens)[0, ..., 0].tolist() == [[2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("count", "size", "words"), [(6, (1, 1), "square grid"), (6, (32, 32), "square"), (8, (32, 48), "32 x 48")]
)
def test_tokens_that_are_no_grid(count, size, words):
    with pytest.raises(ValueError, match=f"its {count} tokens are no .*{words}"):
        as_map(nn.Module(), numbered(1, count, 3), size)


def test_the_axis_of_channels_is_found():
    plain = nn.Module()
    assert as_map(plain, numbered(1, 5, 2, 3), (64, 96)).shape == (1, 2, 3, 5)
    assert as_map(plain, numbered(1, 2, 3, 5), (64, 96)).shape == (1, 2, 3, 5)
    either = numbered(1, 4, 4, 4)
    assert torch.equal(as_map(plain, either), either.permute(0, 2, 3, 1))
    plain.output_fmt = "NHWC"
    assert torch.equal(as_map(plain, either), either)


@pytest.mark.parametrize(
    ("name", "step", "grid"), [("test_vit", 16, (4, 6)), ("test_resnet", 32, (2, 3)), ("test_mambaout", 32, (2, 3))]
)
def test_frames_of_real_backbones(name, step, grid):
    backbone = built(name, 3, 64).eval()
    assert stride(backbone) == step and stride(nn.Module()) == 1
    wide = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    tokens = patch_tokens(backbone, wide)
    assert tokens.shape[:3] == (1, *grid)
    changed = wide.clone()
    changed[..., 64:] = 0  # the last third: most of all the last columns change
    moved = (patch_tokens(backbone, changed) - tokens).norm(dim=3)[0].mean(0)
    assert moved[-1] > 1.5 * moved[0]
