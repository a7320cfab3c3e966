"""The manifests of the laptop cluster in k8s/.

Read once by a small reader of these tests, and once more by the real kustomize where kubectl has it (see
`read_kustomization` for why not everywhere).
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from deploy.manifests import (
    K8S,
    KUSTOMIZE_BUILDERS,
    Manifest,
    assert_confined,
    assert_related,
    assert_survives_its_drain,
    assert_valid,
    container_of,
    environment_of,
    of_kind,
    only,
    pod_of,
    settings_of,
)

Build = Callable[[Path], list[Manifest]]

each_builder = pytest.mark.parametrize("build", KUSTOMIZE_BUILDERS)
each_overlay = pytest.mark.parametrize("overlay", ["demo", "vllm-cpu"])


@each_builder
@each_overlay
def test_the_documents_are_valid_and_hang_together(build: Build, overlay: str) -> None:
    documents = build(K8S / overlay)
    assert_valid(documents)
    assert_related(documents)
    names = sorted((document["kind"], document["metadata"]["name"]) for document in of_kind(documents, "Deployment"))
    assert names == [("Deployment", "engine"), ("Deployment", "jaeger"), ("Deployment", "penstock")]


@each_builder
def test_penstock_is_confined_and_may_finish_its_streams(build: Build) -> None:
    documents = build(K8S / "demo")
    penstock = only(documents, "Deployment", "penstock")
    assert_confined(penstock)
    assert_confined(only(documents, "Deployment", "engine"))
    assert_survives_its_drain(penstock, settings_of(documents))


@each_builder
def test_the_mounted_settings_are_the_generated_ones(build: Build) -> None:
    documents = build(K8S / "demo")
    (volume,) = pod_of(only(documents, "Deployment", "penstock"))["volumes"]
    assert volume["configMap"]["name"] == only(documents, "ConfigMap")["metadata"]["name"]
    (mount,) = container_of(only(documents, "Deployment", "penstock"))["volumeMounts"]
    assert container_of(only(documents, "Deployment", "penstock"))["args"] == [
        "serve",
        "--config",
        f"{mount['mountPath']}/penstock.yaml",
    ]


@each_builder
@each_overlay
def test_penstock_finds_its_neighbours(build: Build, overlay: str) -> None:
    documents = build(K8S / overlay)
    (upstream,) = settings_of(documents)["upstreams"]
    penstock = only(documents, "Deployment", "penstock")
    assert upstream["url"] in _addresses(documents)
    assert environment_of(penstock)["OTEL_EXPORTER_OTLP_ENDPOINT"] in _addresses(documents)


def _addresses(documents: list[Manifest]) -> set[str]:
    return {
        f"http://{service['metadata']['name']}:{port['port']}"
        for service in of_kind(documents, "Service")
        for port in service["spec"]["ports"]
    }


@each_builder
@each_overlay
def test_the_open_door_does_not_lead_out_of_the_cluster(build: Build, overlay: str) -> None:
    documents = build(K8S / overlay)
    assert settings_of(documents)["auth"] == {"allow_anonymous": True}
    for service in of_kind(documents, "Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    kinds = {document["kind"] for document in documents}
    assert kinds == {"Namespace", "ConfigMap", "Deployment", "Service"}


@each_builder
@each_overlay
def test_service_variables_stay_out_of_every_pod(build: Build, overlay: str) -> None:
    for deployment in of_kind(build(K8S / overlay), "Deployment"):
        assert pod_of(deployment)["enableServiceLinks"] is False


@each_builder
@each_overlay
def test_images_are_pinned(build: Build, overlay: str) -> None:
    for deployment in of_kind(build(K8S / overlay), "Deployment"):
        _, _, tag = container_of(deployment)["image"].partition(":")
        assert tag[-1].isdigit(), deployment["metadata"]["name"]


@each_builder
def test_the_model_is_named_once_by_a_variable(build: Build) -> None:
    engine = only(build(K8S / "vllm-cpu"), "Deployment", "engine")
    assert container_of(engine)["args"][0] == "$(MODEL)"
    assert "/" in environment_of(engine)["MODEL"]


@each_overlay
def test_overlays_stay_in_the_namespace_of_their_base(overlay: str) -> None:
    kustomizations = [yaml.safe_load((K8S / name / "kustomization.yaml").read_text()) for name in ("base", overlay)]
    namespace = only(KUSTOMIZE_BUILDERS[0](K8S / overlay), "Namespace")["metadata"]["name"]
    assert [kustomization["namespace"] for kustomization in kustomizations] == [namespace, namespace]
