"""Machines for so many workers, by hand and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from massl_ray.planning.cluster_file import Cluster, Pool
from massl_ray.planning.machines import CPU, cpus_of, devices, helpers, homes, places, usd_per_hour

HEAD = Pool("head", 1, 1, 0, 0, usd_on_demand=0.5)
SPOT = Pool("spot", 0, 2, 8, 4, "L4", True, 4.0, 1.0)
SURE = Pool("sure", 0, 2, 8, 4, "L4", False, 4.0, 1.0)  # for rent on demand
BIG = Pool("big", 0, 1, 32, 8, "H100", False, 32.0)
CHEAP = Pool("cheap", 0, 3, 16, 0, None, True, 0.8, 0.2)
DEAR = Pool("dear", 0, 5, 16, 0, None, False, 0.8)


def cluster(*pools: Pool, head: Pool = HEAD, max_machines: int | None = None) -> Cluster:
    return Cluster("it", "launcher", head, pools, max_machines)


def test_devices():
    assert devices(cluster(SPOT, BIG, CHEAP), "auto") == ["H100", "L4"]
    assert devices(cluster(SPOT, BIG), "cpu") == [CPU] == devices(cluster(CHEAP), "auto")
    assert devices(cluster(Pool("x", 0, 1, 1, 1)), "auto") == ["unknown"]


def test_places():
    assert places(cluster(SPOT, SURE, BIG, CHEAP), "L4") == 16
    assert places(cluster(SPOT, SURE, BIG, CHEAP), "H100") == 8
    assert places(cluster(SPOT, SURE, max_machines=3), "L4") == 12
    assert places(cluster(SPOT, head=Pool("head", 1, 1, 4, 1, "L4")), "L4") == 9
    assert places(cluster(CHEAP, DEAR), CPU) == 8  # one a machine; the head has no CPUs
    assert places(cluster(CHEAP), CPU, threads=12) == 2  # 48 CPUs, half of them for views
    assert places(cluster(head=Pool("head", 1, 1, 2, 0)), CPU) == 1
    assert places(cluster(), CPU) == 0


def test_homes_are_the_cheapest_first():
    both = cluster(SURE, SPOT)
    assert homes(both, "L4", 1) == {"spot": 1} == homes(both, "L4", 4)
    assert homes(both, "L4", 9) == {"spot": 2, "sure": 1}
    assert homes(cluster(SPOT, Pool("cpu", 2, 3, 16, 0)), "L4", 1) == {"spot": 1, "cpu": 2}  # always there
    assert homes(cluster(Pool("gpu", 2, 3, 8, 1, "L4")), "L4", 1) == {"gpu": 2}
    assert homes(cluster(SPOT, head=Pool("head", 1, 1, 4, 1, "L4")), "L4", 1) == {}


def test_larger_machines_where_not_so_many_are_allowed():
    few = cluster(Pool("small", 0, 9, 4, 1, "L4", False, 1.0), Pool("large", 0, 9, 16, 4, "L4", False, 5.0), max_machines=3)
    assert places(few, "L4") == 12
    assert homes(few, "L4", 3) == {"small": 3} and homes(few, "L4", 4) == {"large": 1} and homes(few, "L4", 12) == {"large": 3}


def test_helpers():
    all_of_them = cluster(SPOT, DEAR, CHEAP, max_machines=6)
    assert helpers(all_of_them, {"spot": 1}, 0.0) == {} == helpers(all_of_them, {"spot": 1}, -3.0)
    assert helpers(all_of_them, {"spot": 1}, 16.0) == {"cheap": 1}
    assert helpers(all_of_them, {"spot": 1}, 16.1) == {"cheap": 2}
    assert helpers(all_of_them, {"spot": 1}, 1e6) == {"cheap": 3, "dear": 2}  # six machines in all
    assert helpers(all_of_them, {"spot": 1, "cheap": 2}, 20.0) == {"cheap": 1, "dear": 1}


def test_prices_by_hand():
    both = cluster(SPOT, SURE, CHEAP)
    assert usd_per_hour(both, {"spot": 2, "sure": 1, "cheap": 3}, on_demand=False) == pytest.approx(0.5 + 2 * 1 + 4 + 3 * 0.2)
    assert usd_per_hour(both, {"spot": 2, "sure": 1, "cheap": 3}, on_demand=True) == pytest.approx(0.5 + 2 * 4 + 4 + 3 * 0.8)
    unpriced = cluster(SPOT, Pool("x", 0, 1, 1, 0))
    assert usd_per_hour(unpriced, {"spot": 1}, False) == 1.5 and usd_per_hour(unpriced, {"x": 1}, False) is None


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4), st.integers(0, 16), st.floats(0.1, 9)), min_size=1, max_size=4),
    st.none() | st.integers(1, 12),
    st.floats(0, 200),
)
def test_never_more_machines_than_there_are(given_pools, max_machines, cpus):
    pools = tuple(
        Pool(f"p{i}", 0, most, cpu, gpus, "L4" if gpus else None, False, usd)
        for i, (most, gpus, cpu, usd) in enumerate(given_pools)
    )
    it = Cluster("it", "launcher", HEAD, pools, max_machines)
    costs = []
    for workers in range(1, places(it, "L4") + 1):
        taken = homes(it, "L4", workers)
        assert sum(pool.gpus * taken.get(pool.name, 0) for pool in pools) >= workers
        more = helpers(it, taken, cpus)
        for pool in pools:
            assert taken.get(pool.name, 0) + more.get(pool.name, 0) <= pool.max
        assert max_machines is None or sum(taken.values()) + sum(more.values()) <= max_machines
        assert not any(pool.gpus for pool in pools if pool.name in more)
        if max_machines is None:
            assert cpus_of(it, more) >= min(cpus, sum(pool.max * pool.cpus for pool in pools if not pool.gpus)) - 1e-6
        costs.append(usd_per_hour(it, taken, on_demand=True))
    if max_machines is None:
        assert costs == sorted(costs)  # more workers never cost less an hour
