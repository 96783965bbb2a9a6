"""Engines on a real Ray: warm when they report, and ready to be met."""

import gc
import re
import socket

import pytest
import ray

from massl_ray.on_ray.engine import meeting_place, start_engine
from massl_ray.on_ray.knobs import MEETINGS


def test_a_meeting_place_is_free(monkeypatch):
    monkeypatch.delenv(MEETINGS, raising=False)
    host, port = meeting_place().removeprefix("tcp://").rsplit(":", 1)
    with socket.create_server(("", int(port))):
        assert socket.gethostbyname(host)


def test_on_a_cluster_of_our_own_it_is_a_new_file_each_time(monkeypatch, tmp_path):
    monkeypatch.setenv(MEETINGS, str(tmp_path))
    meetings = {meeting_place() for _ in range(3)}
    assert len(meetings) == 3 and all(re.fullmatch(rf"file://{tmp_path}/[0-9a-f]{{32}}", meeting) for meeting in meetings)


@pytest.mark.ray
@pytest.mark.slow
def test_an_engine_that_reports_has_imported_what_training_needs(ray_cluster):
    here = ray.get_runtime_context().get_node_id()
    engine = start_engine(here)

    def look(self):
        import os
        import sys

        return os.getpid(), gc.isenabled(), gc.get_freeze_count(), {"torch._dynamo", "timm", "ray.data"} <= set(sys.modules)

    pid, address = ray.get(engine.report.remote())
    found_pid, collects, frozen, imported = ray.get(engine.__ray_call__.remote(look))
    ray.kill(engine)
    assert pid == found_pid and address.rsplit(":", 1)[1].isdigit()
    assert collects and frozen > 100_000 and imported
