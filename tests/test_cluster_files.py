"""cluster/: Ray, the clouds and our own rules find nothing wrong with any file, and they do find what is planted.

Nothing here asks a cloud or starts Ray.
"""

import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray._private.resource_and_label_spec import ResourceAndLabelSpec
from ray._private.runtime_env import packaging
from ray.autoscaler._private.constants import LABELS_ENVIRONMENT_VARIABLE, RESOURCES_ENVIRONMENT_VARIABLE

from tests import cluster_apis
from tests.cluster_checks import FILES, ROOT, check

pytestmark = pytest.mark.cluster

LAUNCHER = ("aws.yaml", "gcp.yaml", "azure.yaml")

PLANTED = [
    # What Ray refuses.
    ("aws.yaml", "max_workers: 12", "max_worker: 12", "max_worker"),
    ("aws.yaml", "max_workers: 8\n    resources", "max_workers: many\n    resources", "'many' is not of type 'integer'"),
    ("gcp.yaml", "    min_workers: 0\n", "    minimum: 0\n", "minimum"),
    ("aws.yaml", '"CPU": 8, "GPU": 1', '"CPU": 7.5, "GPU": 1', "7.5 is not of type 'integer'"),
    ("azure.yaml", "head_node_type: head", "head_node_type: heads", "head_node_type"),
    ("azure.yaml", "  ssh_user: ubuntu\n", "  ssh_usr: ubuntu\n", "ssh_usr"),
    ("aws.yaml", "  ssh_proxy_command: >-", "  ssh_proxy: >-", "ssh_proxy"),
    ("aws.yaml", "max_workers: 12\n", "max_workers: 12\nmax_workers: 13\n", "stands twice"),
    # What Ray's providers do not read.
    ("aws.yaml", "  use_internal_ips: true", "  use_internal_ip: true", "reads no provider.use_internal_ip."),
    ("aws.yaml", "  region: us-west-2", "  regoin: us-west-2", "reads no provider.regoin"),
    ("gcp.yaml", "  project_id: ", "  project: ", "reads no provider.project."),
    ("gcp.yaml", "  use_internal_ips", "  msi_name: x\n  use_internal_ips", "Ray's gcp provider reads no provider.msi_name"),
    ("azure.yaml", "  location: eastus", "  region: eastus", "reads no provider.region"),
    ("azure.yaml", "  type: azure", "  type: aliyun", "no check for provider.type aliyun"),
    # What EC2 refuses.
    ("aws.yaml", "InstanceType: g6.2xlarge", "InstanceTyp: g6.2xlarge", 'Unknown parameter in input: "InstanceTyp"'),
    ("aws.yaml", "InstanceType: g6.2xlarge", "InstanceType: g6.2xlrge", "gpu.InstanceType: there is no g6.2xlrge"),
    ("aws.yaml", "InstanceType: g6.2xlarge", "InstanceType: [g6.2xlarge]", "Invalid type for parameter InstanceType"),
    ("aws.yaml", "Ebs: {VolumeSize: 200", "Ebs: {VolumeSise: 200", '"VolumeSise"'),
    ("aws.yaml", "VolumeType: gp3", "VolumeType: gp33", "there is no gp33"),
    ("aws.yaml", "Ebs: {VolumeSize: 200, ", "VolumeSize: 200\n          Ebs: {", 'BlockDeviceMappings[0]: "VolumeSize"'),
    ("aws.yaml", "MarketType: spot", "MarketType: sopt", "MarketType: there is no sopt"),
    ("aws.yaml", "InstanceInterruptionBehavior: terminate", "InstanceInterruptionBehavior: drain", "there is no drain"),
    ("aws.yaml", "{Name: massl-ray-worker}", "massl-ray-worker", "Invalid type for parameter IamInstanceProfile"),
    ("aws.yaml", "      SecurityGroupIds: [sg-YOURS]", "      SecurityGroupIds: sg-YOURS", "parameter SecurityGroupIds"),
    ("aws.yaml", "SubnetIds: [", "Subnets: [", '"Subnets"'),
    # What Compute Engine refuses.
    ("gcp.yaml", "            diskSizeGb: 200", "            diskSizeGB: 200", "initializeParams: it has no diskSizeGB"),
    ("gcp.yaml", "            diskSizeGb: 200", "            diskSizeGb: big", None),  # a string to the API: only it knows
    ("gcp.yaml", "provisioningModel: SPOT", "provisioningModel: SPOTT", "SPOTT is none of"),
    ("gcp.yaml", "instanceTerminationAction: DELETE", "instanceTerminationAction: DRAIN", "DRAIN is none of"),
    ("gcp.yaml", "automaticRestart: false", "automaticRestart: 'no'", "'no' is no boolean"),
    ("gcp.yaml", "      machineType: g2-standard-8", "      machine_type: g2-standard-8", "machine_type"),
    ("gcp.yaml", "provisioningModel: SPOT\n        instance", "provisioningModel: SPOT\n       instance", "no YAML"),
    ("gcp.yaml", "tags: {items: [massl-ray]}", "tags: [massl-ray]", "is no object"),
    ("gcp.yaml", "          scopes: [", "          scope: [", "serviceAccounts[0]: it has no scope"),
    # What Azure's template refuses.
    ("azure.yaml", "vmSize: Standard_NC24ads_A100_v4", "vmSise: Standard_NC24ads_A100_v4", "no parameter vmSise"),
    ("azure.yaml", "priority: Spot", "prioirty: Spot", "no parameter prioirty"),
    ("azure.yaml", "priority: Spot", "priority: spot", "none of Regular, Spot"),
    ("azure.yaml", "osDiskSize: 200", 'osDiskSize: "200"', "not of type int"),
    ("azure.yaml", 'imageSku: "2404"', "imageSku: 2404", "not of type string"),
    ("azure.yaml", "priority: Spot", "vmCount: 3\n        priority: Spot", "Ray sets vmCount itself"),
    ("azure.yaml", "      azure_arm_parameters:", "      arm_parameters:", "reads no head.arm_parameters"),
    # What KubeRay and Kubernetes refuse.
    ("kuberay.yaml", "      replicas: 0", '      replicas: "0"', "'0' is not of type 'integer'"),
    ("kuberay.yaml", "      maxReplicas: 8", "      maxReplica: 8", "maxReplica"),
    ("kuberay.yaml", "  enableInTreeAutoscaling", "  enableIntreeAutoscaling", "enableIntreeAutoscaling"),
    ("kuberay.yaml", "    version: v2", "    version: V2", "'V2' is not one of"),
    ("kuberay.yaml", "ray.io/v1\nkind: RayJob", "ray.io/v1alpha1\nkind: RayJob", "'ray.io/v1' was expected"),
    ("kuberay.yaml", "kind: RayJob", "kind: RayJobs", "neither a RayCluster nor a RayJob"),
    ("kuberay.yaml", '        num-gpus: "1"', "        num-gpus: 1", "1 is not of type 'string'"),
    ("kuberay.yaml", "    mode: token", "    mode: disabled", "'token' was expected"),
    ("kuberay.yaml", "shutdownAfterJobFinishes: false", "shutdownAfterJobFinishes: true", "False was expected"),
    ("kuberay.yaml", "            - name: ray-worker\n              image", "            - image", "'name' is a required property"),
    ("kuberay.yaml", "          tolerations:", "          toleration:", "toleration"),
    ("kuberay.yaml", "operator: Exists, effect", "operater: Exists, effect", "operater"),
    ("kuberay.yaml", "          nodeSelector:  # <- EDIT", "          nodeSelectors:", "nodeSelectors"),
    ("kuberay.yaml", "emptyDir: {medium: Memory", "emptydir: {medium: Memory", "emptydir"),
    ("kuberay.yaml", 'value: "15"', "value: 15", "15 is not of type"),
    ("kuberay.yaml", "terminationGracePeriodSeconds: 25", "terminationGracePeriodSeconds: soon", "soon"),
    # Our rules: closed to strangers.
    ("aws.yaml", "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listen on 127.0.0.1 alone"),
    ("gcp.yaml", " --dashboard-host=127.0.0.1", "", "listen on 127.0.0.1 alone"),
    ("kuberay.yaml", '      num-cpus: "0"', '      num-cpus: "0"\n      dashboard-host: "::"', "dashboard-host is unknown"),
    ("aws.yaml", "#  6.", "#  5. --cidr 0.0.0.0/0\n#  6.", "opens something to everybody"),
    ("aws.yaml", "use_internal_ips: true", "use_internal_ips: false", "public addresses"),
    ("azure.yaml", "use_internal_ips: true", "use_internal_ips: true\n  use_external_head_ip: true", "public addresses"),
    ("aws.yaml", "      SecurityGroupIds: [sg-YOURS]  # <- EDIT\n", "", "open to everybody"),
    ("aws.yaml", "      MetadataOptions: {HttpTokens: required}\n", "", "without a token"),
    ("gcp.yaml", "subnetworks/default", "subnetworks/default\n          accessConfigs: [{type: ONE_TO_ONE_NAT}]", "public address"),
    ("aws.yaml", "  cache_stopped_nodes", "  aws_credentials: {}\n  cache_stopped_nodes", "looks like a secret"),
    ("azure.yaml", "#  6.", "# password: hunter2hunter2\n#  6.", "looks like a secret"),
    ("gcp.yaml", "RAY_AUTH_MODE=token RAY_idle", "RAY_idle", "Without RAY_AUTH_MODE=token in `export RAY_idle"),
    ("aws.yaml", "    export RAY_AUTH_MODE=token;\n    setsid", "    setsid", "Without RAY_AUTH_MODE=token in `setsid"),
    ("azure.yaml", "  /home/ubuntu/.ray/auth_token: ~/.ray/auth_token\n", "", "brings the token"),
    # Our rules: how Ray is started.
    ("aws.yaml", '    resources: {"CPU": 0}', '    resources: {"CPU": 4}', "The head would compute"),
    ("gcp.yaml", " --num-cpus=0", "", "The head would compute"),
    ("kuberay.yaml", '      num-cpus: "0"', '      num-cpus: "4"', "The head would compute"),
    ("aws.yaml", "RAY_health_check_period_ms=500", "RAY_health_check_period_ms=5000", "on_ray/knobs.py says 500"),
    ("kuberay.yaml", "RAY_health_check_period_ms", "RAY_health_check_periods_ms", "on_ray/knobs.py says 500"),
    ("azure.yaml", "RAY_JOB_STOP_WAIT_TIME_S=120 ", "", "less than a minute"),
    ("gcp.yaml", "token RAY_idle_worker_killing_time_threshold_ms=600000", "token", "The workers need RAY_idle"),
    ("azure.yaml", "\n    --autoscaling-config=~/ray_bootstrap_config.yaml", "", "starts no machine"),
    ("aws.yaml", "massl_ray.on_ray.spot --cloud aws", "massl_ray.on_ray.spot --cloud gcp", "No watcher for the notices of aws"),
    ("gcp.yaml", "massl_ray.on_ray.spot", "massl_ray.on_ray.spott", "No watcher for the notices of gcp"),
    ("azure.yaml", "until python", "python", "No watcher for the notices of azure"),
    ("aws.yaml", "ray start --head", "ray start --heads", "No such option '--heads'"),
    ("aws.yaml", "ray start --address=", "ray start --adress=", "--adress"),
    ("gcp.yaml", "do sleep 5; done'", "do sleep 5; done", "bash cannot read"),
    ("aws.yaml", "  - test -x ~/massl-ray-env/bin/pip", "  - '# test'\n  - test -x ~/massl-ray-env/bin/pip", "bash cannot read"),
    ("aws.yaml", "&& pip install -c constraints.txt .", "&& pip install .", "at its pins"),
    ("aws.yaml", "constraints.txt boto3\n\n", "constraints.txt\n\n", "do not install boto3"),
    ("azure.yaml", "    azure-mgmt-resource==24.0.0", "    azure-mgmt-resource==24.1.0", "azure-mgmt-resource==24.0.0"),
    ("gcp.yaml", "massl-ray/README.md: README.md", "massl-ray/README.md: README.rst", "README.rst, which is not in the clone"),
    ("kuberay.yaml", "terminationGracePeriodSeconds: 25", "terminationGracePeriodSeconds: 15", "killed while it drains"),
    ("kuberay.yaml", "restartPolicy: Never", "restartPolicy: Always", "restartPolicy has to be Never"),
    ("kuberay.yaml", "              volumeMounts:\n                - {name: shm, mountPath: /dev/shm}\n", "", "64 MB"),
    ("kuberay.yaml", "        num-gpus:", "        num_gpus:", "num_gpus is unknown"),
    ("kuberay.yaml", '        num-gpus: "1"', '        num-gpus: "2"', "not the limit of nvidia.com/gpu"),
    ("kuberay.yaml", 'rayVersion: "2.60.0"', 'rayVersion: "2.59.0"', "rayVersion is 2.59.0"),
    ("kuberay.yaml", "    ray.io/cluster: massl-ray", "    ray.io/cluster: mine", "does not select"),
    ("kuberay.yaml", "YOUR-REGISTRY/massl-ray:0.1.0", "YOUR-REGISTRY/massl-ray:0.2.0", "different images"),
    ("kuberay.yaml", "annotations: *gpu", "annotations: *head", "labels and annotations differ"),
    ("kuberay.yaml", "          serviceAccountName: massl-ray  # <- EDIT\n", "", "no serviceAccountName"),
    (
        "gcp.yaml",
        "      machineType: e2-standard-4",
        "      scheduling: {provisioningModel: SPOT}\n      machineType: e2",
        "head is on spot",
    ),
    # Our rules: what a file says of itself.
    ("aws.yaml", "    max_workers: 8\n", "    max_workers: 6\n", "max_workers is 12, and the pools have 10"),
    ("azure.yaml", 'max-gpus: "4"', 'max-gpus: "8"', "max-gpus has to be 4"),
    ("kuberay.yaml", "maxReplicas: 8", "maxReplicas: 16", "max-gpus has to be 16"),
    ("gcp.yaml", 'usd-per-hour: "0.8536"', 'usd-per-hour: "0.9536"', "9.91 on demand"),
    ("kuberay.yaml", 'usd-per-hour-spot: "0.34"', 'usd-per-hour-spot: "0.44"', "4.49 on spot"),
    ("aws.yaml", '      massl-ray/usd-per-hour-spot: "0.45"', "      massl-ray/spot: cheap", "usd-per-hour-spot is no price"),
    ("aws.yaml", 'usd-per-hour: "0.9776"', 'usd-per-hour: "about 1"', "Invalid label"),
    ("gcp.yaml", 'prices-of: "2025-06-01"', 'prices-of: "2999-06-01"', "no date of the past"),
    ("gcp.yaml", "massl-ray/gpu: L4", "massl-ray/gpus: L4", "nobody reads the label massl-ray/gpus"),
    ("azure.yaml", "      massl-ray/gpu: A100-80GB\n", "", "which GPU"),
    ("azure.yaml", "      massl-ray/market: spot", "      massl-ray/market: on-demand", "its machines are not"),
    ("gcp.yaml", "provisioningModel: SPOT", "provisioningModel: STANDARD", "its machines are not"),
    ("gcp.yaml", '"CPU": 16', '"CPU": 32', "has 16 CPUs (e2-standard-16)"),
    ("gcp.yaml", "diskType: zones/us-central1-a", "diskType: zones/us-central1-b", "another zone"),
    ("gcp.yaml", "regions/us-central1/", "regions/us-east1/", "another project or region"),
    ("aws.yaml", "--region us-west-2", "--region us-east-1", "another region"),
    ("gcp.yaml", "--zone=us-central1-a", "--zone=us-central1-b", "another project or zone"),
    ("aws.yaml", "sg-YOURS]  # <- EDIT", "sg-YOURS]", "has no mark"),
    ("aws.yaml", "--preset vit_small", "--preset vit_smal", "massl_ray.train refuses"),
    ("kuberay.yaml", "    --data.source gs://", "    --data.sorce gs://", "massl_ray.train refuses"),
    ("gcp.yaml", "ray job submit --address", "ray job submit --adress", "No such option"),
    ("azure.yaml", "ray job stop", "ray jobs stop", "Ray has no command"),
]


