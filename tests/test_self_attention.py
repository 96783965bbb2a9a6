"""Self-attention of the last block: against timm's own, with prefix tokens, rotary positions and without a class token."""

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from massl_ray.evaluation.attention import CLASS, MEAN, NoAttention, mass_mask, peaks, self_attention
from massl_ray.evaluation.tokens import patch_tokens


def model(name: str = "test_vit", **options) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        made = timm.create_model(name, num_classes=0, **options).eval()
        for parameter in made.parameters():  # so that attention is far from even
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return made


def images(number: int = 3, side: int = 64) -> Tensor:
    return torch.randn(number, 3, side, side, generator=torch.Generator().manual_seed(1))


def timms_own(backbone: nn.Module, pictures: Tensor) -> Tensor:
    """What the last block's softmax gave in a model that was never fused."""
    found = []
    attention = backbone.blocks[-1].attn  # type: ignore[union-attr,index]
    handle = attention.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.no_grad():
        backbone.forward_features(pictures)  # type: ignore[operator]
    handle.remove()
    return found[0]


def by_hand(backbone: nn.Module, pictures: Tensor) -> Tensor:
    """softmax(q k' / sqrt(d)) from what the last block gets."""
    attention, found = backbone.blocks[-1].attn, []  # type: ignore[union-attr,index]
    handle = attention.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    with torch.no_grad():
        backbone.forward_features(pictures)  # type: ignore[operator]
        handle.remove()
        rows, tokens, _ = found[0].shape
        q, k, _ = attention.qkv(found[0]).reshape(rows, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = attention.q_norm(q), attention.k_norm(k)
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1)


REGISTERS = {"reg_tokens": 4, "class_token": True, "no_embed_class": True}


@pytest.mark.parametrize("options", [{}, REGISTERS, {"qk_norm": True}])
def test_equals_timms_own_and_that_by_hand(options):
    backbone, pictures = model(img_size=64, **options), images()
    assert backbone.blocks[-1].attn.fused_attn  # type: ignore[union-attr,index]
    seen = self_attention(backbone, pictures)
    prefix = 1 + options.get("reg_tokens", 0)
    assert seen.patches.shape == (3, 2, 4, 4) and seen.prefix.shape == (3, 2, prefix) and seen.query == CLASS
    whole = torch.cat([seen.prefix, seen.patches.flatten(2)], 2)
    torch.testing.assert_close(whole.sum(2), torch.ones(3, 2))
    assert peaks(seen.patches.numpy()).max() > 1.5  # a softmax that is not even
    torch.testing.assert_close(whole, by_hand(backbone, pictures)[:, :, 0], atol=1e-6, rtol=1e-5)
    set_fused_attn(False)
    try:
        plain = model(img_size=64, **options)
    finally:
        set_fused_attn(True)
    assert not plain.blocks[-1].attn.fused_attn  # type: ignore[union-attr,index]
    torch.testing.assert_close(whole, timms_own(plain, pictures)[:, :, 0], atol=1e-6, rtol=1e-5)


def test_rotary_positions_are_in_it():
    backbone = model("vit_tiny_patch16_dinov3_qkvb" if "vit_tiny_patch16_dinov3_qkvb" in timm.list_models() else ROPE, **SMALL)
    seen = self_attention(backbone, images(1))
    bare = by_hand(backbone, images(1))
    whole = torch.cat([seen.prefix, seen.patches.flatten(2)], 2)
    torch.testing.assert_close(whole.sum(2), torch.ones(whole.shape[:2]))
    assert (whole - bare[:, :, 0]).abs().max() > 1e-3  # q and k alone do not know where they are


ROPE = "vit_small_patch16_dinov3"
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 2}


def test_the_model_is_left_as_it_was():
    backbone, pictures = model(img_size=64).train(), images()
    attention = backbone.blocks[-1].attn  # type: ignore[union-attr,index]
    self_attention(backbone, pictures)
    assert backbone.training and attention.fused_attn and not attention.attn_drop._forward_pre_hooks
    backbone.eval()
    with pytest.raises(RuntimeError):
        self_attention(backbone, torch.zeros(1, 5, 64, 64))
    assert attention.fused_attn and not attention.attn_drop._forward_pre_hooks


WITHOUT = [("test_vit2", {}), ("test_vit", {"class_token": False, "global_pool": "avg"}), ("test_vit", {"global_pool": "avg"})]


@pytest.mark.parametrize(("name", "options"), WITHOUT)
def test_without_a_pooled_class_token_it_is_the_mean_over_patches(name, options):
    backbone = model(name, img_size=64, **options)
    seen = self_attention(backbone, images())
    assert seen.query == MEAN
    rows = by_hand(backbone, images())[:, :, backbone.num_prefix_tokens :].mean(2)  # type: ignore[misc]
    whole = torch.cat([seen.prefix, seen.patches.flatten(2)], 2)
    torch.testing.assert_close(whole, rows, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["test_byobnet", "test_efficientnet", "test_resnet", "test_convnext"])
def test_conv_nets_are_refused_in_a_sentence(name):
    with pytest.raises(NoAttention, match=r"^(The blocks of )?\w+ ha(s|ve) no .+\.$"):
        self_attention(model(name), images())


@pytest.mark.parametrize(("name", "shape"), [("test_vit", (4, 4, 64)), ("test_resnet", (2, 2, 96)), ("test_convnext", (2, 2, 64))])
def test_patch_tokens_of_transformers_and_conv_nets(name, shape):
    backbone = model(name, **({"img_size": 64} if "vit" in name else {}))
    tokens = patch_tokens(backbone, images(40))
    assert tokens.shape == (40, *shape)
    with torch.no_grad():
        whole = backbone.forward_features(images(40))  # type: ignore[operator]
    if "vit" in name:
        torch.testing.assert_close(tokens[:, 1, 2], whole[:, 1 + 4 + 2], atol=1e-5, rtol=1e-4)
    else:
        torch.testing.assert_close(tokens[:, 1, 0], whole[:, :, 1, 0], atol=1e-5, rtol=1e-4)


def test_channels_last_maps_are_understood():
    tokens = patch_tokens(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, depths=(1, 1, 1, 1)), images(1, 224))
    assert tokens.shape == (1, 7, 7, 768)


@pytest.mark.parametrize("mass", [0.1, 0.6, 0.99])
def test_masks_hold_the_mass_with_the_fewest_patches(mass):
    maps = np.random.default_rng(0).exponential(size=(2, 3, 5, 5)) ** 2
    masks = mass_mask(maps, mass)
    for values, mask in zip(maps.reshape(-1, 25), masks.reshape(-1, 25), strict=True):
        assert values[mask].sum() >= mass * values.sum()
        assert values[mask].sum() - values[mask].min() < mass * values.sum()  # minimal
        assert not (~mask).any() or values[mask].min() >= values[~mask].max()


def test_masks_by_hand():
    assert mass_mask(np.array([[0.3, 0.1], [0.2, 0.4]])).tolist() == [[True, False], [False, True]]
    assert mass_mask(np.full((2, 5), 0.1)).sum() == 6
    assert mass_mask(np.zeros((2, 2))).sum() == 1
    assert peaks(np.array([[[4.0, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]])).tolist() == [4, 1, 1]
