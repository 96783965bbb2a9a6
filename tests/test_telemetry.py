"""News between workers and the command, and the state that is kept, through a real actor."""

import pytest
import ray
import torch

from massl_ray.on_ray.telemetry import News, TelemetryClient, start_telemetry, unpack
from massl_ray.training.wish import Wish

pytestmark = pytest.mark.ray


@pytest.fixture
def actor(ray_cluster):
    return start_telemetry()


def begin(actor) -> tuple[int, int]:
    return ray.get(actor.begin.remote())


def test_news_come_once_in_order_and_of_the_present_life_only(actor):
    first, _ = begin(actor)
    old = TelemetryClient(actor, first)
    old.announce({"kind": "a"})
    new = TelemetryClient(actor, begin(actor)[0])
    old.announce({"kind": "late"})
    new.announce({"kind": "b"})
    assert ray.get(actor.take.remote()) == News([{"kind": "a"}, {"kind": "b"}], 2, 2, 0, None)
    assert ray.get(actor.take.remote()).events == []


def test_failures_in_a_row_count_until_a_new_step_is_reached(actor):
    assert [begin(actor)[1] for _ in range(3)] == [0, 1, 2]
    ray.get(actor.progress.remote(3, 5))
    assert begin(actor)[1] == 1
    ray.get(actor.progress.remote(4, 5))  # as far as before
    assert begin(actor)[1] == 2
    ray.get(actor.ask.remote(Wish.RESIZE))
    assert begin(actor)[1] == 2


def test_a_wish_is_heard_and_only_stop_survives_a_new_life(actor):
    client = TelemetryClient(actor, begin(actor)[0])
    assert client.wish() == Wish.NONE
    ray.get(actor.ask.remote(Wish.RESIZE))
    client.progress(1)
    ray.get(client.replies)
    assert client.wish() == Wish.RESIZE
    begin(actor)
    assert ray.get(actor.progress.remote(2, 2)) == Wish.NONE
    ray.get(actor.ask.remote(Wish.STOP))
    begin(actor)
    assert ray.get(actor.progress.remote(3, 3)) == Wish.STOP


def test_the_kept_state_comes_back_to_the_bit(actor):
    client = TelemetryClient(actor, begin(actor)[0])
    assert client.kept() is None
    tensors = {"step": torch.tensor(7), "rows": torch.randn(3, 2).to(torch.bfloat16)}
    client.keep(tensors, {"images_seen": 56})
    client.close()
    kept = client.kept()
    assert kept and (kept[0], kept[2]) == (7, {"images_seen": 56})
    restored = unpack(ray.get(kept[1][0]))
    assert all(torch.equal(value, restored[name]) for name, value in tensors.items())


def test_a_checkpoint_waits_for_its_metrics(actor):
    client = TelemetryClient(actor, begin(actor)[0])
    client.announce({"kind": "metrics"})
    announced = ray.get(actor.take.remote()).announced
    assert ray.get(actor.counts.remote()) == (1, 0)
    ray.get(actor.confirm.remote(announced))
    client.wait_recorded(1)
    assert ray.get(actor.counts.remote()) == (1, 1)


def test_seats_are_told_once_all_are_taken_and_of_the_present_start_only(actor):
    assert ray.get(actor.order.remote(0)) == "hold"
    first = ray.get(actor.begin_group.remote(2))
    assert ray.get(actor.take.remote()).seats is None
    ray.get([actor.sit.remote(first, "a"), actor.sit.remote(first, "b")])
    assert ray.get(actor.take.remote()).seats == ("a", "b")
    second = ray.get(actor.begin_group.remote(1))
    ray.get(actor.sit.remote(first, "late"))
    assert ray.get(actor.take.remote()).seats is None
    assert ray.get([actor.order.remote(first), actor.order.remote(second)]) == ["leave", "hold"]


def test_seats_hold_until_they_are_to_regroup_or_the_run_is_over(actor):
    group = ray.get(actor.begin_group.remote(1))
    assert ray.get(actor.order.remote(group)) == "hold"
    ray.get(actor.sit.remote(group, "a"))
    ray.get(actor.ask_regroup.remote())
    assert ray.get(actor.order.remote(group)) == "leave" and ray.get(actor.take.remote()).seats is None
    group = ray.get(actor.begin_group.remote(1))
    assert ray.get(actor.order.remote(group)) == "hold"
    ray.get(actor.finish.remote({"status": "finished"}))
    assert ray.get(actor.order.remote(group)) == {"status": "finished"}


def test_all_that_was_said_has_arrived_before_a_life_ends(actor):
    client = TelemetryClient(actor, begin(actor)[0])
    client.announce({"kind": "last"})
    client.close()
    begin(actor)
    assert ray.get(actor.take.remote()).events == [{"kind": "last"}]