@pytest.mark.parametrize("name", FILES)
def test_nothing_is_wrong_with(name):
    assert check(name, FILES[name]) == []


def test_there_is_a_file_for_each_cloud_and_for_kubernetes():
    assert set(FILES) == {*LAUNCHER, "kuberay.yaml"}


@pytest.mark.parametrize(("name", "old", "new", "said"), PLANTED)
def test_planted(name, old, new, said):
    """One mistake in an otherwise good file is found, and named."""
    assert old in FILES[name]
    problems = check(name, FILES[name].replace(old, new, 1))
    assert (said is None and not problems) or any(said in problem for problem in problems), problems


@pytest.mark.parametrize("name", LAUNCHER)
def test_labels_and_resources_reach_the_running_node(name, monkeypatch):
    """`ray up` and the autoscaler hand a node type's labels and resources to `ray start` in these variables."""
    for kind in yaml.safe_load(FILES[name])["available_node_types"].values():
        monkeypatch.setenv(LABELS_ENVIRONMENT_VARIABLE, json.dumps(kind["labels"]))
        monkeypatch.setenv(RESOURCES_ENVIRONMENT_VARIABLE, json.dumps(kind["resources"]))
        spec = ResourceAndLabelSpec(num_cpus=1).resolve(is_head=False, node_ip_address="127.0.0.1")
        assert kind["labels"].items() <= spec.labels.items()
        assert spec.num_cpus == kind["resources"]["CPU"] and spec.num_gpus == kind["resources"].get("GPU", 0)


