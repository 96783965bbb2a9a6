"""What can be said of the files of cluster/ without a cloud: `check(name, text)` returns sentences, none for a good file.

Whether Ray and the clouds take a file is in cluster_apis.py; here are our own rules: nothing is open to strangers, the head
computes nothing, every spot machine watches for its notice, and what a file says of itself is true.
"""

import datetime
import functools
import re
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import ray
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.scripts.scripts import cli

from massl_ray.config import load
from massl_ray.errors import UserError
from massl_ray.on_ray.clouds import SOURCES
from massl_ray.on_ray.knobs import HEAD
from tests import cluster_apis as apis

ROOT = Path(__file__).parents[1]
FILES = {path.name: path.read_text() for path in sorted((ROOT / "cluster").glob("*.yaml"))}
CLOUD = {"aws": apis.ec2_refuses, "gcp": apis.compute_engine_refuses, "azure": apis.azure_refuses}
FACT = "massl-ray/"
FACTS = {f"{FACT}{fact}" for fact in ("max-gpus", "market", "gpu", "usd-per-hour", "usd-per-hour-spot", "prices-of")}
IDLE = "RAY_idle_worker_killing_time_threshold_ms"
WATCHER = r"setsid -f flock -n \S+ sh -c 'until python -m massl_ray\.on_ray\.spot --cloud %s; do sleep \d+; done' >> \S+\.log"
SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|\b[0-9a-f]{32,}\b|(?i:aws_credentials|gcp_credentials|private_key|account_?key|sas_?token)\b"
    r"|(?i:password|secret|token|api_?key)['\"]?\s*[:=]\s*['\"]?[\w/+-]{12,}"
)


@dataclass(frozen=True)
class Pool:
    """Machines of one kind, however the file writes them."""

    name: str
    facts: dict[str, str]
    most: int
    resources: dict[str, float]
    spot: bool
    is_head: bool


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"{twice.pop()} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def check(name: str, text: str) -> list[str]:
    """All that is wrong with a file of cluster/."""
    try:
        documents = list(yaml.load_all(text, StrictLoader))
    except yaml.YAMLError as error:
        return [f"{name} is no YAML: {error}"]
    if "provider" not in documents[0]:
        problems, pools = kuberay_problems(documents), kuberay_pools
    else:
        problems, pools = launcher_problems(documents[0]), launcher_pools
    if not problems:  # what follows reads fields that are known to be there
        problems = [*pool_problems(pools(documents[0])), *cost_problems(text, pools(documents[0])), *text_problems(text)]
    return problems


def launcher_problems(config: dict[str, Any]) -> list[str]:
    """Of a file for `ray up`: first what Ray and the cloud refuse, then our rules."""
    kind = config["provider"].get("type")
    if kind not in CLOUD:
        return [f"There is no check for provider.type {kind}."]
    refused = [*apis.ray_refuses(config), *apis.unknown_provider_keys(config), *CLOUD[kind](config)]
    return refused or [*network_problems(config), *place_problems(config), *start_problems(config), *setup_problems(config)]


def launcher_pools(config: dict[str, Any]) -> list[Pool]:
    def is_spot(node: dict[str, Any]) -> bool:
        return "spot" in (
            str(node.get("InstanceMarketOptions", {}).get("MarketType")).lower(),
            str(node.get("scheduling", {}).get("provisioningModel")).lower(),
            str(node.get("azure_arm_parameters", {}).get("priority")).lower(),
        )

    head = config["head_node_type"]
    return [
        Pool(
            name, kind.get("labels", {}), kind.get("max_workers", 0), kind["resources"], is_spot(kind["node_config"]), name == head
        )
        for name, kind in config["available_node_types"].items()
    ]


