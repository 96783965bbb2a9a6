"""Protocols on a subject: features of a data set's images, which are computed once, and a record of what was found."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from massl_ray.config import Config
from massl_ray.data.decode import Decoding
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.evaluation.adapted import adapt_statistics, has_statistics, shuffled
from massl_ray.evaluation.alterations import Alteration, Corrupted, ViewsOf
from massl_ray.evaluation.clips import ClipFiles, clip_result
from massl_ray.evaluation.features import decoded
from massl_ray.evaluation.landmarks import Landmarks, landmark_result
from massl_ray.evaluation.protocols import run_protocol
from massl_ray.evaluation.records import data_facts, to_record
from massl_ray.evaluation.results import Split
from massl_ray.evaluation.split_features import Compute, split_features
from massl_ray.evaluation.subjects import Subject

BATCH = 64  # images that running statistics are adapted to at a time


@dataclass(frozen=True)
class Sides:
    """A data set with its train and its test images."""

    name: str
    train: Listing
    test: Listing


@dataclass(frozen=True)
class Measurer:
    """How features are computed, what protocols are given, and who is told."""

    config: Config
    compute: Compute
    device: torch.device
    options: Mapping[str, Any]  # of protocols
    say: Callable[[str], None]
    counted: Callable[[Iterator[int], int], Iterator[int]]
    fresh: bool = False

    def on_sides(self, subject: Subject, data: Sides, names: Sequence[str]) -> dict[str, Any]:
        """A record of these protocols; an untrained backbone that is not adapted yet is adapted to the train images. Raises
        UserError."""
        subject = self._adapted(subject, data.train)
        (train, bad_train), (test, bad_test) = (self.features(subject, images) for images in (data.train, data.test))
        options = {**self.options, "views_of": self._views_of(subject, data)}
        results = []
        for name in names:
            self.say(f"{subject.name}: {name}")
            results.append(run_protocol(name, train, test, options))
        return to_record(subject, data_facts(data.name, data.train, data.test, bad_train + bad_test), results)

    def on_landmarks(self, subject: Subject, name: str, landmarks: Landmarks) -> dict[str, Any]:
        """A record of the revisited Oxford and Paris protocol. Raises UserError."""
        (gallery, bad), (queries, _) = (self.features(subject, images) for images in (landmarks.gallery, landmarks.queries))
        result = landmark_result(gallery, queries, landmarks, seed=self.options["seed"])
        return to_record(subject, data_facts(name, landmarks.gallery, landmarks.queries, bad), [result])

    def on_clips(self, subject: Subject, name: str, clips: Sequence[ClipFiles], size: int | None = None) -> dict[str, Any]:
        """A record of video segmentation, of frames with a shorter side of `size` pixels. Raises UserError."""
        self.say(f"{subject.name}: segmentation of {len(clips):,} clips of {name}")
        result = clip_result(subject, clips, self.device, size=size, counted=self.counted)
        return to_record(subject, {"name": name, "clips": [clip.name for clip in clips]}, [result])

    def features(self, subject: Subject, images: Listing) -> tuple[Split, list[str]]:
        """And the paths of what cannot be read. Raises UserError where that is too much."""
        self.say(f"{subject.name}: features of {len(images):,} images of {images.root}")
        split, bad = split_features(subject, images, self.config.data, self.compute, counted=self.counted, fresh=self.fresh)
        if len(bad) > self.config.data.max_skipped * len(images):
            raise UserError(
                f"{len(bad):,} of {len(images):,} images of {images.root} cannot be read, more than data.max_skipped "
                f"{self.config.data.max_skipped:g} allows (first: {bad[0]}). Mend or remove them, or raise data.max_skipped."
            )
        if bad:
            self.say(f"{len(bad):,} images cannot be read and are left out, the first {bad[0]}")
        return split, bad

    def _adapted(self, subject: Subject, images: Listing) -> Subject:
        if subject.facts.get("adapted", True) or not has_statistics(subject.backbone):
            return subject
        why = f" ({reason})" if (reason := subject.facts.get("not_adapted_because")) else ""
        self.say(f"{subject.name}: running statistics are adapted to centre views of {images.root}{why}")
        how = Decoding(self.config.data.max_pixels, subject.channels, self.config.data.white)
        chunks = decoded(shuffled(images), subject.view, how)
        batches = (subject.normalized(part) for _, views in chunks for part in views.split(BATCH) if len(part) > 1)
        try:
            backbone = adapt_statistics(subject.to(self.device).backbone, batches, subject.precision).cpu()
        except ValueError:  # no two of the images can be read: whoever asks for their features is told
            return subject
        known = {"adapted": True, "adapted_on": f"centre views of {images.root}"}
        return replace(subject, backbone=backbone, facts={**subject.facts, **known})

    def _views_of(self, subject: Subject, data: Sides) -> ViewsOf:
        def features(side: Literal["train", "test"], alteration: Alteration) -> Split:
            images = data.train if side == "train" else data.test
            if not isinstance(alteration, Corrupted):
                self.say(f"{subject.name}: crop {alteration.number + 1} of {side} images")
            elif alteration.severity == 1:
                self.say(f"{subject.name}: {alteration.kind} of {side} images")
            return split_features(
                replace(subject, alteration=alteration),
                images,
                self.config.data,
                self.compute,
                counted=self.counted,
                fresh=self.fresh,
                keep=not isinstance(alteration, Corrupted),  # they are many
            )[0]

        return features
