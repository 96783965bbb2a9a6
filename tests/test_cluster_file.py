"""Cluster files as pools of machines."""

from datetime import date
from pathlib import Path

import pytest
import yaml

from massl_ray.errors import UserError
from massl_ray.planning.cluster_file import Cluster, Pool, read_cluster

LAUNCHER = """
cluster_name: mine
max_workers: 10
provider: {type: aws}
head_node_type: head
available_node_types:
  head:
    resources: {CPU: 0}
    labels: {massl-ray/usd-per-hour: "0.2", massl-ray/max-gpus: "16"}
  gpu:
    min_workers: 1
    max_workers: 8
    resources: {CPU: 8, GPU: 2, memory: 1000}
    labels:
      massl-ray/gpu: L4
      massl-ray/market: spot
      massl-ray/usd-per-hour: "1.5"
      massl-ray/usd-per-hour-spot: "0.5"
      massl-ray/prices-of: "2026-03-04"
  cpu:
    max_workers: 4
    resources: {CPU: 16}
  later:
    resources: {CPU: 1}
head_start_ray_commands:
  - ray stop
  - ray start --head --dashboard-host=0.0.0.0
"""
KUBERAY = """
apiVersion: v1
kind: Secret
---
apiVersion: ray.io/v1
kind: RayJob
metadata: {name: a-job}
spec: {clusterSelector: {ray.io/cluster: pods}}
---
apiVersion: ray.io/v1
kind: RayCluster
metadata: {name: pods}
spec:
  headGroupSpec:
    rayStartParams: {num-cpus: "0", dashboard-host: "0.0.0.0"}
    labels: {massl-ray/max-gpus: "6"}
    template:
      metadata: {annotations: {massl-ray/usd-per-hour: "0.1"}}
      spec: {containers: [{resources: {limits: {cpu: 2, memory: 8Gi}}}]}
  workerGroupSpecs:
    - groupName: gpu
      replicas: 0
      minReplicas: 1
      maxReplicas: 3
      numOfHosts: 2
      rayStartParams: {}
      template:
        metadata:
          annotations: {massl-ray/gpu: H100, massl-ray/market: spot, massl-ray/usd-per-hour: "4", massl-ray/usd-per-hour-spot: "2"}
        spec: {containers: [{resources: {limits: {cpu: "7500m", memory: 64Gi, nvidia.com/gpu: "1"}}}]}
"""


@pytest.fixture
def read(tmp_path):
    def read(text: str) -> Cluster:
        (tmp_path / "file.yaml").write_text(text)
        return read_cluster(tmp_path / "file.yaml")

    return read


def test_launcher(read):
    cluster = read(LAUNCHER)
    assert (cluster.name, cluster.kind, cluster.max_machines) == ("mine", "launcher", 10)
    assert (cluster.max_gpus, cluster.dashboard_host) == (16, "0.0.0.0")
    assert cluster.head.cpus == 0 and cluster.head.usd_on_demand == 0.2 and not cluster.head.spot
    assert cluster.pools == (
        Pool("gpu", 1, 8, 8.0, 2, "L4", True, 1.5, 0.5, date(2026, 3, 4), 1000.0),
        Pool("cpu", 0, 4, 16.0, 0),  # one that may have no machines is left out
    )
    assert cluster.pools[0].usd_per_hour == 0.5 and cluster.head.usd_per_hour == 0.2 and cluster.pools[1].usd_per_hour is None
    assert cluster.all_gpus == 16


def test_gpus_are_bounded_by_all_machines(read):
    assert read(LAUNCHER.replace("max_workers: 10", "max_workers: 3")).all_gpus == 6
    assert read(LAUNCHER.replace("max_workers: 10\n", "")).all_gpus == 4  # Ray's own default are two machines


def test_kuberay(read):
    cluster = read(KUBERAY)
    assert (cluster.name, cluster.kind, cluster.max_machines) == ("pods", "kuberay", None)
    assert (cluster.max_gpus, cluster.dashboard_host, cluster.guarded) == (6, "0.0.0.0", False)
    assert cluster.head.cpus == 0 and cluster.head.memory_bytes == 8 * 2**30 and cluster.head.usd_on_demand == 0.1
    assert cluster.pools == (Pool("gpu", 2, 6, 7.5, 1, "H100", True, 4.0, 2.0, None, 64.0 * 2**30),)
    assert read(KUBERAY + "---\nkind: NetworkPolicy\n").guarded
    assert read(KUBERAY.replace("spec:\n  head", "spec:\n  authOptions: {mode: token}\n  head")).guarded


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("head_node_type: head", "head_node_type: boss", "head_node_type is 'boss': it must be one of head, gpu, cpu, later"),
        ("head_node_type: head", "", "head_node_type is None"),
        ("    resources: {CPU: 16}\n", "", "available_node_types.cpu.resources is missing: say how many CPU and GPU"),
        ("{CPU: 16}", "{CPU: many}", "cpu.resources.CPU is 'many', which is no number"),
        ("GPU: 2", "GPU: 2.5", "gpu.resources.GPU is 2.5, which is no whole number"),
        ("market: spot", "market: cheap", "massl-ray/market is 'cheap': it must be spot or on-demand"),
        ('"2026-03-04"', '"March"', "massl-ray/prices-of is 'March', which is no date"),
        ('"1.5"', '"1,5"', "massl-ray/usd-per-hour is '1,5', which is no number"),
        ("max_workers: 8", "max_workers: -8", "gpu.max_workers is -8, which is no number"),
        (LAUNCHER, "a: [", "is not valid YAML"),
        (LAUNCHER, "a: 1", "has neither available_node_types .* nor kind: RayCluster"),
        (LAUNCHER, "", "has neither available_node_types"),
        (LAUNCHER, KUBERAY.replace("cpu: 2,", ""), None),
        (LAUNCHER, KUBERAY.replace('cpu: "7500m",', ""), "containers.0..resources.limits.cpu is missing"),
        (LAUNCHER, KUBERAY.replace("64Gi", "64GiB"), "memory is '64GiB', which is no number"),
        (LAUNCHER, KUBERAY.split("spec:\n  head")[0] + "spec: {}", "spec.headGroupSpec is missing"),
    ],
)
def test_faults_are_sentences(read, tmp_path, old, new, words):
    assert old in LAUNCHER
    if words is None:
        read(LAUNCHER.replace(old, new))  # num-cpus says it
        return
    with pytest.raises(UserError, match=words) as raised:
        read(LAUNCHER.replace(old, new))
    assert str(tmp_path / "file.yaml") in str(raised.value) and str(raised.value).endswith(".")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_cluster(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        read_cluster(tmp_path / "bytes.yaml")


SHIPPED = sorted((Path(__file__).parents[1] / "cluster").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_files_of_cluster(path):
    """Every machine has a price of a date; GPUs have names; the head promises as many as there may be."""
    assert yaml.safe_load_all(path.read_text())
    cluster = read_cluster(path)
    for pool in (cluster.head, *cluster.pools):
        assert pool.usd_on_demand and pool.prices_of and (pool.gpu is not None) == (pool.gpus > 0)
        assert not pool.spot or (pool.usd_spot and pool.usd_spot < pool.usd_on_demand)
    assert cluster.max_gpus == cluster.all_gpus > 0
    assert cluster.head.cpus == 0 and not cluster.head.spot


def test_there_are_four_of_them():
    assert {path.stem for path in SHIPPED} >= {"aws", "azure", "gcp", "kuberay"}
