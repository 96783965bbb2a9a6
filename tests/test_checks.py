"""What settings and cluster files give away."""

from dataclasses import replace
from datetime import date

import pytest

from massl_ray.config import load, resolve
from massl_ray.planning.checks import Finding, check_cluster, check_settings, worst_last
from massl_ray.planning.cluster_file import Cluster, Pool

TODAY = date(2026, 6, 1)
HEAD = Pool("head", 1, 1, 0, 0, usd_on_demand=0.5, prices_of=date(2026, 5, 1))
GPU = Pool("gpu", 0, 4, 8, 2, "L4", True, 4.0, 1.0, date(2026, 5, 1))
CLUSTER = Cluster("it", "launcher", HEAD, (GPU,), 4, 8, "127.0.0.1")
FAR = "--run.dir s3://bucket/run"


def settings(flags: str, images: int = 20_000) -> list[Finding]:
    config = load(["--config", "/dev/null", "--memory.size", "65536", *flags.split()])
    return check_settings(config, resolve(config, images))


def cluster(changed: Cluster, flags: str = "") -> list[Finding]:
    return check_cluster(changed, load(["--config", "/dev/null", *f"{FAR} {flags}".split()]), TODAY)


@pytest.mark.parametrize("preset", ["vit_small", "vit_base"])
def test_the_recipes_are_well_on_their_data_set(preset):
    config = load(["--preset", preset])
    (finding,) = check_settings(config, resolve(config, 1_281_167))
    assert finding.severity == "ok" and finding.remedy is None


def test_the_demo_has_only_a_note():
    config = load([])
    (finding,) = check_settings(config, resolve(config, 3149))
    assert finding.severity == "note" and "holds each of the 3,149 images 2.6 times" in finding.sentence


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--memory.size 512", "memory.size 512 is smaller than a batch of 1,024"),
        ("--memory.size 16384", "The memory is 16.0 batches deep"),
        ("--memory.size 200000", "holds each of the 20,000 images 10.0 times"),
        ("--train.global_batch_size 32768 --memory.size 2000000", "A batch of 32,768 is larger than the data set of 20,000"),
        ("--memory.num_blocks 1", "reads the whole memory at once"),
        ("--memory.num_blocks 1024", "A block has only 64 slots"),
        ("--loss.teacher_temp 0.1", "temperature 0.1 is not below the student's 0.1"),
        ("--loss.teacher_temp_start 0.2", "temperature 0.2 is not below the student's 0.1"),
        ("--optim.teacher_momentum 0", "a copy of the student"),
        ("--head.batch_norm true --train.micro_batch_size 4", "micro-batches of only 4 images"),
        ("--train.steps 10", "The run ends after 10,240 images, before the memory of 65,536 slots is filled"),
        ("--optim.warmup_epochs 500", "takes 62% of the run"),
    ],
)
def test_settings_that_train_to_nothing(flags, words):
    found = [finding for finding in settings(flags) if words in finding.sentence]
    assert len(found) == 1 and found[0].severity == "warning" and found[0].remedy
    assert words not in " ".join(finding.sentence for finding in settings(""))


def test_a_cluster_that_is_well():
    (finding,) = cluster(CLUSTER)
    assert finding.severity == "ok"
    assert check_cluster(Cluster("this machine", "machine", Pool("x", 1, 1, 2, 0), ()), load([]), TODAY) == []


@pytest.mark.parametrize(
    ("change", "flags", "severity", "words"),
    [
        ({"max_gpus": 9}, "", "error", "max-gpus is 9, but it has at most 8 GPUs"),
        ({"max_machines": 3}, "", "error", "max-gpus is 8, but it has at most 6 GPUs"),
        ({"max_gpus": 4}, "", "warning", "max-gpus is 4, but it has at most 8 GPUs"),
        ({"max_gpus": None}, "", "note", "does not say massl-ray/max-gpus"),
        ({"pools": (replace(GPU, gpu="L5"),)}, "", "warning", "Pool gpu has GPUs 'L5', which massl-ray does not know"),
        ({"pools": (replace(GPU, gpu=None),)}, "", "warning", "Pool gpu does not say which GPU it has"),
        ({}, "--elastic.min_workers 9 --elastic.max_workers 9", "error", "min_workers is 9, but it holds at most 8"),
        ({}, "--elastic.max_workers 9", "note", "it holds at most 8: no more are asked for"),
        ({}, "--elastic.max_workers 9 --train.device cpu", "error", "Ray's autoscaler brings nothing"),
        ({"pools": (replace(GPU, gpus=0, gpu=None),), "max_gpus": 0}, "--train.device cuda", "error", "it has no GPUs"),
        ({"head": replace(HEAD, usd_on_demand=None)}, "", "note", "it has no prices for head"),
        ({"head": replace(HEAD, prices_of=date(2025, 11, 29))}, "", "note", "are of 2025-11-29, more than half a year ago"),
        ({"dashboard_host": "0.0.0.0"}, "", "error", "listen on 0.0.0.0: whoever reaches its port 8265 can run anything"),
        ({"dashboard_host": "::"}, "", "error", "listen on ::"),
        ({"dashboard_host": "0.0.0.0", "kind": "kuberay"}, "", "warning", "inside Kubernetes can run anything"),
        ({}, "--run.dir runs/mine", "warning", "run.dir runs/mine is a path: on it it lies on the head's disk"),
        ({}, "--data.source /images", "warning", "data.source /images is a path: every machine"),
    ],
)
def test_a_cluster_that_is_not(change, flags, severity, words):
    found = cluster(replace(CLUSTER, **change), flags)
    matching = [finding for finding in found if words in finding.sentence]
    assert len(matching) == 1 and matching[0].severity == severity and matching[0].remedy, found


def test_what_is_no_fault():
    assert [finding.severity for finding in cluster(replace(CLUSTER, dashboard_host="0.0.0.0", kind="kuberay", guarded=True))] == [
        "ok"
    ]
    recent = replace(CLUSTER, head=replace(HEAD, prices_of=date(2025, 12, 1)))
    assert [finding.severity for finding in cluster(recent)] == ["ok"]  # 182 days


def test_the_worst_come_last():
    findings = [
        Finding("a", "error", ""),
        Finding("b", "ok", ""),
        Finding("c", "warning", ""),
        Finding("d", "note", ""),
        Finding("e", "ok", ""),
    ]
    assert [finding.check for finding in worst_last(findings)] == ["b", "e", "d", "c", "a"]
