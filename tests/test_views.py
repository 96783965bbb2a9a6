"""Views: what is drawn, from which distributions, and what each operation does to pixels; torchvision is the reference."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import chisquare, ks_2samp, kstest
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as reference

from massl_ray.config import ViewsSection
from massl_ray.method.colour import Jitter
from massl_ray.method.resampling import Pyramid
from massl_ray.method.views import ViewParameters, apply_view, center_view, draw_view, make_views
from tests.helpers import photograph

CONFIG = ViewsSection(global_size=32, local_size=16, num_local=3)
DRAWS = 1500
PLAIN = ViewParameters(side=64, box=(0, 0, 160, 120), flip=False, jitter=None, gray=False, blur_sigma=0.0, solarize=False)
STILL = Jitter(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, order=(0, 1, 2, 3))


def draw(view: int, sample: int, config: ViewsSection = CONFIG, width: int = 1000, height: int = 1000) -> ViewParameters:
    return draw_view(config, width, height, seed=7, epoch=3, sample=sample, view=view)


@pytest.fixture(scope="module")
def drawn() -> list[list[ViewParameters]]:
    """DRAWS draws of the first global, the second global and the first local view."""
    return [[draw(view, sample) for sample in range(DRAWS)] for view in range(3)]


def share(values) -> float:
    return float(np.mean(list(values)))


def close_to(probability: float):
    """Within four standard deviations of a share of DRAWS draws."""
    return pytest.approx(probability, abs=4 * math.sqrt(probability * (1 - probability) / DRAWS) + 1e-9)


def difference(found: np.ndarray, expected: Image.Image) -> float:
    """Mean absolute difference in gray levels."""
    expected = np.asarray(expected)
    assert found.shape == expected.shape and found.dtype == np.uint8
    return float(np.abs(found.astype(float) - expected.astype(float)).mean())


def viewed(image: Image.Image, view: ViewParameters) -> np.ndarray:
    return apply_view(Pyramid(np.asarray(image)), view)


# ---- keys ------------------------------------------------------------------------------------------------------------


def test_same_key_gives_the_same_pixels():
    first = make_views(photograph(), CONFIG, seed=1, epoch=2, sample=3)
    np.random.seed(0)  # noqa: NPY002 - no global generator has a say
    torch.manual_seed(0)
    second = make_views(photograph(), CONFIG, seed=1, epoch=2, sample=3)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("key", ["seed", "epoch", "sample"])
def test_every_part_of_the_key_counts(key):
    base = {"seed": 1, "epoch": 2, "sample": 3}
    one = make_views(photograph(), CONFIG, **base)
    other = make_views(photograph(), CONFIG, **base | {key: 9})
    for a, b in zip([*one[0], *one[1]], [*other[0], *other[1]], strict=True):
        assert not np.array_equal(a, b)


def test_views_of_one_image_differ():
    config = CONFIG.model_copy(update={"local_size": 32, "local_area": (0.32, 1.0)})
    views = np.concatenate(make_views(photograph(), config, seed=1, epoch=2, sample=3))
    assert len({view.tobytes() for view in views}) == 5


def test_no_view_depends_on_another():
    few = make_views(photograph(), CONFIG, seed=1, epoch=0, sample=5)
    many = make_views(photograph(), CONFIG.model_copy(update={"num_local": 6}), seed=1, epoch=0, sample=5)
    assert np.array_equal(few[0], many[0]) and np.array_equal(few[1], many[1][:3])
    changed = CONFIG.model_copy(update={"global_size": 48, "global_area": (0.5, 0.6), "blur": (0.0, 0.0, 0.5), "solarize": 1.0})
    assert np.array_equal(make_views(photograph(), changed, seed=1, epoch=0, sample=5)[1], few[1])


def test_every_view_has_its_own_draw():
    boxes = {draw(view, 0, width=10**6, height=10**6).box for view in range(22)}
    assert len(boxes) == 22


def test_make_views_applies_what_is_drawn():
    image = photograph()
    global_views, local_views = make_views(image, CONFIG, seed=4, epoch=1, sample=8)
    assert global_views.shape == (2, 32, 32, 3) and local_views.shape == (3, 16, 16, 3)
    for view, pixels in enumerate([*global_views, *local_views]):
        expected = viewed(image, draw_view(CONFIG, 160, 120, seed=4, epoch=1, sample=8, view=view))
        assert np.array_equal(pixels, expected)


def test_without_local_views():
    global_views, local_views = make_views(photograph(), CONFIG.model_copy(update={"num_local": 0}), seed=4, epoch=1, sample=8)
    assert np.array_equal(global_views, make_views(photograph(), CONFIG, seed=4, epoch=1, sample=8)[0])
    assert local_views.shape == (0, 16, 16, 3) and local_views.dtype == np.uint8


# ---- distributions ---------------------------------------------------------------------------------------------------


def test_sides(drawn):
    assert [{view.side for view in views} for views in drawn] == [{32}, {32}, {16}]
    assert draw(9, 0).side == 16


def test_shares_of_operations(drawn):
    for views in drawn:
        assert share(view.flip for view in views) == close_to(0.5)
        assert share(view.jitter is not None for view in views) == close_to(0.8)
        assert share(view.gray for view in views) == close_to(0.2)
    assert [share(view.blur_sigma > 0 for view in views) for views in drawn] == [1.0, close_to(0.1), close_to(0.5)]
    assert [share(view.solarize for view in views) for views in drawn] == [0.0, close_to(0.2), 0.0]
    assert share(view.blur_sigma > 0 for view in (draw(5, sample) for sample in range(DRAWS))) == close_to(0.5)


def test_operations_are_independent(drawn):
    views = [view for kind in drawn for view in kind]
    columns = np.array([[view.flip, view.jitter is not None, view.gray, view.blur_sigma > 0] for view in drawn[2]], dtype=float)
    correlations = np.corrcoef(columns.T)[np.triu_indices(4, 1)]
    assert np.abs(correlations).max() < 4 / math.sqrt(DRAWS)
    assert abs(np.corrcoef([view.flip for view in views], [view.box[0] for view in views])[0, 1]) < 4 / math.sqrt(3 * DRAWS)


def test_jitter_is_uniform(drawn):
    jitters = [view.jitter for view in drawn[0] if view.jitter]
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.8, 1.2),
        ("hue", -0.1, 0.1),
    ):
        values = [getattr(jitter, name) for jitter in jitters]
        assert kstest(values, "uniform", (low, high - low)).pvalue > 1e-3, name
    orders = [jitter.order for jitter in jitters]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 24 and chisquare(counts).pvalue > 1e-3


def test_blur_sigma_is_uniform(drawn):
    assert kstest([view.blur_sigma for view in drawn[0]], "uniform", (0.1, 1.9)).pvalue > 1e-3
    assert kstest([view.blur_sigma for view in drawn[2] if view.blur_sigma], "uniform", (0.1, 1.9)).pvalue > 1e-3


def test_local_boxes_are_uniform_in_area_and_log_aspect(drawn):
    boxes = np.array([view.box for view in drawn[2]], dtype=float)
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert kstest(w * h / 1e6, "uniform", (0.05, 0.27)).pvalue > 1e-3
    assert kstest(np.log(w / h), "uniform", (math.log(3 / 4), 2 * math.log(4 / 3))).pvalue > 1e-3
    assert kstest(boxes[:, 0] / (1000 - w), "uniform").pvalue > 1e-3
    assert kstest(boxes[:, 1] / (1000 - h), "uniform").pvalue > 1e-3


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900)])
def test_global_boxes_are_distributed_as_torchvisions(width, height):
    found = np.array([draw(0, sample, width=width, height=height).box for sample in range(DRAWS)], dtype=float)
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    tops = [RandomResizedCrop.get_params(image, [0.32, 1.0], [3 / 4, 4 / 3]) for _ in range(DRAWS)]
    expected = np.array([(left, top, left + w, top + h) for top, left, h, w in tops], dtype=float)
    for one, other in (
        (found[:, 0], expected[:, 0]),
        (found[:, 1], expected[:, 1]),
        (found[:, 2] - found[:, 0], expected[:, 2] - expected[:, 0]),
        (found[:, 3] - found[:, 1], expected[:, 3] - expected[:, 1]),
    ):
        assert ks_2samp(one, other).pvalue > 1e-3


def test_boxes_reach_both_edges():
    half = CONFIG.model_copy(update={"local_area": (0.5, 0.5)})  # 2 x 1 of 2 x 2, or 1 x 2
    boxes = {draw(2, sample, half, width=2, height=2).box for sample in range(400)}
    assert {(0, 0, 1, 2), (1, 0, 2, 2), (0, 0, 2, 1), (0, 1, 2, 2)} <= boxes


def test_a_strip_falls_back_to_its_middle():
    config = CONFIG.model_copy(update={"global_area": (0.9, 1.0)})
    assert draw(0, 0, config, width=1000, height=10).box == (493, 0, 506, 10)  # 10 high, so 13 wide
    assert draw(0, 0, config, width=10, height=1001).box == (0, 494, 10, 507)


@settings(deadline=None, max_examples=200)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    sample=st.integers(0, 2**64 - 1),
    view=st.integers(0, 12),
    low=st.floats(0.01, 1),
)
def test_boxes_lie_inside_any_image(width, height, sample, view, low):
    config = ViewsSection(global_area=(low, 1.0), local_area=(low / 2, low))
    left, top, right, bottom = draw(view, sample, config, width, height).box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (2, 500)])
def test_tiny_images_give_views(size):
    global_views, local_views = make_views(Image.new("RGB", size, (10, 200, 30)), CONFIG, seed=0, epoch=0, sample=0)
    for view in [*global_views, *local_views]:
        assert np.ptp(view, axis=(0, 1)).max() == 0  # of one colour before, of one colour after


# ---- operations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(10, 5, 130, 105), (0, 0, 160, 120), (40, 30, 70, 70)])
def test_crop_and_resize(box):
    left, top, right, bottom = box
    expected = reference.resized_crop(photograph(), top, left, bottom - top, right - left, [64, 64], InterpolationMode.BICUBIC)
    assert difference(viewed(photograph(), replace(PLAIN, box=box)), expected) < 2.5
    assert difference(viewed(photograph(), replace(PLAIN, box=(left + 8, top, right, bottom))), expected) > 2.5


def square() -> Image.Image:
    """The photograph at the size of the view, so that nothing is resampled."""
    return photograph(64, 64)


def applied(**changes) -> np.ndarray:
    return viewed(square(), replace(PLAIN, box=(0, 0, 64, 64), **changes))


def test_a_view_without_operations_keeps_the_pixels():
    assert difference(applied(), square()) == 0
    assert difference(applied(jitter=STILL), square()) < 1.5  # to hue, saturation, value and back


def test_flip():
    assert difference(applied(flip=True), reference.hflip(square())) == 0


@pytest.mark.parametrize("factor", [0.6, 0.85, 1.2, 1.4])
@pytest.mark.parametrize(
    ("name", "adjust"),
    [
        ("brightness", reference.adjust_brightness),
        ("contrast", reference.adjust_contrast),
        ("saturation", reference.adjust_saturation),
    ],
)
def test_jitter_factors(name, adjust, factor):
    expected = adjust(square(), factor)
    assert difference(applied(jitter=replace(STILL, **{name: factor})), reference.adjust_hue(expected, 0.0)) < 1.5
    assert difference(applied(jitter=replace(STILL, **{name: 2 - factor})), expected) > 2.5  # the other way is far off


@pytest.mark.parametrize("hue", [-0.5, -0.1, -0.031, 0.05, 0.1, 0.3])
def test_hue(hue):
    assert difference(applied(jitter=replace(STILL, hue=hue)), reference.adjust_hue(square(), hue)) < 1.5
    if abs(hue) < 0.4:  # half a turn is the same both ways
        assert difference(applied(jitter=replace(STILL, hue=-hue)), reference.adjust_hue(square(), hue)) > 1.5


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_jitter_in_its_order(order):
    jitter = Jitter(brightness=1.4, contrast=0.6, saturation=1.2, hue=0.1, order=order)
    steps = [
        lambda image: reference.adjust_brightness(image, 1.4),
        lambda image: reference.adjust_contrast(image, 0.6),
        lambda image: reference.adjust_saturation(image, 1.2),
        lambda image: reference.adjust_hue(image, 0.1),
    ]
    forward = backward = square()
    for number in order:
        forward = steps[number](forward)
    for number in reversed(order):
        backward = steps[number](backward)
    assert difference(applied(jitter=jitter), forward) < 1.5
    assert difference(applied(jitter=jitter), backward) > 2


def test_gray():
    assert difference(applied(gray=True), reference.rgb_to_grayscale(square(), 3)) < 0.01  # halves are rounded otherwise


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 1.5, 2.0])
def test_blur(sigma):
    kernel = 2 * math.ceil(4 * sigma) + 1
    expected = reference.gaussian_blur(square(), [kernel, kernel], [sigma, sigma])
    assert difference(applied(blur_sigma=sigma), expected) < 2.5
    if sigma >= 1:
        assert difference(applied(blur_sigma=sigma / 2), expected) > 2.5


def test_blur_keeps_the_level():
    flat = np.full((24, 24, 3), 251, np.uint8)
    for sigma in np.linspace(0.1, 4.0, 79):
        view = replace(PLAIN, side=24, box=(0, 0, 24, 24), blur_sigma=float(sigma))
        assert (apply_view(Pyramid(flat), view) == 251).all()


def test_solarize():
    assert difference(applied(solarize=True), reference.solarize(square(), 128)) == 0


def test_operations_come_in_the_papers_order():
    jitter = Jitter(brightness=1.3, contrast=1.4, saturation=1.2, hue=0.1, order=(3, 1, 0, 2))
    view = ViewParameters(side=64, box=(8, 4, 128, 116), flip=True, jitter=jitter, gray=True, blur_sigma=1.5, solarize=True)
    image = reference.resized_crop(photograph(), 4, 8, 112, 120, [64, 64], InterpolationMode.BICUBIC)
    image = reference.adjust_contrast(reference.adjust_hue(reference.hflip(image), 0.1), 1.4)
    image = reference.adjust_saturation(reference.adjust_brightness(image, 1.3), 1.2)
    image = reference.gaussian_blur(reference.rgb_to_grayscale(image, 3), [13, 13], [1.5, 1.5])
    # a level beside the threshold may fall on its other side, which is worth up to 255
    assert difference(viewed(photograph(), view), reference.solarize(image, 128)) < 4
    before = difference(viewed(photograph(), replace(view, solarize=False)), image)
    assert before < 2.5


def test_the_image_is_left_as_it_was():
    image = photograph()
    before = image.tobytes()
    viewed(image, replace(PLAIN, flip=True, jitter=replace(STILL, brightness=0.6), solarize=True))
    assert image.tobytes() == before


# ---- evaluation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height", "cut"), [(160, 120, 60), (120, 160, 60), (100, 100, 50)])
def test_center_view(width, height, cut):
    image = photograph(width, height)
    expected = reference.resize(reference.center_crop(image, [cut, cut]), [32, 32], InterpolationMode.BICUBIC)
    assert difference(center_view(image, 32, 0.5), expected) < 2.5
    assert difference(center_view(image, 32, 0.7), expected) > 2.5


def test_center_view_of_the_whole_square_is_the_image():
    assert difference(center_view(square(), 64, 1.0), square()) == 0


@settings(deadline=None, max_examples=50)
@given(width=st.integers(1, 300), height=st.integers(1, 300), part=st.floats(0.01, 1.0))
def test_center_view_of_any_size(width, height, part):
    assert (center_view(Image.new("RGB", (width, height), (9, 90, 200)), 8, part) == (9, 90, 200)).all()


# ---- other than three channels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_each_band_is_cut_flipped_blurred_and_solarized_alike(channels):
    """As if it were all of red, green and blue, but for OpenCV's rounding, which depends on their number."""
    bands = np.stack([np.roll(np.asarray(photograph()), 7 * n, axis=1)[..., n % 3] for n in range(channels)], axis=2)
    view = replace(PLAIN, box=(11, 5, 120, 104), flip=True, blur_sigma=1.3, solarize=True)
    found = apply_view(Pyramid(bands), replace(view, gray=True))
    assert found.shape == (64, 64, channels) and found.dtype == np.uint8
    for band in range(channels):
        alone = apply_view(Pyramid(np.repeat(bands[..., band, None], 3, axis=2)), view)
        assert np.abs(found[..., band].astype(int) - alone[..., 0]).max() <= 1


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 2, 0)])
def test_jitter_of_bands_is_that_of_torchvision_on_gray(order):
    band = np.asarray(photograph(64, 64))[..., :1]
    jitter = Jitter(brightness=1.3, contrast=0.7, saturation=1.8, hue=0.3, order=order)
    found = apply_view(Pyramid(band), replace(PLAIN, box=(0, 0, 64, 64), jitter=jitter))
    expected = Image.fromarray(band[..., 0])
    for operation in order:
        if operation == 0:
            expected = reference.adjust_brightness(expected, 1.3)
        elif operation == 1:
            expected = reference.adjust_contrast(expected, 0.7)
    assert difference(found[..., 0], expected) < 1.5


def test_views_of_bands_are_drawn_as_those_of_colours():
    bands = np.random.default_rng(0).integers(0, 256, (50, 70, 5), dtype=np.uint8)
    global_views, local_views = make_views(bands, CONFIG, seed=0, epoch=0, sample=3)
    assert global_views.shape == (2, 32, 32, 5) and local_views.shape == (3, 16, 16, 5)
    none = CONFIG.model_copy(update={"num_local": 0})
    assert make_views(bands, none, seed=0, epoch=0, sample=3)[1].shape == (0, 16, 16, 5)
    assert center_view(bands, 8, 0.9).shape == (8, 8, 5)
    colours = center_view(bands[..., :3], 8, 0.9)
    assert np.array_equal(center_view(bands, 8, 0.9)[..., :3], colours)
