"""All checks, in the order in which one needs the other."""

from dataclasses import dataclass
from datetime import date

from massl_ray.checkup.fit import check_start, make_plan, measure, state_bytes
from massl_ray.checkup.machine import check_machine
from massl_ray.checkup.places import check_disk, check_source, check_storage, check_views, look_at_images
from massl_ray.config import Config, resolve
from massl_ray.data.examine import Report
from massl_ray.data.listing import Listing
from massl_ray.errors import UserError
from massl_ray.method.network import check_backbone
from massl_ray.planning.checks import Finding, check_cluster, check_settings, worst_last
from massl_ray.planning.cluster_file import Cluster


@dataclass(frozen=True)
class Checkup:
    """What was found.

    Attributes:
        findings: the worst last.
        images: what there is to know of them, None where they cannot be listed.
    """

    findings: tuple[Finding, ...]
    images: Report | None

    @property
    def fails(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def check_everything(config: Config, cluster: Cluster, today: date, with_measure: bool = False) -> Checkup:
    """`today` decides which prices are old. Changes nothing; what fails is a finding."""
    findings = check_machine(config, elsewhere=cluster.kind != "machine")
    findings += check_cluster(cluster, config, today)
    if "://" in config.run.dir or cluster.kind == "machine":  # another machine's disk cannot be tried from here
        findings.append(check_storage(config.run.dir))
    images, more = check_source(config)
    findings += more
    looks = None
    if images is not None:
        looks, more = look_at_images(images, config)
        findings += more
    findings += _check_model(config)
    if images is not None and looks is not None and len(images) >= 2:
        findings += _check_run(config, cluster, images, looks, with_measure, findings)
    return Checkup(tuple(worst_last(findings)), looks)


def _check_model(config: Config) -> list[Finding]:
    try:
        check_backbone(config)
    except UserError as error:
        return [Finding("model", "error", str(error), "Choose another model.backbone, or other view sizes.")]
    return [Finding("model", "ok", f"timm has {config.model.backbone}, and it takes the views.")]


def _check_run(
    config: Config, cluster: Cluster, images: Listing, looks: Report, with_measure: bool, before: list[Finding]
) -> list[Finding]:
    """What needs the images, or their number."""
    failed = {finding.check for finding in before if finding.severity == "error"}
    try:
        findings = check_settings(config, resolve(config, len(images)))
    except UserError as error:
        return [Finding("settings", "error", str(error), "Mend what it says.")]
    if "model" in failed:
        return findings
    run = measured = cpu_s = None
    if "images" not in failed and looks.formats:  # some can be read
        cpu_s, finding = check_views(images, config, looks.shorter_side["median"])
        findings.append(finding)
    if not failed & {"images", "storage"}:  # it would only say so again
        run, finding = check_start(config)
        findings.append(finding)
    if run and with_measure:
        measured, finding = measure(run)
        findings.append(finding)
    made, more = make_plan(config, len(images), cluster, measured, cpu_s)
    findings += more
    return [*findings, *check_disk(config, state_bytes(made))] if made and cluster.kind == "machine" else findings
