"""report.html: everything in one file, whatever state the run is in and whatever its images are called."""

import base64
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from massl_ray.reporting import html
from massl_ray.reporting.html import write_report
from massl_ray.reporting.pictures import png_bytes, save_png
from massl_ray.training.verdict import ADVICE, Verdict
from tests.helpers import dead_lines, metrics_line, older_line, photograph, smooth, tiny_run

VOID = {"meta", "img", "link", "br", "hr", "input", "base"}


class Page(HTMLParser):
    """Tags with their attributes, and the text between them; fails where tags are not closed in order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def images(self) -> dict[str, bytes]:
        """The pictures by their alt text, decoded."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, data = str(attributes["src"]).split(";base64,")
                assert kind in ("data:image/png", "data:image/jpeg", "data:image/svg+xml")
                found[attributes["alt"]] = base64.b64decode(data, validate=True)
        return found


CHARTS = [
    "Loss and teacher entropy",
    "k-NN accuracy",
    "Embedding spread",
    "Effective rank of the embeddings",
    "Alignment and uniformity",
    "Use of the memory",
    "Throughput",
    "Waiting for data",
]


def write_lines(run_dir: Path, *lines: dict, tail: str = "") -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def write_knn(run_dir: Path, **accuracies: float) -> None:
    for name, accuracy in accuracies.items():
        step = int(name.removeprefix("step_")) if name.startswith("step_") else 0
        (run_dir / "eval" / f"knn_{name}.json").write_text(json.dumps({"features": name, "step": step, "top1": accuracy}))


@pytest.fixture(scope="module")
def claimed(tmp_path_factory) -> Path:
    """The directory of a run that has not begun."""
    from tests.images import write_images

    folder = tmp_path_factory.mktemp("report")
    return tiny_run(write_images(folder / "images", 12), folder / "runs" / "first", "--train.steps", "1200").dir


@pytest.fixture
def run_dir(claimed, tmp_path) -> Path:
    folder = tmp_path / "a run"
    (folder / "eval").mkdir(parents=True)
    (folder / "config.toml").write_text((claimed / "config.toml").read_text())
    return folder


@pytest.fixture
def empty_charts(monkeypatch):
    """No drawing, which is what takes the time."""
    monkeypatch.setattr(html, "chart", lambda *_: "data:image/svg+xml;base64,")


# ---- states of a run -------------------------------------------------------------------------------------------------


def test_a_run_that_has_not_begun(run_dir):
    path = write_report(run_dir)
    page = Page(path)
    assert path == run_dir / "report.html"
    assert "No step is recorded yet" in page.text and "test_vit" in page.text and page.images() == {}
    assert not [name for name in run_dir.iterdir() if name.name.startswith(".report")]


def test_a_run_on_its_way(run_dir, empty_charts):
    write_lines(run_dir, metrics_line(2), metrics_line(4), tail='{"step": 6, "lo')
    write_knn(run_dir, pixels=0.5, untrained=0.613)
    page = Page(write_report(run_dir))
    for figure in ("4", "steps of 1,200", "32", "images seen", "3.600", "50.0%", "61.3%", "k-NN, raw pixels", "k-NN, untrained"):
        assert figure in page.texts, figure
    assert list(page.images()) == CHARTS
    assert "k-NN, step" not in page.text and "Nearest neighbours" not in page.text and "Views of the first" not in page.text


PICTURE = base64.b64encode(png_bytes(Image.fromarray(smooth()))).decode()


def test_what_training_gave_is_said(run_dir, empty_charts):
    write_lines(run_dir, metrics_line(600))
    write_knn(run_dir, pixels=0.5, untrained=0.6, step_600=0.45)
    for name, more in (("untrained", {"adapted": True, "top1_k1": 0.55}), ("step_600", {"query_images": 1000})):
        path = run_dir / "eval" / f"knn_{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    page = Page(write_report(run_dir))
    assert "k-NN, untrained, statistics adapted; k = 1: 55.0%" in page.texts and "k-NN, step 600" in page.texts
    assert "-15.0" in page.texts and "points by training" in page.texts
    assert "Raw pixels are better than the trained backbone: 50.0% for 45.0% at k = 20." in page.text
    assert "not better than the untrained (statistics adapted) one by more than chance: -15.0 points" in page.text


