"""massl-ray visualize WHAT ...: pictures of what the features of one or several models see."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from massl_ray.errors import UserError

if TYPE_CHECKING:
    from massl_ray.config import Config
    from massl_ray.data.decode import Decoding
    from massl_ray.data.listing import Listing
    from massl_ray.evaluation.subjects import Subject
    from massl_ray.reporting.album import Album
    from massl_ray.reporting.gallery import Gallery, Photos

KINDS = ("attention", "pca", "correspondence", "neighbours", "map")
OF_A_SOURCE = ("neighbours", "map")  # that need many images


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 2 a mistake in what was asked for."""
    try:
        arguments, flags = _parser().parse_known_args(argv)
        return _visualize(arguments, flags)
    except UserError as error:
        print(f"massl-ray: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="massl-ray visualize",
        description="Draw what features see: attention of the last block, principal components of patches, correspondences, "
        "nearest neighbours, a map. Several models are shown for the same images. PNG files and one page: report.html of the run "
        "that is named first, or visualize.html in --out. Settings of the data section are given as to massl-ray train.",
        allow_abbrev=False,
    )
    parser.add_argument("what", nargs="+", metavar="WHAT", help="as for massl-ray evaluate: a run, a checkpoint, a timm name, ...")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the files [eval/pictures of the run named first]")
    parser.add_argument("--data.source", dest="source", metavar="SOURCE", help="images, any source that massl-ray train takes")
    parser.add_argument("--kinds", default=",".join(KINDS), metavar="KIND,...", help=f"some of {', '.join(KINDS)} [all]")
    parser.add_argument("--images", type=int, default=6, metavar="N", help="evenly spaced images of the source to show [6]")
    parser.add_argument("--image", nargs="+", default=[], metavar="FILE", help="images to show instead")
    parser.add_argument("--size", type=int, metavar="PX", help="side of the views of these images [what the model was made for]")
    parser.add_argument("--at-most", type=int, default=2000, metavar="N", help="images of the source in neighbours and map [2000]")
    parser.add_argument("--foreground", action="store_true", help="principal components also of the foreground alone")
    parser.add_argument("--thumbnails", action="store_true", help="images on the map, not points alone")
    parser.add_argument("--backbone", metavar="NAME", help="timm name, for weights files that do not say theirs")
    return parser


def _visualize(arguments: argparse.Namespace, flags: Sequence[str]) -> int:
    kinds = [kind.strip() for kind in arguments.kinds.split(",")]
    _check(arguments, kinds)
    run = None if arguments.out else _run(arguments.what[0])
    from massl_ray.config import read_flags, validate  # late: a mistake above is answered at once
    from massl_ray.reporting.album import FOLDER
    from massl_ray.storage import Folder

    given = read_flags([*flags, *(["--data.source", arguments.source] if arguments.source else [])])
    if other := [section for section in given if section != "data"]:
        raise UserError(f"massl-ray visualize takes settings of the data section alone, not of {other[0]}.")
    config = validate(given)
    folder = Folder(run / FOLDER if run else arguments.out)
    folder.check_writable()
    listing = _listing(arguments, config) if arguments.source else None
    subjects = _opened(arguments, config)
    photos = _photos(arguments, config, listing)
    _keep(_draw(arguments, kinds, subjects, photos, listing, config), folder.path, run)
    return 0


def _run(what: str) -> Path:
    from massl_ray.storage import Folder

    folder = Folder(what)
    if not folder.is_local or not (folder.path / "config.toml").is_file():
        raise UserError(f"Say with --out DIR where pictures go: {what} is no run directory on this machine, whose report has them.")
    return folder.path


