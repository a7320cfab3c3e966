"""Reading Kubernetes manifests for the tests of this folder: where they come from and how they hang together.

`kubernetes-validate` checks each document against its schema alone. A Service that selects nothing, or a
probe on a port that no container has, is valid there; the relations below are what it cannot see.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from helm_python.chart import Chart

Manifest = dict[str, Any]
Values = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = REPOSITORY / "helm" / "penstock"
K8S = REPOSITORY / "k8s"

OLDEST_KUBERNETES = "1.29"
KEY_HASH = "sha256:" + "0123456789abcdef" * 4

# The least that has to be said on the command line.
MINIMAL: Values = {"upstream": {"url": "http://vllm:8000"}, "auth": {"keys": {"alice": KEY_HASH}}}


def with_values(changes: Values, start: Values = MINIMAL) -> Values:
    """`start` with `changes` merged in, map by map, as several `--set` on one command line."""
    merged = copy.deepcopy(start)
    for name, change in changes.items():
        deeper = isinstance(change, dict) and isinstance(merged.get(name), dict)
        merged[name] = with_values(change, merged[name]) if deeper else change
    return merged


def render_chart(values: Values, release: str = "penstock") -> list[Manifest]:
    """What `helm install RELEASE helm/penstock` would send to the cluster. Raises what Helm raises."""
    with Chart.load(CHART) as chart:
        files = chart.render(values, name=release, namespace="models")
    return [document for path, text in files.items() if path.endswith(".yaml") for document in documents_of(text)]


def documents_of(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


def read_kustomization(folder: Path) -> list[Manifest]:
    """The documents of a kustomization, read without kustomize.

    Debian 12 offers only a kubectl whose kustomize (2.0.3) cannot include folders, and neither pip nor npm
    has a package by kustomize's own authors. So this reads the few fields that k8s/ uses, and stops at any
    other. Where the machine has a newer kubectl, the tests run on what that makes as well.
    """
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = kustomization.keys() - {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
    assert not unknown, f"{folder}: teach read_kustomization the fields {sorted(unknown)}"
    documents: list[Manifest] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        assert path.exists(), f"{folder}/kustomization.yaml names {resource}, which does not exist"
        documents += read_kustomization(path) if path.is_dir() else documents_of(path.read_text())
    documents += [_generated_config_map(folder, entry) for entry in kustomization.get("configMapGenerator", [])]
    return documents


def _generated_config_map(folder: Path, entry: Manifest) -> Manifest:
    sources = dict(file.split("=", 1) for file in entry["files"])
    data = {key: (folder / source).read_text() for key, source in sources.items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": entry["name"]}, "data": data}


def build_with_kubectl(folder: Path) -> list[Manifest]:
    """The documents of a kustomization, from the real kustomize inside kubectl."""
    built = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=30, check=False
    )
    assert built.returncode == 0, built.stderr
    return documents_of(built.stdout)


def kubectl_can_kustomize() -> bool:
    """Whether kubectl is here and new enough to include folders: old ones do not tell their kustomize."""
    if shutil.which("kubectl") is None:
        return False
    version = subprocess.run(
        ["kubectl", "version", "--client", "--output=json"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return version.returncode == 0 and "kustomizeVersion" in json.loads(version.stdout)


KUSTOMIZE_BUILDERS: list[Callable[[Path], list[Manifest]]] = [read_kustomization]
if kubectl_can_kustomize():
    KUSTOMIZE_BUILDERS.append(build_with_kubectl)


def only(documents: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The one document of that kind (and name)."""
    found = [d for d in documents if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, f"{len(found)} documents of kind {kind}, name {name}"
    return found[0]


def of_kind(documents: list[Manifest], kind: str) -> list[Manifest]:
    return [document for document in documents if document["kind"] == kind]


def pod_of(deployment: Manifest) -> Manifest:
    pod: Manifest = deployment["spec"]["template"]["spec"]
    return pod


def container_of(deployment: Manifest) -> Manifest:
    (container,) = pod_of(deployment)["containers"]
    found: Manifest = container
    return found


def environment_of(deployment: Manifest) -> dict[str, str]:
    """The variables of the container that have a literal value."""
    return {entry["name"]: entry["value"] for entry in container_of(deployment).get("env", []) if "value" in entry}


def pre_stop_seconds(deployment: Manifest) -> int:
    program, seconds = container_of(deployment)["lifecycle"]["preStop"]["exec"]["command"]
    assert program == "sleep"
    return int(seconds)


def settings_of(documents: list[Manifest]) -> Manifest:
    """Penstock's settings, as its pod finds them in the mounted ConfigMap."""
    (config_map,) = of_kind(documents, "ConfigMap")
    settings: Manifest = yaml.safe_load(config_map["data"]["penstock.yaml"])
    return settings


def assert_valid(documents: list[Manifest]) -> None:
    """Every document is known to the oldest and to the newest Kubernetes, without a field too many."""
    assert documents
    for document in documents:
        for version in (OLDEST_KUBERNETES, kubernetes_validate.latest_version()):
            kubernetes_validate.validate(document, version, strict=True)


def assert_related(documents: list[Manifest]) -> None:
    """Selectors, ports and names in one document lead to what they mean in another."""
    deployments = of_kind(documents, "Deployment")
    for service in of_kind(documents, "Service"):
        (selected,) = [d for d in deployments if _selects(service["spec"]["selector"], d)]
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in _port_names(selected), (service["metadata"]["name"], port)
    for deployment in deployments:
        assert _selects(deployment["spec"]["selector"]["matchLabels"], deployment)
        assert {probe["httpGet"]["port"] for probe in _probes(deployment)} <= _port_names(deployment)
        mounted = {mount["name"] for mount in container_of(deployment).get("volumeMounts", [])}
        assert mounted == {volume["name"] for volume in pod_of(deployment).get("volumes", [])}


def _selects(labels: dict[str, str], deployment: Manifest) -> bool:
    pod_labels: dict[str, str] = deployment["spec"]["template"]["metadata"]["labels"]
    return labels.items() <= pod_labels.items()


def _port_names(deployment: Manifest) -> set[str]:
    return {port["name"] for port in container_of(deployment)["ports"]}


def _probes(deployment: Manifest) -> Iterator[Manifest]:
    container = container_of(deployment)
    return (container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in container)


def assert_confined(deployment: Manifest) -> None:
    """The pod has no root, no privileges, no file system it can write, and no API token."""
    pod, container = pod_of(deployment), container_of(deployment)
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]


def assert_survives_its_drain(deployment: Manifest, settings: Manifest) -> None:
    """Kubernetes kills the pod only after the preStop hook and the whole drain, with some time to spare."""
    drain: float = settings["timing"]["drain_seconds"] + settings["timing"]["closing_seconds"]
    assert pod_of(deployment)["terminationGracePeriodSeconds"] > pre_stop_seconds(deployment) + drain
