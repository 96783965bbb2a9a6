"""How many workers a cluster holds, by value; no Ray needed."""

import pytest
import ray

from massl_ray.config import load
from massl_ray.on_ray.layout import DataTasks, Layout, data_tasks, fitting, free_seats, plan_layout
from massl_ray.on_ray.place import Seat


@pytest.fixture
def plan(monkeypatch):
    """Plan for machines of these (CPUs, GPUs), with 16 micro-batches."""

    def plan(machines: list[tuple[float, float]], flags: str = "", num_micro_batches: int = 16, promised: int = 0) -> Layout:
        nodes = [{"Alive": True, "Labels": {}, "Resources": {"CPU": float(cpus), "memory": 1e9}} for cpus, _ in machines]
        for node, (cpus, gpus) in zip(nodes, machines, strict=True):
            node["Resources"] |= {"GPU": float(gpus)} if gpus else {}
            if not cpus:
                del node["Resources"]["CPU"]
        if promised:
            nodes[0]["Labels"] = {"massl-ray/max-gpus": str(promised)}
        nodes.append({"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}})
        nodes.append({"Alive": False, "Resources": {}})
        monkeypatch.setattr(ray, "nodes", lambda: nodes)
        return plan_layout(load(["--config", "/dev/null", *flags.split()]), num_micro_batches)

    return plan


@pytest.mark.parametrize(
    ("machines", "most"),
    [
        ([(4, 0)], 1),
        ([(4, 0)] * 3, 3),
        ([(1, 0)], 1),  # at least one
        ([(1, 0)] * 2, 1),  # half of the CPUs is Ray Data's
        ([(2, 0)] * 2, 2),
        ([(0, 0), (4, 0), (4, 0)], 2),  # a head without CPUs holds no worker
        ([(0.5, 0), (4, 0)], 1),
        ([(4, 0)] * 20, 16),  # no more than micro-batches
    ],
)
def test_without_gpus_one_a_machine(plan, machines, most):
    assert plan(machines) == Layout(1, most, False, {"CPU": 0.75})


@pytest.mark.parametrize(
    ("machines", "threads", "most", "cpus"),
    [
        ([(8, 0)] * 2, 4, 2, 3.0),
        ([(8, 0)] * 2, 8, 1, 6.0),
        ([(8, 0), (2, 0)], 4, 1, 1.5),  # a worker must fit on the smallest machine
        ([(8, 0), (0.5, 0)], 4, 1, 3.0),  # that holds one
        ([(0, 0)], 4, 1, 0.75),
    ],
)
def test_threads(plan, machines, threads, most, cpus):
    assert plan(machines, f"--train.threads {threads}") == Layout(1, most, False, {"CPU": cpus})


@pytest.mark.parametrize(("machines", "most"), [([(16, 1)], 1), ([(16, 4), (16, 2), (16, 0)], 6), ([(16, 8)] * 3, 16)])
def test_with_gpus_one_a_gpu(plan, machines, most):
    assert plan(machines, "--train.threads 4") == Layout(1, most, True, {"CPU": 0.75, "GPU": 1.0})


def test_gpus_that_the_autoscaler_may_bring(plan):
    """An autoscaling cluster begins with a head that has neither."""
    assert plan([(0, 0)], promised=8) == Layout(1, 8, True, {"CPU": 0.75, "GPU": 1.0})
    assert plan([(0, 0)], "--elastic.max_workers 12", promised=8).max_workers == 8
    assert plan([(0, 0), (16, 4)], promised=2) == Layout(1, 4, True, {"CPU": 0.75, "GPU": 1.0})
    assert plan([(0, 0)], "--train.device cpu", promised=8) == Layout(1, 1, False, {"CPU": 0.75})


def test_the_device_that_is_asked_for(plan):
    assert plan([(16, 4)] * 2, "--train.device cpu") == Layout(1, 2, False, {"CPU": 0.75})
    assert plan([(16, 0)] * 2, "--train.device cuda") == Layout(1, 1, True, {"CPU": 0.75, "GPU": 1.0})


@pytest.mark.parametrize(
    ("flags", "num_micro_batches", "limits"),
    [
        ("--elastic.max_workers 5", 16, (1, 5)),  # machines may come
        ("--elastic.max_workers 5", 4, (1, 4)),
        ("--elastic.min_workers 3", 16, (3, 3)),
        ("--elastic.min_workers 2 --elastic.max_workers 2", 16, (2, 2)),
    ],
)
def test_the_number_that_is_asked_for(plan, flags, num_micro_batches, limits):
    layout = plan([(4, 0)], flags, num_micro_batches)
    assert (layout.min_workers, layout.max_workers) == limits


@pytest.mark.parametrize(
    ("per_worker", "nodes", "held"),
    [
        ({"CPU": 0.75}, [], 0),
        ({"CPU": 0.75}, [{"CPU": 1.0}, {}, {"CPU": 0.5}], 1),
        ({"CPU": 0.75}, [{"CPU": 1.0}, {"CPU": 3.0}], 5),
        ({"CPU": 0.75}, [{"CPU": 64.0}], 8),  # the most that are wanted
        ({"CPU": 1.5}, [{"CPU": 4.0}, {"CPU": 1.0}], 2),
        ({"CPU": 0.75, "GPU": 1.0}, [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0}, {"CPU": 1.0, "GPU": 2.0}], 5),
    ],
)
def test_fitting(per_worker, nodes, held):
    assert fitting(Layout(1, 8, "GPU" in per_worker, per_worker), nodes) == held


def test_free_seats_are_on_machines_without_any():
    gpus = Layout(1, 5, True, {"CPU": 0.75, "GPU": 1.0})
    full = {"CPU": 8.0, "GPU": 4.0}
    nodes = {"ours": full, "free": full, "shared": full, "no_gpu": {"CPU": 8.0}, "unknown": full}
    available = {"ours": full, "free": full, "shared": {"CPU": 8.0, "GPU": 3.0}, "no_gpu": {"CPU": 8.0}}
    assert free_seats(gpus, nodes, available, [Seat("ours", "3")]) == tuple(Seat("free", str(place)) for place in range(4))
    assert free_seats(gpus, nodes, available, [Seat("ours", "0"), Seat("ours", "1"), Seat("ours", "2")]) == (
        Seat("free", "0"),
        Seat("free", "1"),
    )
    cpus = Layout(1, 8, False, {"CPU": 0.75})
    two = {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}}
    assert free_seats(cpus, two, {"a": {"CPU": 0.5}, "b": {"CPU": 1.75}}, []) == (Seat("b", None), Seat("b", None))