def network_problems(config: dict[str, Any]) -> Iterator[str]:
    """Nothing may be reached from outside, unless the user opens it."""
    provider = config["provider"]
    if provider.get("use_internal_ips") is not True or provider.get("use_external_head_ip"):
        yield "Machines get public addresses: set use_internal_ips to true, and no use_external_head_ip."
    for name, node in apis.node_configs(config):
        if provider["type"] == "aws" and not node.get("SecurityGroupIds"):
            yield f"{name} has no SecurityGroupIds: Ray would make a group whose SSH is open to everybody."
        if provider["type"] == "aws" and node.get("MetadataOptions", {}).get("HttpTokens") != "required":
            yield f"{name} answers metadata requests without a token: set MetadataOptions.HttpTokens to required."
        if any("accessConfigs" in interface for interface in node.get("networkInterfaces", [{"accessConfigs": 0}])):
            if provider["type"] == "gcp":
                yield f"{name} gets a public address: give networkInterfaces without accessConfigs."


def place_problems(config: dict[str, Any]) -> Iterator[str]:
    """Names of regions and zones, and numbers of CPUs, that a file has to repeat."""
    provider = config["provider"]
    proxy = config["auth"].get("ssh_proxy_command", "")
    if provider["type"] == "aws" and "--region" in proxy and f"--region {provider['region']} " not in proxy:
        yield f"auth.ssh_proxy_command is of another region than {provider['region']}."
    if (
        provider["type"] == "gcp"
        and proxy
        and f"--project={provider['project_id']} --zone={provider['availability_zone']}" not in proxy
    ):
        yield f"auth.ssh_proxy_command is of another project or zone than {provider['availability_zone']}."
    for name, node in apis.node_configs(config):
        for disk in node.get("disks", []):
            if not disk["initializeParams"]["diskType"].startswith(f"zones/{provider['availability_zone']}/"):
                yield f"{name}: diskType is of another zone than {provider['availability_zone']}."
        for interface in node.get("networkInterfaces", []):
            if not interface["subnetwork"].startswith(f"projects/{provider['project_id']}/regions/{provider['region']}/"):
                yield f"{name}: subnetwork is of another project or region than {provider['region']}."
        size = node.get("machineType") or node.get("azure_arm_parameters", {}).get("vmSize", "")
        cpus = re.search(r"^Standard_[A-Z]+(\d+)|-(\d+)$", size)
        given = config["available_node_types"][name]["resources"].get("CPU")
        if cpus and name != config["head_node_type"] and int(cpus[1] or cpus[2]) != given:
            yield f"{name} has {cpus[1] or cpus[2]} CPUs ({size}) and not the {given} of its resources."
    most = sum(kind.get("max_workers", 0) for kind in config["available_node_types"].values())
    if config["max_workers"] != most:
        yield f"max_workers is {config['max_workers']}, and the pools have {most}."


def start_problems(config: dict[str, Any]) -> Iterator[str]:
    """How Ray and the watcher are started."""
    head, worker = "\n".join(config["head_start_ray_commands"]), "\n".join(config["worker_start_ray_commands"])
    cloud = config["provider"]["type"]
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        if re.search(r"ray start|massl_ray", command) and not re.search(r"export (\w+=\S+ )*RAY_AUTH_MODE=token\b", command):
            yield f"Without RAY_AUTH_MODE=token in {shorten(command)}"
    yield from environment_problems(dict(re.findall(r"\b(RAY_\w+)=(\S+?);?(?=\s|$)", head)), of="the head")
    if config["available_node_types"][config["head_node_type"]]["resources"].get("CPU") != 0 or "--num-cpus=0" not in head:
        yield "The head would compute: give it no CPU, in resources and with --num-cpus=0."
    if "--dashboard-host=127.0.0.1" not in head:
        yield "The dashboard has to listen on 127.0.0.1 alone (--dashboard-host)."
    if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in head:
        yield "Without --autoscaling-config the head starts no machine."
    if f"{IDLE}={HEAD['idle_worker_killing_time_threshold_ms']}" not in worker:
        yield f"The workers need {IDLE}, too: each machine reads its own."
    if any(pool.spot for pool in launcher_pools(config)) and not (cloud in SOURCES and re.search(WATCHER % cloud, worker)):
        yield f"No watcher for the notices of {cloud}, started again when it fails, with a log, in worker_start_ray_commands."


