"""News between workers and console, through a real actor."""

import pytest
import ray

from massl_ray.on_ray.telemetry import TelemetryClient, start_telemetry

pytestmark = pytest.mark.ray


def test_events_come_once_and_in_order_and_stop_is_heard(ray_cluster):
    actor = start_telemetry()
    client = TelemetryClient(actor)
    client.announce({"kind": "a", "step": 1})
    client.announce({"kind": "b", "step": 2})
    ray.get(client.replies)
    assert ray.get(actor.take.remote()) == [{"kind": "a", "step": 1}, {"kind": "b", "step": 2}]
    assert ray.get(actor.take.remote()) == []
    assert not client.stop_asked()
    ray.get(actor.request_stop.remote())
    client.announce({"kind": "c"})
    ray.get(client.replies)  # the answers are here now
    assert client.stop_asked()
    assert client.stop_asked()  # and it stays so
