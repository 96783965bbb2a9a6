"""What Ray, EC2, Compute Engine, Azure's template and KubeRay take, read off what is installed: no cloud is asked.

Every function returns sentences, none when it has nothing to say. They say that a field exists and holds the right kind of value;
whether an image, a network or a quota is there, only the cloud knows.
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import googleapiclient.discovery_cache
import jsonschema
import kubernetes_validate
import ray.autoscaler
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

AUTOSCALER = Path(ray.autoscaler.__file__).parent
PROVIDERS = {"aws": AUTOSCALER / "_private/aws", "gcp": AUTOSCALER / "_private/gcp", "azure": AUTOSCALER / "_private/_azure"}
KUBERAY = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
AZURE_KINDS = {"string": str, "securestring": str, "int": int, "bool": bool, "object": dict, "array": list}
AZURE_CHOICES = {"priority": {"Regular", "Spot"}, "evictionPolicy": {"Delete", "Deallocate"}}  # the template takes any string


def ray_refuses(config: dict[str, Any]) -> list[str]:
    """Ray's own check: keys at the top and of node types, and what they hold."""
    try:
        validate_config(prepare_config(config))
    except jsonschema.ValidationError as error:
        return [f"Ray refuses {'.'.join(map(str, error.absolute_path)) or 'the file'}: {error.message}."]
    except Exception as error:
        return [f"Ray refuses the file: {type(error).__name__}: {error}"]
    return []


def unknown_provider_keys(config: dict[str, Any]) -> list[str]:
    """Ray lets any key of `provider` pass, and reads only these."""
    kind = config["provider"]["type"]
    return [f"Ray's {kind} provider reads no provider.{key}." for key in config["provider"] if key not in provider_keys(kind)]


@functools.cache
def provider_keys(kind: str) -> frozenset[str]:
    """The keys of `provider` that Ray's source looks up, in its code for this cloud and in that for all of them."""
    sources = [*PROVIDERS[kind].rglob("*.py"), *(AUTOSCALER / "_private").glob("*.py")]
    lookup = re.compile(r"""(?:provider_config|\["provider"\])(?:\s*\.get\(\s*|\[\s*)["'](\w+)""")
    found = {key for source in sources for key in lookup.findall(source.read_text())}
    return frozenset(key for key in found if not key.startswith("_"))


def ec2_refuses(config: dict[str, Any]) -> list[str]:
    """Each node_config as the arguments of RunInstances. Ray itself takes out SubnetIds and puts in how many."""
    shape = botocore_model().operation_model("RunInstances").input_shape
    taken_out = popped(PROVIDERS["aws"] / "node_provider.py", "conf") - shape.members.keys()
    problems = []
    for name, node in node_configs(config):
        arguments = {"MinCount": 1, "MaxCount": 1} | {key: value for key, value in node.items() if key not in taken_out}
        report = ParamValidator().validate(arguments, shape)
        if report.has_errors():
            problems += [f"EC2 refuses {name}: {line}" for line in report.generate_report().splitlines()]
        problems += [f"EC2 refuses {name}.{where}: there is no {value}." for where, value in ec2_wrong_choices(arguments, shape)]
    return problems