def environment_problems(environment: dict[str, str], of: str) -> Iterator[str]:
    """Of the head: fast detection of lost machines, and time for the last checkpoint."""
    wanted = {f"RAY_{name}": str(value) for name, value in HEAD.items()} | {"RAY_TRAIN_ENABLE_STATE_TRACKING": "1"}
    for name, value in wanted.items():
        if environment.get(name) != value:
            yield f"{name} of {of} is {environment.get(name)}; on_ray/knobs.py says {value}."
    if int(environment.get("RAY_JOB_STOP_WAIT_TIME_S", 3)) < 60:
        yield f"RAY_JOB_STOP_WAIT_TIME_S of {of} leaves a run less than a minute for its last checkpoint."


def setup_problems(config: dict[str, Any]) -> Iterator[str]:
    """What is copied and run on a new machine."""
    for key, value in config.items():
        for command in value if key.endswith("_commands") else []:
            if complaint := shell_complaint(command):
                yield f"bash cannot read {shorten(command)}: {complaint}"
            yield from ray_command_problems(command)
    mounts = config.get("file_mounts", {})
    if mounts.get("/home/ubuntu/.ray/auth_token") != "~/.ray/auth_token":
        yield "No file_mount brings the token to the machines."
    for local in mounts.values():
        if not local.startswith("~") and not (ROOT / local).exists():
            yield f"file_mounts copies {local}, which is not in the clone."
    if not any("pip install -c constraints.txt" in command for command in config.get("setup_commands", [])):
        yield "setup_commands do not install the package at its pins."
    defaults = yaml.safe_load((apis.AUTOSCALER / config["provider"]["type"] / "defaults.yaml").read_text())["head_setup_commands"]
    for wanted in re.findall(r"(?<=\s)'?([a-z][\w-]+)(==[\w.]+)?", " ".join(defaults).split("#")[0].replace("pip install", "")):
        package = wanted[0] + (wanted[1] if config["provider"]["type"] == "azure" else "")
        if not re.search(rf"\s{re.escape(package)}(\s|$)", " ".join(config.get("head_setup_commands", []))):
            yield f"head_setup_commands do not install {package}, which Ray's own default does."


@functools.cache
def shell_complaint(command: str) -> str:
    """Ray runs a command inside parentheses, so a comment at its end would swallow one."""
    return subprocess.run(["bash", "-n"], input=f"true && ({command})", capture_output=True, text=True).stderr.strip()


def kuberay_problems(documents: list[dict[str, Any]]) -> list[str]:
    """Of a file for KubeRay: first what KubeRay and Kubernetes refuse, then our rules."""
    if refused := apis.kuberay_refuses(documents):
        return refused
    if [document["kind"] for document in documents] != ["RayCluster", "RayJob"]:
        return ["The file has to hold a RayCluster and a RayJob."]
    cluster, job = documents
    problems = [problem for group in kuberay_groups(cluster) for problem in group_problems(group)]
    head = cluster["spec"]["headGroupSpec"]
    environment = {item["name"]: item.get("value", "") for item in container(head).get("env", [])}
    problems += environment_problems(environment, of="the head")
    if cluster["spec"]["rayVersion"] != ray.__version__:
        problems.append(f"rayVersion is {cluster['spec']['rayVersion']}, and the package needs {ray.__version__}.")
    if not cluster["spec"].get("enableInTreeAutoscaling") or cluster["spec"].get("autoscalerOptions", {}).get("version") != "v2":
        problems.append("The autoscaler, version v2, is not switched on.")
    if head["rayStartParams"].get("num-cpus") != "0":
        problems.append('The head would compute: give it num-cpus "0".')
    if job["spec"]["clusterSelector"] != {"ray.io/cluster": cluster["metadata"]["name"]}:
        problems.append("The RayJob does not select the RayCluster of this file.")
    if len({container(group)["image"] for group in kuberay_groups(cluster)}) > 1:
        problems.append("The groups have different images.")
    return problems


