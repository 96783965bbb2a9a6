"""The encoder: head by hand, stochastic depth by its draws, and what it refuses."""

import math
import os
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import normalize

from massl_ray.config import Config, HeadSection, validate
from massl_ray.errors import UserError
from massl_ray.keyed import Stream, generator
from massl_ray.method.network import (
    Encoder,
    Head,
    KeyedDropPath,
    build_backbone,
    build_encoder,
    check_backbone,
    drop_path_draws,
    load_weights,
)


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors on busy cores: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(backbone: str = "test_vit", *, seed: int = 0, init: str = "random", **views: int) -> Config:
    return validate(
        {
            "run": {"seed": seed},
            "model": {"backbone": backbone, "drop_path": 0.3, "init": init},
            "head": {"hidden_dim": 24, "dim": 8},
            "views": {"global_size": 32, "local_size": 16, "num_local": 2} | views,
        }
    )


def images(rows: int, side: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def by_hand(head: Head, x: Tensor, num_layers: int, batch_norm: bool) -> Tensor:
    """Matrix products, population statistics and the error function."""
    stride = 3 if batch_norm else 2
    for layer in range(num_layers):
        linear = head.mlp[layer * stride]
        x = torch.einsum("ni,oi->no", x, linear.weight) + linear.bias
        if layer < num_layers - 1:
            if batch_norm:
                norm = head.mlp[layer * stride + 1]
                x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt() * norm.weight + norm.bias
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    return x / (x * x).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_head_equals_matrix_products(num_layers, batch_norm):
    head = Head(5, HeadSection(num_layers=num_layers, hidden_dim=7, dim=4, batch_norm=batch_norm)).double()
    for parameter in head.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head(x), by_hand(head, x, num_layers, batch_norm), rtol=1e-11, atol=1e-13)
    linears = [layer for layer in head.mlp if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in linears] == [7] * (num_layers - 1) + [4]


def test_head_starts_small_and_unbiased():
    head = Head(64, HeadSection(hidden_dim=256, dim=64))
    for layer in head.mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert not layer.bias.any()


def test_drop_path_drops_and_scales_rows_by_their_draws():
    layer = KeyedDropPath(0.25)
    layer.uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9])
    x = torch.arange(1.0, 17.0).view(4, 2, 2)
    expected = x.clone()
    expected[:2] = 0.0
    expected[2:] /= 0.75
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=0)
    assert torch.equal(KeyedDropPath(0.25)(x), x)


def test_drop_path_keeps_the_mean():
    layer, rows = KeyedDropPath(0.3), 20_000
    layer.uniform = torch.from_numpy(generator(Stream.DROP_PATH, 0).random(rows))
    kept = layer(torch.ones(rows, 1, dtype=torch.float64))
    assert kept.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(0.3 / 0.7 / rows))


def test_every_block_of_a_student_drops_with_its_own_probability():
    encoder = build_encoder(config(), drop_path=0.3)
    rates = [module.drop_probability for module in encoder.drop_paths]
    reference = timm.create_model("test_vit", num_classes=0, drop_path_rate=0.3)
    expected = [module.drop_prob for module in reference.modules() if type(module).__name__ == "DropPath"]
    assert rates == expected and rates[-1] == pytest.approx(0.3) and len(encoder.drop_paths) == len(rates)
    assert not any(type(module).__name__ == "DropPath" for module in encoder.modules())
    assert len(build_encoder(config()).drop_paths) == 0


def test_draws_are_keyed_and_view_major():
    encoder = build_encoder(config(), drop_path=0.3)
    layers = len(encoder.drop_paths)
    drawn = drop_path_draws(encoder, 5, 7, 1, size=3, num_views=4)
    expected = generator(Stream.DROP_PATH, 5, 7, 1).random((layers, 12), dtype="float32")
    assert (drawn.numpy() == expected).all()
    others = [drop_path_draws(encoder, *key, size=3, num_views=4) for key in ((4, 7, 1), (5, 6, 1), (5, 7, 0))]
    assert not any(torch.equal(drawn, other) for other in others)
    assert drop_path_draws(build_encoder(config()), 5, 7, 1, size=3, num_views=4) is None


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_same_draws_same_embeddings_and_none_means_identity(backbone):
    student, plain = build_encoder(config(backbone), drop_path=0.3), build_encoder(config(backbone))
    for encoder in (student, plain):
        encoder.eval()  # batch statistics would mix the rows
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.ones_(module.weight)  # timm starts residual branches at zero: nothing to drop
    views = [images(4, 32), images(4, 16)]
    draws = drop_path_draws(student, 0, 0, 0, size=2, num_views=4)
    with torch.no_grad():
        dropped = student(views, draws)
        assert torch.equal(dropped, student(views, draws))
        assert torch.equal(student.backbone(views[0]), plain.backbone(views[0]))  # as an evaluation calls it
        assert torch.equal(student(views), plain(views))  # no draws left over from the call before
        assert not torch.allclose(dropped, plain(views))
        certain = student(views, torch.ones_like(draws))
        scaled = student([views[0]], torch.ones(len(draws), 4))
    torch.testing.assert_close(certain[:4], scaled, rtol=1e-5, atol=1e-6)


