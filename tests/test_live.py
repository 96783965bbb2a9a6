"""Bytes that are alive: of real tensors and of those without memory alike."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

from massl_ray.config import validate
from massl_ray.method.network import build_encoder
from massl_ray.planning.live import Live, as_on, on_meta, view_shapes


def test_storages_count_once_from_their_making_to_their_end():
    before = torch.ones(1000)
    with Live() as live:
        a = torch.empty(100)  # 400 bytes
        view = a.view(10, 10)[2:]
        assert (live.bytes, live.peak) == (400, 400)
        b = a + before[:100]  # 400 more; what was there before does not count
        del a
        assert live.bytes == 800  # the view holds it
        del view
        assert (live.bytes, live.peak) == (400, 800)
        del b
        assert live.bytes == 0


def test_what_was_there_before_does_not_count_when_it_goes():
    before = torch.ones(1000)
    with Live() as live:
        before.add_(1)
        view = before.view(10, 100)
        del before, view
        assert (live.bytes, live.peak) == (0, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_tensors_without_memory_count_as_real_ones(backbone, precision):
    """Forward and backward: the same bytes kept, the same peak."""
    config = validate(
        {
            "views": {"global_size": 48, "local_size": 32, "num_local": 2},
            "model": {"backbone": backbone, "drop_path": 0.1},
            "head": {"hidden_dim": 24, "dim": 8},
        }
    )
    dtype = torch.bfloat16 if precision == "bf16" else None

    def passes(encoder) -> tuple[int, int]:
        views = [torch.zeros(shape) for shape in view_shapes(config, 3)]
        draws = torch.zeros(len(encoder.drop_paths), 12)
        with Live() as live:
            with as_on("cpu", dtype):
                embeddings = encoder(views, draws)
            kept = live.bytes
            embeddings.sum().backward()
        return kept, live.peak

    without_memory = on_meta(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = passes(without_memory.to_empty(device="cpu"))
    real = build_encoder(config, drop_path=0.1)
    kept, peak = passes(real.to(memory_format=torch.channels_last))
    exact = backbone == "test_vit" or precision == "fp32"  # oneDNN's batch norm in bf16 keeps a little more
    assert kept == (found[0] if exact else pytest.approx(found[0], rel=0.005)) and kept > 0
    assert peak == pytest.approx(found[1], rel=0.02)  # kernels differ in what they make on the way


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_a_gpu_keeps_no_matrix_of_all_pairs(dtype, masked):
    """2 heads of 1,000 tokens of width 16: 128 KB each tensor in fp32, the matrix would have 8 MB."""
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 2, 1000, 16, device="cuda", requires_grad=True) for _ in range(3))
        mask = torch.empty(1, 1, 1000, 1000, device="cuda") if masked else None
        with Live() as live, as_on("cuda", dtype):
            result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        size = 2 if dtype else 4
        own = 2 * 1000 * 16 * size  # bytes of one of them
        casts = 3 * own if dtype else 0
        assert result.shape == query.shape and result.dtype == (dtype or torch.float32)
        bias = 1000 * 1000 * size if masked and dtype else 0  # the mask itself is cast
        assert live.bytes == pytest.approx(own + casts + bias, abs=20_000)  # and the log-sum-exps
    assert not torch.is_autocast_enabled("cuda")