def test_a_finished_run(run_dir, tmp_path, empty_charts):
    write_lines(run_dir, *(metrics_line(step) for step in range(100, 1300, 100)))
    write_knn(run_dir, pixels=0.5, untrained=0.6, step_600=0.7, step_1200=0.8125)
    save_png(run_dir / "views.png", smooth())
    near = {"path": "/photos/x.png", "class": "cat", "similarity": 0.987, "picture": PICTURE}
    query = near | {"neighbours": [near, near | {"class": "dog", "similarity": -0.25}, near | {"picture": None}]}
    (run_dir / "eval" / "neighbours.json").write_text(json.dumps([query]))
    page = Page(write_report(run_dir))
    assert "1,200" in page.texts and "9,600" in page.texts and "81.2%" in page.texts and "k-NN, step 1,200" in page.texts
    assert "70.0%" not in page.text  # only the last
    assert list(page.images()) == [*CHARTS, "views", "x.png"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(page.images()["views"]))), smooth())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(page.images()["x.png"]))), smooth())
    assert " 0.99" in page.texts and " -0.25" in page.texts and any("(gone)" in text for text in page.texts)
    same = [text for text, (tag, attributes) in zip(spans(page), span_tags(page), strict=True) if attributes.get("class") == "same"]
    assert same == ["cat", "cat"] and spans(page) == ["cat", "dog", "cat"]


def span_tags(page: Page):
    return [entry for entry in page.tags if entry[0] == "span"]


def spans(page: Page) -> list[str]:
    return re.findall(r"<span[^>]*>([^<]*)</span>", page.source)


def test_images_without_classes(run_dir, tmp_path):
    near = {"path": "/photos/x.png", "class": None, "similarity": 0.5, "picture": PICTURE}
    (run_dir / "eval" / "neighbours.json").write_text(json.dumps([near | {"neighbours": [near]}]))
    page = Page(write_report(run_dir))
    assert "query" in page.texts and not [1 for _, attributes in span_tags(page) if attributes]
    assert "None" not in page.text.split("settings")[0]


def test_the_verdict_is_at_the_top(run_dir, empty_charts):
    write_lines(run_dir, *dead_lines(100))
    said = Page(write_report(run_dir)).text
    assert "Verdict: dead. At step 100 the run is dead" in said and ADVICE[Verdict.DEAD] in said
    assert said.index("Verdict") < said.index("steps of 1,200")
    write_lines(run_dir, *map(metrics_line, range(1, 101)))
    assert "Verdict: healthy. At step 100 the student learns" in Page(write_report(run_dir)).text


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_that_ended_in_a_non_finite_loss(run_dir, value):
    broken = metrics_line(2, loss=value, grad_norm=value, kl=value, embedding_std=value, effective_rank=value)
    broken |= {"alignment": value, "uniformity": value}
    write_lines(run_dir, *([] if value == math.inf else [metrics_line(1)]), broken)
    page = Page(write_report(run_dir))
    assert f"{value:.3f}" in page.texts and len(page.images()) == 7


def test_a_run_of_an_older_version_and_one_that_goes_on_with_this_one(run_dir):
    later = ["Alignment and uniformity", "Use of the memory"]
    write_lines(run_dir, older_line(1), older_line(2))
    assert list(Page(write_report(run_dir)).images()) == [name for name in CHARTS if name not in ["k-NN accuracy", *later]]
    write_lines(run_dir, older_line(1), older_line(2), metrics_line(3), metrics_line(4), metrics_line(5))
    charts = Page(write_report(run_dir)).images()
    assert [len(polyline(charts[name], "#2457a6")) for name in ["Embedding spread", *later]] == [5, 3, 3]


def test_all_settings_are_listed(run_dir):
    page = Page(write_report(run_dir))
    rows = re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page.source)
    listed = dict(rows)
    assert len(rows) == len(listed) == int(re.findall(r"All (\d+) settings", page.source)[0])
    assert listed["train.steps"] == "1200" and listed["memory.size"] == "64" and listed["model.backbone"] == "test_vit"
    assert listed["views.global_area"] == "[0.32, 1.0]"


def test_written_anew_it_shows_what_came_since(run_dir, empty_charts):
    write_lines(run_dir, metrics_line(2))
    write_report(run_dir)
    write_lines(run_dir, metrics_line(2), metrics_line(77))
    assert "77" in Page(write_report(run_dir)).texts


# ---- charts ----------------------------------------------------------------------------------------------------------


def polyline(svg: bytes, colour: str) -> np.ndarray:
    """Points (n, 2) of the chart's one curve of a colour, as drawn; y grows upwards."""
    paths = re.findall(rb'<path d="([^"]*)"[^>]*style="[^"]*stroke: ' + colour.encode() + rb"; stroke-width: 1\.5", svg)
    points = [np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path.decode()), dtype=float) for path in paths]
    longest = max(points, key=len)  # the legend has one of two points
    return longest * [1, -1]