def test_draws_go_to_the_rows_they_belong_to():
    """Row r of the forward pass gets column r of the draws, over both resolutions."""
    student = build_encoder(config(), drop_path=0.3).eval().double()
    views = [images(2, 32).double(), images(3, 16).double()]
    draws = torch.rand(len(student.drop_paths), 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        together = student(views, draws)
        first = 0
        for group in views:
            for row in group:
                alone = student([row.unsqueeze(0)], draws[:, first : first + 1])
                torch.testing.assert_close(together[first], alone[0], rtol=1e-10, atol=1e-12)
                first += 1


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_resolutions_together_equal_each_alone(backbone):
    encoder = build_encoder(config(backbone)).eval().double()
    views = [images(4, 32).double(), images(6, 16, seed=1).double()]
    with torch.no_grad():
        together = encoder(views)
        separate = [normalize(encoder.head.mlp(encoder.backbone(group)), dim=1) for group in views]
    torch.testing.assert_close(together, torch.cat(separate), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_position_embedding_is_for_the_global_size_and_shrinks_for_local_views():
    backbone = build_backbone(config().model, 32)
    assert backbone.pos_embed.shape[1] == 1 + (32 // 16) ** 2
    with torch.no_grad():
        assert backbone.eval()(images(1, 16)).isfinite().all()


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_weights_are_a_pure_function_of_the_seed(backbone):
    first = build_encoder(config(backbone, seed=1)).state_dict()
    before = torch.random.get_rng_state()
    torch.manual_seed(99)
    disturbed = torch.random.get_rng_state()
    second = build_encoder(config(backbone, seed=1), drop_path=0.2).state_dict()
    assert torch.equal(torch.random.get_rng_state(), disturbed)
    torch.random.set_rng_state(before)
    third = build_encoder(config(backbone, seed=2)).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.mlp.0.weight"], third["head.mlp.0.weight"])
    assert any(not torch.equal(first[name], third[name]) for name in first if name.startswith("backbone."))


def test_head_is_computed_in_full_precision_under_autocast():
    encoder = build_encoder(config()).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        rows = encoder([images(2, 32)])
        features = encoder.backbone(images(2, 32))
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, encoder.head(features.float()), rtol=1e-6, atol=1e-7)


def test_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match="'vit_smal_patch16_224' is no timm model; close ones are .*vit_small_patch16_224"):
        build_backbone(config("vit_smal_patch16_224").model, 32)
    with pytest.raises(UserError, match=r"'@@@@@@@@@@' is no timm model\. timm"):
        check_backbone(config("@@@@@@@@@@"))


def test_stochastic_depth_is_refused_where_there_is_none():
    with torch.device("meta"), pytest.raises(UserError, match="repghostnet_050 .*no stochastic depth.*set model.drop_path to 0"):
        build_backbone(config("repghostnet_050").model, 32, drop_path=0.3)
    with torch.device("meta"):
        build_backbone(config("repghostnet_050").model, 32)


@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_check_accepts_what_trains_and_draws_nothing(backbone):
    before = torch.random.get_rng_state()
    check_backbone(config(backbone))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(("backbone", "key", "side"), [("test_coatnet", "global_size", 40), ("test_vit_relpos", "local_size", 16)])
def test_check_refuses_sizes_that_the_model_cannot_take(backbone, key, side):
    with pytest.raises(UserError, match=f"{backbone} does not take views.{key} {side}: .*[a-z]"):
        check_backbone(config(backbone, **{key: side}))


def test_check_asks_for_no_local_size_where_there_are_no_local_views():
    check_backbone(config("test_vit_relpos", num_local=0))


@pytest.mark.parametrize("side", [8, 20, 40])
def test_transformers_take_sides_that_are_no_multiple_of_the_patch(side):
    """They are padded with the zeros of a normalized mean pixel, below and to the right."""
    check_backbone(config(local_size=side))
    encoder, view = build_encoder(config()).eval().double(), images(2, side).double()
    whole = -(-side // 16) * 16
    with torch.no_grad():
        torch.testing.assert_close(encoder([view]), encoder([nn.functional.pad(view, (0, whole - side, 0, whole - side))]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_back_from_a_file(tmp_path, suffix):
    weights = build_encoder(config(seed=3)).backbone.state_dict()
    path = tmp_path / f"weights{suffix}"
    save_file(weights, path) if suffix == ".safetensors" else torch.save(weights, path)
    loaded = build_encoder(config(seed=0, init=str(path))).backbone.state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_weights_with_code_are_refused_unexecuted(tmp_path):
    torch.save({"cls_token": Malicious(tmp_path / "executed")}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth cannot be read"):
        load_weights(nn.Linear(1, 1), tmp_path / "weights.pth")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "executed").exists()  # it would have


@pytest.mark.parametrize("content", [{"weight": torch.ones(3, 3)}, {"other": torch.ones(1)}, [1, 2], {1: torch.ones(1)}])
def test_weights_that_do_not_fit_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="weights.pth does not fit the backbone"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["absent.pth", "absent.safetensors", "text.pth", "text.safetensors"])
def test_files_that_hold_no_weights_are_refused(tmp_path, name):
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UserError, match=f"{name} cannot be read"):
        load_weights(nn.Linear(2, 2), tmp_path / name)


def test_encoder_finds_nothing_to_drop_in_a_plain_backbone():
    plain = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), Head(5, HeadSection(num_layers=1, dim=3)))
    rows = plain([images(2, 2), images(1, 2, seed=1)], torch.zeros(0, 3))
    torch.testing.assert_close(rows, plain([torch.cat([images(2, 2), images(1, 2, seed=1)])]))
