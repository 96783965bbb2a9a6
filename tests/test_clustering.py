"""Clustering: known partitions, scikit-learn, and who needs labels."""

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from massl_ray.errors import UserError
from massl_ray.evaluation.clustering import clustering
from massl_ray.evaluation.draws import Purpose, random_state
from massl_ray.evaluation.results import Split
from tests.splits import clouds


def test_agrees_with_scikit_learn():
    test = clouds(150, apart=0.5)
    result = clustering(test, test)
    unit = test.vectors / np.linalg.norm(test.vectors, axis=1, keepdims=True)
    found = KMeans(4, n_init=10, random_state=random_state(Purpose.KMEANS, 0)).fit_predict(unit)
    for name, score in (
        ("nmi", normalized_mutual_info_score),
        ("ami", adjusted_mutual_info_score),
        ("ari", adjusted_rand_score),
    ):
        figure = result.figures[name]
        assert figure.value == pytest.approx(score(test.labels, found))
        assert figure.low < figure.value < figure.high
    assert 0.2 < result.figures["nmi"].value < 0.95
    assert result.parameters["clusters"] == 4


def test_far_clouds_are_found_and_noise_is_not():
    far = clouds(120, apart=20)
    assert [figure.value for figure in clustering(far, far).figures.values()] == pytest.approx([1, 1, 1])
    noise = clouds(400, apart=0)
    adjusted = clustering(noise, noise).figures
    assert abs(adjusted["ami"].value) < 0.03 and abs(adjusted["ari"].value) < 0.03


def test_lengths_and_train_do_not_count():
    test = clouds(100, apart=0.5)
    longer = Split(test.vectors * np.random.default_rng(0).uniform(1, 9, (100, 1)).astype(np.float32), test.labels, test.classes)
    assert clustering(clouds(20), longer).figures["nmi"].value == pytest.approx(clustering(test, test).figures["nmi"].value)


def test_classes_that_test_lacks_make_no_clusters():
    test = clouds(100, apart=20)
    kept = test.labels < 3
    assert clustering(test, Split(test.vectors[kept], test.labels[kept], test.classes)).parameters["clusters"] == 3


def test_equal_vectors_are_no_error():
    same = Split(np.ones((30, 4), np.float32), np.arange(30) % 3)
    assert clustering(same, same).figures["nmi"].value == 0


@pytest.mark.parametrize(
    "test, clusters, sentence",
    [
        (Split(clouds(20).vectors, None), None, "needs labels and the test set has none"),
        (Split(clouds(20).vectors, np.zeros(20, np.int64), ("ant",)), None, "all 20 test images are of class ant"),
        (clouds(20), 21, "21 clusters of 20 test images"),
    ],
)
def test_refused(test, clusters, sentence):
    with pytest.raises(UserError, match=sentence):
        clustering(test, test, clusters=clusters)
