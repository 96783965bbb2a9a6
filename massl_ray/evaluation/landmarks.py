"""The revisited Oxford and Paris data sets on disk or at a URI, as the benchmark's own download lays them out."""

import io
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from massl_ray.data.decode import UNREADABLE, Encoded, to_image
from massl_ray.data.decode import reason as fault
from massl_ray.data.files import SUFFIXES, Files, files, find, suffix
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.evaluation.checks import finite
from massl_ray.evaluation.results import Result, Split
from massl_ray.evaluation.revisited import GroundTruth, read_ground_truth, revisited
from massl_ray.storage import Folder, reason

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the upright image


@dataclass(frozen=True)
class Cropped:
    """Images that are a file each, cropped to their boxes when they are read."""

    whole: Files
    boxes: tuple[Box | None, ...]  # None is all of the image
    starts: None = None

    @property
    def root(self) -> str:
        return self.whole.root

    def __len__(self) -> int:
        return len(self.whole)

    def name(self, place: int) -> str:
        """With the box, as another one makes another image."""
        box = self.boxes[place]
        return self.whole.name(place) + (f"#{','.join(map(str, box))}" if box else "")

    def path(self, place: int) -> str:
        return self.whole.path(place)

    def read(self, place: int) -> bytes:
        """PNG, which loses nothing. What of a box is beyond the image is left out."""
        data, box = self.whole.read(place), self.boxes[place]
        if box is None:
            return data
        pixels, _ = Encoded(data).pixels()
        left, top, right, bottom = clipped(box, (pixels.shape[1], pixels.shape[0]))
        made = io.BytesIO()
        to_image(pixels[top:bottom, left:right]).save(made, "PNG")
        return made.getvalue()


@dataclass(frozen=True)
class Landmarks:
    gallery: Listing  # in the order of truth.gallery
    queries: Listing  # in the order of truth.queries, each cropped to its box
    truth: GroundTruth


def open_landmarks(folder: str) -> Landmarks:
    """DIR/jpg/NAME.jpg, or the images anywhere else in DIR, and DIR/gnd_*.pkl or gnd_*.json. Queries are looked at, as none can be
    left out; the gallery's images are not.

    Raises:
        UserError: something is missing or there twice, or a query cannot be cropped.
    """
    place = Folder(os.path.expanduser(folder))
    try:
        if place.kind() != "folder":
            raise UserError(f"There is no folder {place}: give that of roxford5k or rparis6k, with jpg and gnd_*.pkl.")
        file = _ground_truth_file(place)
        truth = read_ground_truth(place / file)
        images = place / "jpg" if place.kind("jpg") == "folder" else place
        named = _by_stem(images)
        _check_names([*truth.gallery, *truth.queries], named, images, file)
        gallery, whole = (files(images, [named[name][0] for name in names]) for names in (truth.gallery, truth.queries))
        queries = Cropped(whole, tuple(_rounded(box) for box in truth.boxes or [None] * len(whole)))
        for query in range(len(queries)):
            _check_query(queries, query)
    except OSError as error:
        raise UserError(
            f"{place} cannot be read ({reason(error)}). Mend the address, its permissions or its credentials."
        ) from None
    return Landmarks(Listing(gallery), Listing(queries), truth)


def landmark_result(gallery: Split, queries: Split, landmarks: Landmarks, *, seed: int = 0) -> Result:
    """The revisited protocol on features of both listings. Unreadable images of the gallery leave every ranking, as if they had not
    been named. Raises UserError for an unreadable query."""
    lacking = _lacking(queries, landmarks.queries)
    if lacking:
        raise UserError(
            f"revisited: {len(lacking)} of {len(landmarks.queries)} queries cannot be read, and the protocol needs them all "
            f"(first: {landmarks.queries.path(lacking[0])}). Mend them."
        )
    for split, name in ((gallery, "gallery"), (queries, "query")):
        finite(split, name, "revisited")
    gone = _lacking(gallery, landmarks.gallery)
    result = revisited(gallery.vectors, queries.vectors, _without(landmarks.truth, gone), seed=seed)
    cropped = sum(box is not None for box in landmarks.truth.boxes)
    return replace(result, parameters={**result.parameters, "cropped_queries": cropped, "unreadable_gallery_images": len(gone)})


def clipped(box: Box, size: tuple[int, int]) -> Box:
    """What of a box is within an image of `size` (width, height); without area where nothing is."""
    left, top, right, bottom = box
    return max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])


def _ground_truth_file(place: Folder) -> str:
    found = [name for name in place.entries() if name.startswith("gnd_") and suffix(name) in (".pkl", ".json")]
    if not found:
        raise UserError(
            f"{place} has no ground-truth file: put gnd_roxford5k.pkl, gnd_rparis6k.pkl or the same as gnd_NAME.json there."
        )
    if len(found) > 1:
        raise UserError(f"{place} has {len(found)} ground-truth files, {', '.join(found)}: keep one.")
    return found[0]


def _by_stem(images: Folder) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in find(images, SUFFIXES):
        found[os.path.splitext(os.path.basename(name))[0]].append(name)
    return found


def _check_names(names: Iterable[str], named: Mapping[str, Sequence[str]], images: Folder, file: str) -> None:
    wanted = list(dict.fromkeys(names))
    missing = [name for name in wanted if name not in named]
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(wanted):,} images that {file} names are not in {images} (first: {missing[0]}). Unpack "
            "all images of the data set there."
        )
    for name in wanted:
        if len(named[name]) > 1:
            raise UserError(f"{images} has {name} more than once: {', '.join(named[name])}. Keep the one that {file} means.")


def _rounded(box: Sequence[float] | None) -> Box | None:
    if box is None:
        return None
    left, top, right, bottom = map(round, box)
    return left, top, right, bottom


def _check_query(queries: Cropped, query: int) -> None:
    box = queries.boxes[query]
    try:
        width, height = Encoded(queries.whole.read(query)).size
    except UNREADABLE as error:
        raise UserError(f"The query {queries.path(query)} cannot be read ({fault(error)}). Mend it.") from None
    left, top, right, bottom = clipped(box, (width, height)) if box else (0, 0, width, height)
    if left >= right or top >= bottom:
        raise UserError(
            f"The box {box} of the query {queries.path(query)} has nothing of the image, which is {width} x {height} px. Mend bbx, "
            "which is left, top, right, bottom, or take the images in the data set's own size."
        )


def _lacking(split: Split, listing: Listing) -> list[int]:
    """Places of images that have no features."""
    readable = set(split.paths)
    return [place for place in range(len(listing)) if listing.path(place) not in readable]


def _without(truth: GroundTruth, gone: Sequence[int]) -> GroundTruth:
    """Without some images of the gallery."""
    kept = np.setdiff1d(np.arange(len(truth.gallery)), gone)
    relevance = [
        {kind: np.searchsorted(kept, np.intersect1d(places, kept)) for kind, places in known.items()} for known in truth.relevance
    ]
    return replace(truth, gallery=[truth.gallery[place] for place in kept], relevance=relevance)
