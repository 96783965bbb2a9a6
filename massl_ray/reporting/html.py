"""report.html: one self-contained file about a run, made from its run directory alone."""

import base64
import html
import io
import json
import math
import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from massl_ray.evaluation.records import read_records, tables
from massl_ray.reporting.album import FOLDER, Album, data_url, read_album
from massl_ray.reporting.summary import read_knn, read_metrics, read_verdict
from massl_ray.reporting.yardstick import NAMES, gain, knn_summary, sentences, untrained_name
from massl_ray.training.run import write_atomically
from massl_ray.training.verdict import Facts

TURNING = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # the latter are none of HTML's
PAGE = 16_000_000  # bytes of all pictures of `massl-ray visualize` in a page
BLUE, ORANGE, GRAY = "#2457a6", "#c8641b", "#8a8f98"

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1d2129; max-width: 68rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
h3 { font-size: 1rem; margin-top: 2rem; }
p.note { color: #5a606b; max-width: 46rem; } .figures { display: flex; flex-wrap: wrap; gap: 2.5rem; margin: 1.5rem 0; }
.figures div b { display: block; font-size: 1.7rem; font-weight: 600; } .figures div { color: #5a606b; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; } .charts img { width: 100%; }
table { border-collapse: collapse; } td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
.near td { padding-right: .5rem; font-size: .8rem; color: #5a606b; } .near img { display: block; width: 96px; height: 96px; }
.near td:first-child { padding-right: 1.6rem; } .same { color: #1c7c3c; } details table { font-size: .85rem; }
img.views { max-width: 100%; }
"""


def write_report(run_dir: Path) -> Path:
    """Write report.html for a run, finished or not; returns its path."""
    config = tomllib.loads((run_dir / "config.toml").read_text())
    lines, knn = read_metrics(run_dir), read_knn(run_dir)
    sections = [
        _head(run_dir, config, lines, knn),
        _charts(config, lines, knn),
        _evaluations(run_dir),
        _views(run_dir, config),
        _neighbours(run_dir),
        _pictures(run_dir),
        _settings(config),
    ]
    path = run_dir / "report.html"
    write_atomically(path, page(run_dir.name, sections))
    return path


def page(title: str, sections: Sequence[str]) -> str:
    """A page of its own: nothing is fetched from anywhere."""
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head += f"<title>{text(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(sections)}</body></html>\n"


def _head(run_dir: Path, config: dict[str, Any], lines: list[dict[str, Any]], knn: list[dict[str, Any]]) -> str:
    model = f"{text(config['model']['backbone'])} on {text(config['data']['source'])}"
    if not lines:
        return f"<h1>{text(run_dir.name)}</h1><p>{model}. No step is recorded yet.</p>"
    last = lines[-1]
    figures = [
        (f"{last['step']:,}", f"steps of {config['train']['steps']:,}"),
        (f"{last['images_seen']:,}", "images seen"),
        (f"{last['loss']:.3f}", "loss"),
    ]
    trained = [record for record in knn if record["features"] not in ("pixels", "untrained")]
    for record in [record for record in knn if record not in trained] + trained[-1:]:
        names = {"pixels": NAMES["pixels"], "untrained": untrained_name(record.get("adapted"))}
        name = names.get(record["features"], f"step {record['step']:,}")
        nearest = f"; k = 1: {record['top1_k1']:.1%}" if "top1_k1" in record else ""
        figures.append((f"{record['top1']:.1%}", f"k-NN, {name}{nearest}"))
    known = knn_summary(knn, trained[-1]["step"] if trained else None)
    points = gain(known)
    figures += [] if points is None else [(f"{points:+.1f}", "points by training")]
    cells = "".join(f"<div><b>{value}</b>{name}</div>" for value, name in figures)
    finding = read_verdict(run_dir, lines)
    notes = f"<p class='note'>Verdict: {finding.verdict}. {text(finding.text)}</p>" if finding else ""
    notes += "".join(f"<p class='note'>{text(sentence)}</p>" for sentence in sentences(known, config["eval"]["knn_k"]))
    return f"<h1>{text(run_dir.name)}</h1><p>{model}</p>{notes}<div class='figures'>{cells}</div>"


def _charts(config: dict[str, Any], lines: list[dict[str, Any]], knn: list[dict[str, Any]]) -> str:
    if not lines:
        return ""
    steps = [line["step"] for line in lines]
    uniform = math.log(Facts.of(config).block_size)

    def curve(key: str) -> list[float]:
        return [line.get(key, math.nan) for line in lines]  # runs of old versions lack some

    def loss(axes: Axes) -> None:
        axes.plot(steps, curve("loss"), color=BLUE, label="loss")
        axes.plot(steps, curve("teacher_entropy"), color=ORANGE, label="teacher entropy")
        axes.axhline(uniform, color=GRAY, linestyle="--", label="ln S: nothing told apart")
        axes.legend(frameon=False)

    def accuracy(axes: Axes) -> None:
        trained = [record for record in knn if record["features"] != "pixels"]
        axes.plot(
            [record["step"] for record in trained],
            [100 * record["top1"] for record in trained],
            color=BLUE,
            marker="o",
            label="teacher features",
        )
        for record in knn:
            if record["features"] == "pixels":
                axes.axhline(100 * record["top1"], color=GRAY, linestyle="--", label="raw pixels")
        axes.legend(frameon=False)

    def spread(axes: Axes) -> None:
        axes.plot(steps, curve("embedding_std"), color=BLUE)
        axes.axhline(config["monitor"]["min_spread"], color=GRAY, linestyle="--", label="collapse bound")
        axes.set_ylim(0, 1)
        axes.legend(frameon=False)

    def pairs(axes: Axes) -> None:
        axes.plot(steps, curve("alignment"), color=BLUE, label="alignment: views of an image")
        axes.plot(steps, curve("uniformity"), color=ORANGE, label="uniformity: different images")
        axes.legend(frameon=False)

    def usage(axes: Axes) -> None:
        axes.plot(steps, curve("memory_usage"), color=BLUE)
        axes.set_ylim(0, 1)

    charts: list[tuple[str, str, Callable[[Axes], None]]] = [("Loss and teacher entropy", "nats", loss)]
    if knn:
        charts.append(("k-NN accuracy", "%", accuracy))
    charts += [
        ("Embedding spread", "1 = evenly over the sphere", spread),
        (
            "Effective rank of the embeddings",
            "dimensions",
            lambda axes: axes.plot(steps, curve("effective_rank"), color=BLUE) and None,
        ),
    ]
    if "alignment" in lines[-1]:
        charts += [("Alignment and uniformity", "lower is better, but not alone", pairs)]
        charts += [("Use of the memory", "1 = all rows alike", usage)]
    charts += [
        ("Throughput", "images/s", lambda axes: axes.plot(steps, curve("images_per_s"), color=BLUE) and None),
        (
            "Waiting for data",
            "% of the step",
            lambda axes: axes.plot(steps, [100 * share for share in curve("data_wait")], color=BLUE) and None,
        ),
    ]
    images = "".join(f"<img alt='{text(title)}' src='{chart(title, unit, draw)}'>" for title, unit, draw in charts)
    return f"<h2>Training</h2><div class='charts'>{images}</div>"


def chart(title: str, unit: str, draw: Callable[[Axes], None], xlabel: str = "step") -> str:
    """The URL of a picture."""
    buffer = io.BytesIO()
    with rc_context({"text.parse_math": False}):  # names may have dollars
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color="#e4e6ea")
        axes.set_axisbelow(True)
        draw(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(unit)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(buffer, format="svg")
    return _data_url("image/svg+xml", buffer.getvalue())


def _evaluations(run_dir: Path) -> str:
    """What `massl-ray evaluate` found."""
    found = ""
    for name, (head, *lines) in tables(read_records(run_dir / "eval")).items():
        rows = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        found += f"<h3>{text(name)}</h3><table><tr>{''.join(f'<th>{text(cell)}</th>' for cell in head)}</tr>{rows}</table>"
    note = "Figures of frozen features, with their 95 % intervals in brackets. Parameters are in eval/evaluation_*.json."
    return f"<h2>Evaluation</h2><p class='note'>{note}</p>{found}" if found else ""


def _views(run_dir: Path, config: dict[str, Any]) -> str:
    path = run_dir / "views.png"
    if not path.exists():
        return ""
    views = config["views"]
    note = (
        f"One image a row: 2 global views of {views['global_size']} px, then {views['num_local']} local ones "
        f"of {views['local_size']} px, shown at one size."
    )
    picture = f"<img class='views' alt='views' src='{_data_url('image/png', path.read_bytes())}'>"
    return f"<h2>Views of the first batch</h2><p class='note'>{note}</p>{picture}"


def _neighbours(run_dir: Path) -> str:
    path = run_dir / "eval" / "neighbours.json"
    if not path.exists():
        return ""
    rows = ""
    for query in json.loads(path.read_text()):
        cells = [_picture(query, text(query["class"] or "query"))]
        for near in query["neighbours"]:
            same = " class='same'" if query["class"] and near["class"] == query["class"] else ""
            caption = f"<span{same}>{text(near['class'] or '')}</span> {near['similarity']:.2f}"
            cells.append(_picture(near, caption))
        rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
    note = (
        "An image, and those that the trained backbone finds most similar, with cosine similarities. "
        "Classes, where known, were not used for training."
    )
    return f"<h2>Nearest neighbours</h2><p class='note'>{note}</p><table class='near'>{rows}</table>"


def _picture(entry: dict[str, Any], caption: str) -> str:
    picture, path = entry.get("picture"), entry["path"]
    if not picture:
        return f"{caption} (gone)"
    return f"<img alt='{text(Path(path).name)}' title='{text(path)}' src='data:image/png;base64,{text(picture)}'>{caption}"


def _pictures(run_dir: Path) -> str:
    """What `massl-ray visualize` drew last."""
    album = read_album(run_dir / FOLDER)
    return f"<h2>Pictures</h2><p class='note'>The files are in {FOLDER}.</p>{album_html(album)}" if album else ""


def album_html(album: Album) -> str:
    names = "".join(f"<tr><td>{number}</td><td>{text(name)}</td></tr>" for number, name in enumerate(album.images, 1))
    made, left = f"<details><summary>Images</summary><table>{names}</table></details>", PAGE
    for picture in album.pictures:
        made += f"<h3>{text(picture.title)}</h3><p class='note'>{text(picture.note)}</p>"
        if picture.files:
            rows = "".join(f"<tr><td>{text(a)}</td><td>{'<br>'.join(map(text, others))}</td></tr>" for a, others in picture.files)
            made += f"<details><summary>Their files</summary><table>{rows}</table></details>"
        url = data_url(picture.png) if picture.png else ""
        if url and len(url) <= left:
            left -= len(url)
            made += f"<img class='views' alt='{text(picture.title)}' src='{url}'>"
        elif picture.name:
            why = f"this page would have more than {PAGE // 1_000_000} MB" if url else "it is gone, damaged or too large"
            made += f"<p class='note'>{text(picture.name)} is not shown here: {why}.</p>"
    return made


def _settings(config: dict[str, Any]) -> str:
    rows: Sequence[str] = [
        f"<tr><td>{text(section)}.{text(key)}</td><td>{text(value)}</td></tr>"
        for section, values in config.items()
        for key, value in values.items()
    ]
    return f"<h2>Settings</h2><details><summary>All {len(rows)} settings</summary><table>{''.join(rows)}</table></details>"


def text(value: object) -> str:
    """As HTML shows it. File names may be any bytes; those that turn the direction of what follows are spelled out."""
    plain = TURNING.sub(lambda found: f"\\u{ord(found[0]):04x}", str(value))
    return html.escape(plain, quote=True).encode(errors="replace").decode()


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
