"""Features over the whole cluster: pooled embeddings, kept in memory."""

from collections.abc import Iterator

from massl_ray.data.decode import Decoding
from massl_ray.data.listing import Listing
from massl_ray.evaluation.embedding import plan_embedding
from massl_ray.evaluation.split_features import Rows
from massl_ray.evaluation.subjects import Subject
from massl_ray.on_ray.embed import embed_batches

BATCH = 64  # images that go through the backbone together


def over_cluster(subject: Subject, listing: Listing, how: Decoding, batch: int = BATCH) -> Iterator[tuple[int, Rows]]:
    """Batches of the listing in order, each with its number of images. Needs a cluster."""
    plan = plan_embedding(subject, listing, how, "pooled", "float32", batch)
    numbers = range(plan.batches)
    for number, found in zip(numbers, embed_batches(subject, listing, plan, list(numbers)), strict=True):
        yield len(plan.samples(number)), (found.samples, found.vectors)