@pytest.mark.skipif(shutil.which("setsid") is None or shutil.which("flock") is None, reason="the machines of the files run Linux")
@pytest.mark.parametrize("name", LAUNCHER)
def test_the_watcher_is_started_again_when_it_fails_and_only_once(name, tmp_path):
    """The very command of the file, with a watcher that fails twice, and then drains."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\nsleep 0.3\ntest $(grep -c massl_ray spot.log) -ge 3\n')
    python.chmod(0o755)
    command = (
        yaml.safe_load(FILES[name])["worker_start_ray_commands"][-1]
        .replace("/tmp/massl-ray-spot", "spot")
        .replace("sleep 5", "true")
    )
    for _ in range(2):  # `ray up` runs it again
        subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=True, timeout=10
        )
    wait_until(lambda: (tmp_path / "spot.log").read_text().count("\n") >= 3)
    wait_until(lambda: subprocess.run(["flock", "-n", "spot.lock", "true"], cwd=tmp_path).returncode == 0)  # the loop has ended
    cloud = name.removesuffix(".yaml")
    assert (tmp_path / "spot.log").read_text().splitlines() == [f"-m massl_ray.on_ray.spot --cloud {cloud}"] * 3


def wait_until(done: Callable[[], bool], most_s: float = 20.0) -> None:
    ends = time.monotonic() + most_s
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.1)


def test_an_upload_carries_the_package_and_little_else(tmp_path):
    """`ray job submit --working-dir .`, packed by Ray itself from a clone in which one has worked."""
    needed = {"massl_ray/train.py", "massl_ray/on_ray/crew.py", "massl_ray/presets/demo.toml", "sweeps/memory.toml", "mine.toml"}
    useless = {".venv/bin/python", ".git/config", "runs/mine/checkpoints/step_1/state.safetensors", "docs/demo.png", "build/a.py"}
    useless |= {"tests/test_x.py", "benchmarks/RESULTS.md", "massl_ray/__pycache__/a.pyc", ".pytest_cache/a", "x.egg-info/a"}
    for path in needed | useless:
        (tmp_path / "clone" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / path).write_text("x")
    for path in (".rayignore", ".gitignore"):
        (tmp_path / "clone" / path).write_bytes((ROOT / path).read_bytes())
    assert packed(tmp_path / "clone", tmp_path / "upload.zip").keys() == needed


def test_an_upload_of_this_clone_is_small(tmp_path):
    sizes = packed(ROOT, tmp_path / "upload.zip")
    assert {"massl_ray/train.py", "massl_ray/presets/vit_small.toml", "pyproject.toml"} <= sizes.keys()
    assert not {name.split("/")[0] for name in sizes} & {".venv", ".git", "runs", "tests", "docs", "build"}
    ours = [size for name, size in sizes.items() if "/" not in name or name.startswith(("massl_ray/", "sweeps/"))]
    assert sum(ours) < 5e6


def packed(folder: Path, archive: Path) -> dict[str, int]:
    """What Ray would send, and the size of each file."""
    packaging._zip_files(str(folder), [], str(archive), include_gitignore=True)
    return {entry.filename: entry.file_size for entry in zipfile.ZipFile(archive).infolist()}


def test_provider_keys_are_read_off_rays_source():
    """Should Ray's source look otherwise one day, this says so before every key is refused."""
    assert {"region", "use_internal_ips", "cache_stopped_nodes"} <= cluster_apis.provider_keys("aws")
    assert {"project_id", "availability_zone"} <= cluster_apis.provider_keys("gcp")
    assert {"location", "msi_name", "subnet_mask"} <= cluster_apis.provider_keys("azure")
    assert "SubnetIds" in cluster_apis.popped(cluster_apis.PROVIDERS["aws"] / "node_provider.py", "conf")
    parameters, set_by_ray = cluster_apis.azure_parameters()
    assert {"vmSize", "priority"} <= parameters.keys() and {"vmName", "publicKey"} <= set_by_ray