def kuberay_groups(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [cluster["spec"]["headGroupSpec"], *cluster["spec"].get("workerGroupSpecs", [])]


def container(group: dict[str, Any]) -> dict[str, Any]:
    return group["template"]["spec"]["containers"][0]


def group_problems(group: dict[str, Any]) -> Iterator[str]:
    """Of one group of pods."""
    name, parameters, pod = group.get("groupName", "head"), group["rayStartParams"], group["template"]["spec"]
    known = {option[2:] for parameter in cli.commands["start"].params for option in parameter.opts}
    for key in parameters.keys() - (known - {"labels", "dashboard-host"}):
        yield f"{name}: rayStartParams.{key} is unknown to `ray start`, or set by KubeRay itself."
    if group.get("labels", {}) != (group["template"].get("metadata") or {}).get("annotations", {}):
        yield f"{name}: labels and annotations differ."
    if pod.get("restartPolicy") != "Never":
        yield f"{name}: restartPolicy has to be Never with autoscaler v2."
    if not pod.get("serviceAccountName"):
        yield f"{name} has no serviceAccountName for the bucket."
    if "/dev/shm" not in {mount["mountPath"] for mount in container(group).get("volumeMounts", [])}:
        yield f"{name} has no /dev/shm of its own: Kubernetes gives 64 MB."
    limits = container(group).get("resources", {}).get("limits", {})
    if str(limits.get("nvidia.com/gpu", "0")) != parameters.get("num-gpus", "0"):
        yield f"{name}: num-gpus is not the limit of nvidia.com/gpu."
    if group.get("minReplicas", 0) > group.get("maxReplicas", 0):
        yield f"{name}: minReplicas is more than maxReplicas."
    if name != "head":
        environment = {item["name"]: item.get("value") for item in container(group).get("env", [])}
        if environment.get(IDLE) != str(HEAD["idle_worker_killing_time_threshold_ms"]):
            yield f"{name} needs {IDLE}, too: each machine reads its own."
        drain = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
        if pod.get("terminationGracePeriodSeconds", 30) < drain + 5:
            yield f"{name} would be killed while it drains: terminationGracePeriodSeconds has to be {drain + 5:.0f} or more."


def kuberay_pools(cluster: dict[str, Any]) -> list[Pool]:
    pools = []
    for group in kuberay_groups(cluster):
        spot = any("spot" in f"{key} {value}".lower() for key, value in group["template"]["spec"].get("nodeSelector", {}).items())
        resources = {"CPU": float(group["rayStartParams"]["num-cpus"]), "GPU": float(group["rayStartParams"].get("num-gpus", 0))}
        name, most = group.get("groupName", "head"), group.get("maxReplicas", 0)
        pools.append(Pool(name, group.get("labels", {}), most, resources, spot, name == "head"))
    return pools


def pool_problems(pools: list[Pool]) -> Iterator[str]:
    """The facts that the plan and the trainer read."""
    for pool in pools:
        try:
            validate_node_label_syntax(pool.facts)
        except ValueError as error:
            yield f"{pool.name}: {error}"
        if pool.facts.get(f"{FACT}market") != ("spot" if pool.spot else "on-demand"):
            yield f"{pool.name}: the label {FACT}market is {pool.facts.get(f'{FACT}market')}, which its machines are not."
        for price in [f"{FACT}usd-per-hour", *([f"{FACT}usd-per-hour-spot"] if pool.spot else [])]:
            if not re.fullmatch(r"\d+(\.\d+)?", pool.facts.get(price, "")):
                yield f"{pool.name}: the label {price} is no price."
        if not is_past_date(pool.facts.get(f"{FACT}prices-of", "")):
            yield f"{pool.name}: the label {FACT}prices-of is no date of the past, written 2025-12-31."
        if pool.resources.get("GPU") and not pool.facts.get(f"{FACT}gpu"):
            yield f"{pool.name}: no label {FACT}gpu says which GPU."
        unknown = set(pool.facts) - {
            FACT + fact for fact in ("max-gpus market usd-per-hour usd-per-hour-spot prices-of gpu".split())
        }
        if unknown:
            yield f"{pool.name}: nobody reads the label {unknown.pop()}."
        if pool.is_head and pool.spot:
            yield "The head is on spot: with it the command and the newest copy of the state would go."
    most = int(sum(pool.most * pool.resources.get("GPU", 0) for pool in pools))
    if [pool.facts.get(f"{FACT}max-gpus") for pool in pools if pool.is_head] != [str(most)]:
        yield f"The head's label {FACT}max-gpus has to be {most}, the GPUs of all pools."


def is_past_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text) <= datetime.date.today()
    except ValueError:
        return False