def ec2_wrong_choices(value: Any, shape: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Strings of which the model lists all values, and that have another: botocore itself leaves them to the service."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key in value.keys() & shape.members.keys():
            yield from ec2_wrong_choices(value[key], shape.members[key], f"{where}.{key}".lstrip("."))
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from ec2_wrong_choices(item, shape.member, where)
    elif getattr(shape, "enum", None) and value not in shape.enum:
        yield where, value


@functools.cache
def botocore_model() -> Any:
    return botocore.session.get_session().get_service_model("ec2")


def compute_engine_refuses(config: dict[str, Any]) -> list[str]:
    """Each node_config as the body of instances.insert."""
    schemas = compute_schemas()
    taken_out = popped(PROVIDERS["gcp"] / "node.py", "config") - schemas["Instance"]["properties"].keys()
    problems = []
    for name, node in node_configs(config):
        body = {key: value for key, value in node.items() if key not in taken_out}
        problems += [f"Compute Engine refuses {name}{text}" for text in misfits(body, schemas["Instance"], schemas)]
    return problems


@functools.cache
def compute_schemas() -> dict[str, Any]:
    document = Path(googleapiclient.discovery_cache.__file__).with_name("documents") / "compute.v1.json"
    return json.loads(document.read_text())["schemas"]


def misfits(value: Any, schema: dict[str, Any], schemas: dict[str, Any], where: str = "") -> Iterator[str]:
    """Where a value does not fit a schema of a Google discovery document."""
    schema = schemas[schema["$ref"]] if "$ref" in schema else schema
    kind = schema["type"]
    if kind == "object" and isinstance(value, dict):
        known = schema.get("properties", {})
        for key, item in value.items():
            if key in known or "additionalProperties" in schema:
                yield from misfits(item, known.get(key) or schema["additionalProperties"], schemas, f"{where}.{key}")
            else:
                yield f"{where}: it has no {key}."
    elif kind == "array" and isinstance(value, list):
        for place, item in enumerate(value):
            yield from misfits(item, schema["items"], schemas, f"{where}[{place}]")
    elif kind == "string" and schema.get("format", "").endswith("int64") and type(value) is int:
        return  # sent as a number, too
    elif kind == "any":
        return
    elif type(value) not in {"string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,)}.get(kind, ()):
        yield f"{where}: {value!r} is no {kind}."
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value} is none of {', '.join(schema['enum'])}."


def azure_refuses(config: dict[str, Any]) -> list[str]:
    """azure_arm_parameters against the parameters of the template that Ray deploys, less those that Ray sets itself."""
    parameters, set_by_ray = azure_parameters()
    problems = []
    for name, node in node_configs(config):
        problems += [f"Ray's azure provider reads no {name}.{key}." for key in node if key not in ("azure_arm_parameters", "tags")]
        given = node.get("azure_arm_parameters", {})
        if "vmSize" not in given:
            problems.append(f"{name} has no vmSize.")
        for key, value in given.items():
            if key == "availability_zone":  # read by Ray, and not handed on
                continue
            if key not in parameters:
                problems.append(f"Ray's azure template has no parameter {key} ({name}).")
            elif key in set_by_ray:
                problems.append(f"Ray sets {key} itself ({name}).")
            elif type(value) is not AZURE_KINDS[parameters[key]["type"]]:
                problems.append(f"{name}.{key} is {value!r}, not of type {parameters[key]['type']}.")
            elif value not in AZURE_CHOICES.get(key, {value} if not isinstance(value, dict) else [value]):
                problems.append(f"{name}.{key} is {value}, none of {', '.join(sorted(AZURE_CHOICES[key]))}.")
    return problems


@functools.cache
def azure_parameters() -> tuple[dict[str, Any], frozenset[str]]:
    folder = PROVIDERS["azure"]
    parameters = json.loads((folder / "azure-vm-template.json").read_text())["parameters"]
    source = (folder / "node_provider.py").read_text() + (folder / "config.py").read_text()
    return parameters, frozenset(re.findall(r'(?:template_params|azure_arm_parameters)\["(\w+)"\] =', source))


def kuberay_refuses(documents: list[dict[str, Any]]) -> list[str]:
    """The documents against the fields of KubeRay that we use, and the pod templates against Kubernetes."""
    problems = []
    for document in documents:
        kind = document.get("kind")
        if kind not in ("RayCluster", "RayJob"):
            problems.append(f"{kind} is neither a RayCluster nor a RayJob.")
            continue
        schema = {"$ref": f"#/$defs/{kind}", "$defs": KUBERAY["$defs"]}
        for error in jsonschema.Draft202012Validator(schema).iter_errors(document):
            problems.append(f"KubeRay refuses {kind}.{'.'.join(map(str, error.absolute_path))}: {error.message}.")
        spec = document.get("spec", {})
        groups = [spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])] if kind == "RayCluster" else []
        for group in groups:
            problems += pod_misfits(group.get("groupName", "head"), group.get("template", {}))
    return problems


def pod_misfits(name: str, template: dict[str, Any]) -> list[str]:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name} | (template.get("metadata") or {})}
    try:
        kubernetes_validate.validate(pod | {"spec": template.get("spec")}, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"Kubernetes refuses the pod {name}, {'.'.join(map(str, error.absolute_path))}: {error.message}."]
    return []


def node_configs(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, node.get("node_config", {})) for name, node in config["available_node_types"].items()]


def popped(source: Path, variable: str) -> frozenset[str]:
    """The keys that Ray's source takes out of a node_config before it hands it to the cloud."""
    return frozenset(re.findall(rf'\b{variable}\.pop\(\s*"(\w+)"', source.read_text()))