def _check(arguments: argparse.Namespace, kinds: Sequence[str]) -> None:
    from massl_ray.config.loading import nearest

    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"There is no kind of picture '{kind}'{nearest(kind, KINDS)}. Kinds: {', '.join(KINDS)}.")
    for name, least in (("images", 1), ("size", 8), ("at_most", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be {least} or more.")
    if not arguments.source and not arguments.image:
        raise UserError("Give images: --data.source SOURCE, or --image FILE ...")


def _listing(arguments: argparse.Namespace, config: "Config") -> "Listing":
    from massl_ray.data.sources import open_source

    return _spaced(open_source(arguments.source, cache_gb=config.data.cache_gb), arguments.at_most)


def _spaced(listing: "Listing", number: int) -> "Listing":
    import numpy as np

    return listing.take(np.unique(np.linspace(0, len(listing) - 1, min(number, len(listing))).round().astype(np.int64)))


def _photos(arguments: argparse.Namespace, config: "Config", listing: "Listing | None") -> "Photos":
    """The images that are shown, read once and decoded for each number of channels. Of a source those are left out that cannot be
    read; of files that were named it raises UserError."""
    from massl_ray.data.decode import UNREADABLE, Decoding, Encoded, reason
    from massl_ray.data.sources import fault
    from massl_ray.reporting.gallery import Photos

    how = Decoding.of(config.data)
    names, data = list(arguments.image), []
    try:
        if names:
            data = [Path(name).read_bytes() for name in names]
        elif listing is not None:
            chosen = _spaced(listing, arguments.images)
            good = [sample for sample in range(len(chosen)) if fault(chosen, sample, how) is None]
            names = [chosen.path(sample) for sample in good]
            data = [chosen.read(sample) for sample in good]
    except UNREADABLE as error:
        raise UserError(f"{names[len(data)]} cannot be read: {reason(error)}.") from None
    if not data:
        raise UserError(f"data.source: none of the images tried in {arguments.source} can be read.")

    def pixels(channels: int):
        made = []
        for name, each in zip(names, data, strict=True):
            try:
                made.append(Encoded(each, replace(how, channels=channels)).pixels()[0])
            except UNREADABLE as error:
                raise UserError(f"{name} cannot be shown: {reason(error)}.") from None
        return made

    return Photos(names, pixels)


def _opened(arguments: argparse.Namespace, config: "Config") -> "list[Subject]":
    import torch

    from massl_ray.evaluation.subjects import open_subject
    from massl_ray.reporting.gallery import view_side

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subjects = [open_subject(what, backbone=arguments.backbone, config=config).to(device) for what in arguments.what]
    for subject in subjects if arguments.size else ():
        side = view_side(subject, arguments.size)
        try:
            with torch.inference_mode():
                subject.backbone(torch.zeros(2, subject.channels, side, side, device=device))
        except Exception as error:  # of any backbone
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{subject.name} does not take images of --size {side} px: {why}.") from None
    return subjects


def _draw(
    arguments: argparse.Namespace,
    kinds: Sequence[str],
    subjects: "Sequence[Subject]",
    photos: "Photos",
    listing: "Listing | None",
    config: "Config",
) -> "Album":
    from massl_ray.data.decode import Decoding
    from massl_ray.reporting.gallery import Gallery, draw_attention, draw_comparison, draw_correspondences, draw_pca, slugs

    gallery = Gallery(photos, arguments.size, arguments.foreground)
    names = slugs([subject.name for subject in subjects])
    if len(subjects) > 1 and {"attention", "pca"} & set(kinds):
        draw_comparison(gallery, subjects)
    if "pca" in kinds:
        draw_pca(gallery, subjects)
    for subject, slug in zip(subjects, names, strict=True):
        if "attention" in kinds:
            draw_attention(gallery, subject, slug)
        if "correspondence" in kinds:
            draw_correspondences(gallery, subject, slug)
        if listing is not None and set(kinds) & set(OF_A_SOURCE):
            _around(arguments, kinds, gallery, subject, slug, listing, replace(Decoding.of(config.data), channels=subject.channels))
    return gallery.album


def _keep(album: "Album", folder: Path, run: Path | None) -> None:
    """Into a folder: that of a run, whose report shows it, or one with a page of its own. Prints where the files are."""
    from massl_ray.report import write
    from massl_ray.reporting.album import write_album, write_pictures
    from massl_ray.reporting.html import album_html, page
    from massl_ray.training.run import write_atomically

    try:
        if run:
            paths = write_album(folder, album)
        else:
            paths = [*write_pictures(folder, album), folder / "visualize.html"]
            write_atomically(paths[-1], page("visualize", ["<h1>What the features see</h1>", album_html(album)]))
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{folder} cannot be written to ({why}). Choose another place with --out DIR.") from None
    for path in [*paths, *([write(run)] if run else [])]:
        print(path)


def _around(
    arguments: argparse.Namespace,
    kinds: Sequence[str],
    gallery: "Gallery",
    subject: "Subject",
    slug: str,
    listing: "Listing",
    how: "Decoding",
) -> None:
    from massl_ray.reporting.surroundings import draw_landscape, draw_neighbours, look_around

    around = look_around(subject, listing, how)
    if "neighbours" in kinds:
        draw_neighbours(gallery, subject, slug, around, how, queries=arguments.images)
    if "map" in kinds:
        draw_landscape(gallery, subject, slug, around, thumbnails=arguments.thumbnails)


if __name__ == "__main__":
    sys.exit(main())