@pytest.mark.parametrize(
    ("machines", "most", "world_size", "reserved", "tasks"),
    [
        ([12.0], 1, 1, 0.75, DataTasks(11, 1.0)),
        ([12.0], 3, 3, 0.75, DataTasks(3, 1.0)),
        ([12.0], 4, 3, 0.75, DataTasks(3, 0.25)),  # another worker is wanted
        ([16.0], 2, 2, 3.0, DataTasks(5, 1.0)),
        ([2.0], 1, 1, 0.75, DataTasks(1, 1.0)),
        ([2.0], 2, 2, 0.75, DataTasks(1, 0.25)),  # never none, and what two workers leave is half a CPU
        ([1.0, 1.0], 8, 2, 0.75, DataTasks(1, 0.25)),
        ([8.0, 1.0], 8, 2, 0.75, DataTasks(4, 0.25)),  # the small one too makes views
        ([2.0, 0.5], 1, 1, 0.75, DataTasks(1, 1.0)),  # holds no worker and no task
        ([], 8, 1, 0.75, DataTasks(1, 0.25)),
    ],
)
def test_data_tasks(monkeypatch, machines, most, world_size, reserved, tasks):
    nodes = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in machines]
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])
    assert data_tasks(Layout(1, most, False, {"CPU": reserved}), world_size) == tasks


def test_data_tasks_as_told(plan):
    layout = plan([(4, 0)], "--elastic.view_tasks 3")
    assert layout == Layout(1, 1, False, {"CPU": 0.75}, 3) and data_tasks(layout, 1) == DataTasks(3, 0.25)


def test_tasks_in_line():
    """On a machine of one CPU that joins, a run of one worker has its one waiting task, which leaves three quarters to a worker."""
    assert DataTasks(1, 0.25).waiting == 1 and DataTasks(3, 1.0).waiting == 6
