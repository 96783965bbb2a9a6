"""Fixtures for all tests. Ray is real: one private cluster for the session, started when the first test asks for it."""

import os
import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of jobs in the background; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # two threads on busy cores wait for each other

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory):
    """A local cluster of four logical CPUs, with its own directory; gone when the session ends."""
    import ray

    from massl_ray.on_ray.knobs import QUIET

    os.environ.update(QUIET)
    folder = tmp_path_factory.mktemp("ray")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR", _temp_dir=str(folder)
    )
    yield
    ray.shutdown()


@pytest.fixture
def tiny_images(tmp_path):
    """A folder of 48 images in 3 classes, as unlike each other as stripes, spots and ramps are."""
    from tests.images import write_images

    return write_images(tmp_path / "images", 48)