def cost_problems(text: str, pools: list[Pool]) -> Iterator[str]:
    """The comment that says what the cluster costs, against the labels."""
    workers = [pool for pool in pools if not pool.is_head]
    head = sum(price(pool) for pool in pools if pool.is_head)
    cheap = head + sum(pool.most * price(pool, "-spot" if pool.spot else "") for pool in workers)
    dear = head + sum(pool.most * price(pool) for pool in workers)
    comment = re.sub(r"\n#\s*", " ", text.split("\n\n")[0])
    said = re.search(r"list prices of (\S+) in .*? (\d+\.\d\d) idle .*? (\d+\.\d\d) with all .*? (\d+\.\d\d) with all", comment)
    dates = {pool.facts.get(f"{FACT}prices-of") for pool in pools}
    if said is None or dates != {said[1]}:
        yield "The comment gives no cost of the date of the labels."
    elif said.groups()[1:] != (f"{head:.2f}", f"{cheap:.2f}", f"{dear:.2f}"):
        yield f"By its labels the cluster costs {head:.2f} idle, {cheap:.2f} on spot, {dear:.2f} on demand; the comment differs."


def price(pool: Pool, suffix: str = "") -> float:
    try:
        return float(pool.facts.get(f"{FACT}usd-per-hour{suffix}", "nan"))
    except ValueError:  # pool_problems says so
        return float("nan")


def text_problems(text: str) -> Iterator[str]:
    """What a reader sees: commands in comments that exist, fields that are marked, and nothing that should not be there."""
    for number, line in enumerate(text.splitlines(), 1):
        if "0.0.0.0" in line:
            yield f"Line {number} opens something to everybody (0.0.0.0)."
        if SECRETS.search(line.replace("ssh_private_key", "")):
            yield f"Line {number} looks like a secret."
        if "YOUR" in line and not line.startswith("#") and "# <- EDIT" not in line:
            yield f"Line {number} has to be edited, and has no mark for it."
    commands = [re.sub(r"^#\s*|\s+#.*$", "", line).strip() for line in joined_lines(text) if re.match(r"#\s{5,}", line)]
    entrypoints = re.findall(r"entrypoint: >-\n((?:    .+\n)+)", text)
    for command in [*commands, *entrypoints]:
        yield from ray_command_problems(command)
        if "massl_ray.train" in command:
            yield from train_problems(command.split("massl_ray.train", 1)[1])
    if not any("massl_ray.train" in command for command in commands):
        yield "No comment says how to train."


def joined_lines(text: str) -> list[str]:
    return re.sub(r"\\\n#\s*", "", text).splitlines()


def train_problems(arguments: str) -> Iterator[str]:
    try:
        load(shlex.split(arguments))
    except UserError as error:
        yield f"massl_ray.train refuses {' '.join(arguments.split())}: {error}"


def ray_command_problems(command: str) -> Iterator[str]:
    """`ray ...` commands, parsed by Ray's own command line and not run."""
    for part in re.split(r";|&&|\|\|", command):
        words = shlex.split(part.strip()) if part.strip().startswith("ray ") else []
        group: Any = cli
        while len(words) > 1 and isinstance(group, click.Group):
            words = words[1:]
            if words[0] not in group.commands:
                yield f"Ray has no command {shorten(part)}"
                return
            group = group.commands[words[0]]
        try:
            if words:
                group.make_context(words[0], words[1:])
        except click.ClickException as error:
            yield f"Ray refuses {shorten(part)}: {error.format_message()}"


def shorten(command: str) -> str:
    words = " ".join(command.split())
    return f"`{words[:80]}{'...' if len(words) > 80 else ''}`"