def test_curves_have_the_shape_of_the_figures(run_dir):
    losses, waits, uniformity = [3.0, 1.0, 2.5, 0.5], [0.1, 0.9, 0.4, 0.2], [-1.0, -3.0, -2.0, -3.5]
    keys = ("loss", "data_wait", "alignment", "memory_usage", "uniformity")
    figures = [dict(zip(keys, each, strict=True)) for each in zip(losses, waits, waits, waits, uniformity, strict=True)]
    write_lines(run_dir, *(metrics_line(10 * (i + 1), **each) for i, each in enumerate(figures)))
    charts = Page(write_report(run_dir)).images()
    for name, values, colour in (
        ("Loss and teacher entropy", losses, "#2457a6"),
        ("Waiting for data", waits, "#2457a6"),
        ("Use of the memory", waits, "#2457a6"),
        ("Alignment and uniformity", waits, "#2457a6"),
        ("Alignment and uniformity", uniformity, "#c8641b"),
    ):
        points = polyline(charts[name], colour)
        assert len(points) == 4
        for axis, expected in ((0, [10, 20, 30, 40]), (1, values)):
            slope, offset = np.polyfit(expected, points[:, axis], 1)
            assert slope > 1 and np.allclose(points[:, axis], slope * np.array(expected) + offset, atol=0.01)


# ---- self-contained --------------------------------------------------------------------------------------------------


def test_nothing_is_fetched_from_elsewhere(run_dir):
    write_lines(run_dir, metrics_line(2), metrics_line(4))
    write_knn(run_dir, pixels=0.5, untrained=0.6)
    save_png(run_dir / "views.png", np.asarray(photograph(40, 40)))
    page = Page(write_report(run_dir))
    assert not {"script", "link", "iframe", "object", "base", "video"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name in ("href", "srcset", "poster", "background", "action"):
            assert name not in attributes
        assert str(attributes.get("src", "data:")).startswith("data:")
    assert (
        "url(" not in page.source
        and "@import" not in page.source
        and "//" not in re.sub(r"base64,[^']*", "", page.source.split("Settings")[0])
    )
    for name, data in page.images().items():
        if name != "views":
            for element in ElementTree.fromstring(data).iter():
                for attribute, value in element.attrib.items():
                    assert not attribute.endswith("href") or value.startswith("#"), value
                assert "url(" not in str(element.text) and not element.tag.endswith("}image")


# ---- hostile names ---------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "'><img src=x onerror=alert(1)>",
    '"onmouseover="alert(1)',
    "</title></style><b>",
    "&lt;b&gt; &amp;",
    "new\nline",
    "猫 ß \u2028",
    '"><img src=x onerror=alert(1)>',
    "{{constructor.constructor('alert(1)')()}} ${x} <!-- -->",
    "]]></style><svg/onload=alert(1)>",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(run_dir, tmp_path, name, empty_charts):
    path = tmp_path / f"{name.replace('/', '-')}.png"
    near = {"path": str(path), "class": name, "similarity": 0.5, "picture": PICTURE}
    gone = near | {"path": f"/gone/{name}.png", "picture": None}
    (run_dir / "eval" / "neighbours.json").write_text(json.dumps([near | {"neighbours": [near, gone, near | {"class": "x"}]}]))
    hostile_dir = run_dir.rename(tmp_path / f"run {name.replace('/', '-')}")
    text = (hostile_dir / "config.toml").read_text()
    (hostile_dir / "config.toml").write_text(re.sub(r"(?m)^source = .*$", lambda _: f"source = {json.dumps(name)}", text))
    write_lines(hostile_dir, metrics_line(2))
    page = Page(write_report(hostile_dir))
    allowed = "html head meta title style body h1 h2 p div b img table tr td span details summary".split()
    assert {tag for tag, _ in page.tags} <= set(allowed)
    names = {attribute for _, attributes in page.tags for attribute in attributes}
    assert names <= {"lang", "charset", "name", "content", "class", "alt", "src", "title"}
    assert [attributes["title"] for tag, attributes in page.tags if tag == "img" and "title" in attributes] == [str(path)] * 3
    assert sum(tag == "b" for tag, _ in page.tags) == 3  # the figures
    assert page.texts.count(hostile_dir.name) == 2  # title and heading
    assert page.texts.count(name) >= 4  # the query's class, the neighbours', the setting


def test_names_that_are_no_text(run_dir):
    near = {"path": "/gone/\udcff.png", "class": "\udcff", "similarity": 0.5}
    (run_dir / "eval" / "neighbours.json").write_text(json.dumps([near | {"neighbours": [near]}]))
    assert "? (gone)" in Page(write_report(run_dir)).texts
