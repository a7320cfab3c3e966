"""The Helm chart, rendered by Helm's own engine: what it makes, and what it refuses to make."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from helm_python.chart import Chart, lint
from helm_python.errors import HelmRenderError, HelmValuesError

from deploy.manifests import (
    CHART,
    KEY_HASH,
    MINIMAL,
    Values,
    assert_confined,
    assert_related,
    assert_survives_its_drain,
    assert_valid,
    container_of,
    environment_of,
    of_kind,
    only,
    pod_of,
    render_chart,
    settings_of,
    with_values,
)

UPSTREAM: Values = {"upstream": {"url": "http://vllm:8000"}}

INSTALLATIONS: dict[str, Values] = {
    "minimal": MINIMAL,
    "own secret": UPSTREAM | {"auth": {"existingSecret": "callers", "existingSecretKey": "keys"}},
    "anonymous": UPSTREAM | {"auth": {"allowAnonymous": True}},
    "https": UPSTREAM | {"tls": {"existingSecret": "front", "clientCertificates": True}},
    "everything": with_values(
        {
            "replicaCount": 3,
            "image": {"repository": "registry.example/penstock", "tag": "1.2.3", "pullPolicy": "Always"},
            "imagePullSecrets": [{"name": "registry-login"}],
            "reasoning": "hide",
            "timing": {"drain_seconds": 120},
            "service": {"type": "LoadBalancer", "port": 80},
            "otel": {"endpoint": "http://collector:4318", "protocol": "http/protobuf", "serviceName": "gate"},
            "extraEnv": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
            "topologySpread": {"enabled": True, "topologyKey": "topology.kubernetes.io/zone"},
        }
    ),
    "moderated": with_values(
        {
            "moderation": {"packs": ["pii", {"name": "secrets", "action": "halt"}]},
            "audit": {"volume": {"persistentVolumeClaim": {"claimName": "audit"}}, "existingSecret": "digests"},
        }
    ),
}

each_installation = pytest.mark.parametrize("values", INSTALLATIONS.values(), ids=INSTALLATIONS.keys())


@each_installation
def test_what_is_rendered_is_valid_and_hangs_together(values: Values) -> None:
    documents = render_chart(values)
    assert_valid(documents)
    assert_related(documents)
    assert_confined(only(documents, "Deployment"))
    assert_survives_its_drain(only(documents, "Deployment"), settings_of(documents))


@each_installation
def test_helm_lint_has_no_complaint(values: Values) -> None:
    report = lint(CHART, values, strict=True, kube_version="v1.29.0")
    assert report["total_charts_linted"] == 1
    assert report["errors"] == []


def test_one_of_each_kind_is_made() -> None:
    kinds = sorted(document["kind"] for document in render_chart(MINIMAL))
    assert kinds == ["ConfigMap", "Deployment", "Secret", "Service", "ServiceAccount"]


def test_every_object_carries_the_release_in_its_name_and_namespace() -> None:
    for document in render_chart(MINIMAL, release="blue"):
        assert document["metadata"]["name"].startswith("blue-penstock")
        assert document["metadata"]["namespace"] == "models"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"upstream": {"url": "vllm:8000"}}, "/upstream/url"),
        ({"upstream": {"api_key": "secret"}}, "additional properties 'api_key' not allowed"),
        ({"replicaCount": "two"}, "/replicaCount"),
        ({"replicaCount": -1}, "/replicaCount"),
        ({"reasoning": "sometimes"}, "/reasoning"),
        ({"service": {"port": 65536}}, "/service/port"),
        ({"limits": {"stream_bytes": 0}}, "/limits/stream_bytes"),
        ({"limits": {"streamBytes": 1}}, "additional properties 'streamBytes' not allowed"),
        ({"timing": {"drain_seconds": -1}}, "/timing/drain_seconds"),
        ({"shutdown": {"preStopSeconds": 1.5}}, "/shutdown/preStopSeconds"),
        ({"auth": {"allowAnonymous": "yes"}}, "/auth/allowAnonymous"),
        ({"auth": {"keys": {"alice": "a-plain-key"}}}, "/auth/keys/alice"),
        ({"auth": {"keys": {"alice": KEY_HASH.upper()}}}, "/auth/keys/alice"),
        ({"auth": {"keys": {"two words": KEY_HASH}}}, "two words"),
        ({"auth": {"keys": {"alice": f"{KEY_HASH} gold"}}}, "/auth/keys/alice"),
        ({"cors": {"origins": ["https://app.example/"]}}, "/cors/origins/0"),
        ({"limits": {"without_store": "open"}}, "/limits/without_store"),
        ({"store": {"retention_seconds": -1}}, "/store/retention_seconds"),
        ({"store": {"memory_bytes": 1024}}, "/store/memory_bytes"),
        ({"store": {"on_failure": "wait"}}, "/store/on_failure"),
        ({"store": {"url": "redis://:secret@r"}}, "additional properties 'url' not allowed"),
        ({"moderation": {"packs": [{"name": "pii", "acton": "halt"}]}}, "additional properties 'acton' not allowed"),
        ({"moderation": {"rules": [{"id": "a", "literal": "a", "regex": "b"}]}}, "/moderation/rules/0"),
        ({"moderation": {"rules": [{"id": "a", "words_file": "/words"}]}}, "words_file"),
        ({"moderation": {"classifiers": [{"url": "http://c", "api_key": "k"}]}}, "'api_key' not allowed"),
        ({"moderation": {"classifiers": [{"url": "c:80"}]}}, "/moderation/classifiers/0/url"),
        ({"moderation": {"hold_chars": 1}}, "/moderation/hold_chars"),
        ({"audit": {"text": "some"}}, "/audit/text"),
        ({"audit": {"key": "0123456789abcdef"}}, "additional properties 'key' not allowed"),
        ({"tls": {"cert": "x"}}, "additional properties 'cert' not allowed"),
        ({"otel": {"endpoint": "collector:4317"}}, "/otel/endpoint"),
        ({"extraEnv": [{"name": "A", "value": 1}]}, "/extraEnv/0/value"),
        ({"replicas": 2}, "additional properties 'replicas' not allowed"),
    ],
)
def test_the_schema_refuses(changes: Values, complaint: str) -> None:
    with pytest.raises(HelmValuesError) as refusal:
        render_chart(with_values(changes))
    assert complaint in str(refusal.value)


def test_upstream_url_is_required() -> None:
    with pytest.raises(HelmValuesError, match="'/upstream': missing property 'url'"):
        render_chart({"auth": MINIMAL["auth"]})


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        (UPSTREAM, "auth: no API keys"),
        (
            with_values({"auth": {"existingSecret": "callers"}}),
            "auth.keys and auth.existingSecret are both set",
        ),
        (with_values({"config": {"listen": {"port": 9000}}}), "config.listen: the chart sets it itself"),
        (with_values({"tls": {"clientCertificates": True}}), "tls.clientCertificates needs tls.existingSecret"),
        (
            with_values({"config": {"auth": {"allow_anonymous": True}}}),
            "config.auth: the chart sets it itself",
        ),
    ],
)
def test_the_chart_refuses(values: Values, complaint: str) -> None:
    with pytest.raises(HelmRenderError) as refusal:
        render_chart(values)
    assert complaint in str(refusal.value)


def test_the_refusal_of_an_open_relay_names_every_way_out() -> None:
    with pytest.raises(HelmRenderError) as refusal:
        render_chart(UPSTREAM)
    for way_out in (
        "penstock hash-key",
        "auth.keys.NAME=",
        "auth.existingSecret=",
        "auth.allowAnonymous=true",
    ):
        assert way_out in str(refusal.value)


def test_settings_come_from_the_values() -> None:
    family = {"models": ["planner*"], "reasoning": {"open": "<plan>", "close": "</plan>"}}
    defaults = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    settings = settings_of(render_chart(with_values({"reasoning": "inline", "families": {"planner": family}})))
    assert settings == {
        "listen": {"host": "0.0.0.0", "port": 8080},
        "upstreams": [{"url": "http://vllm:8000"}],
        "reasoning": "inline",
        "families": {"planner": family},
        "auth": {"keys_file": "/etc/penstock/auth/keys.txt", "allow_anonymous": False},
        "moderation": defaults["moderation"],
        "audit": {"otlp": False, "text": "digest", "sample": 0},
        "limits": defaults["limits"],
        "slow_client": defaults["slow_client"],
        "timing": defaults["timing"],
        "routing": {},
        "passthrough": [],
        "answers": [],
        "answer_cache": {},
        "store": {"retention_seconds": 300, "linger_seconds": 60, "memory_bytes": 268435456, "on_failure": "continue"},
    }


def test_big_numbers_stay_whole_numbers() -> None:
    # Helm reads numbers as floats, and Go prints a large one as 1.6777216e+07 unless the template takes care.
    (config_map,) = of_kind(render_chart(MINIMAL), "ConfigMap")
    assert "stream_bytes: 16777216\n" in config_map["data"]["penstock.yaml"]


def test_config_is_merged_over_the_rest() -> None:
    changes = {"config": {"limits": {"stream_seconds": 5, "buffer_bytes": 262144}, "store": {"url": "redis://r"}}}
    settings = settings_of(render_chart(with_values(changes)))
    assert settings["limits"]["stream_seconds"] == 5
    assert settings["limits"]["buffer_bytes"] == 262144
    assert settings["limits"]["line_bytes"] == 1048576
    assert (settings["store"]["url"], settings["store"]["retention_seconds"]) == ("redis://r", 300)


def test_config_can_switch_something_off() -> None:
    # The merge function of Helm's templates is known for taking false and 0 as "not given".
    settings = settings_of(render_chart(with_values({"config": {"timing": {"drain_seconds": 0}}})))
    assert settings["timing"]["drain_seconds"] == 0


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 5 + 30 + 10 + 5),
        ({"timing": {"drain_seconds": 300}}, 5 + 300 + 10 + 5),
        ({"timing": {"drain_seconds": 0.5, "closing_seconds": 0.7}}, 5 + 2 + 5),
        ({"shutdown": {"preStopSeconds": 20, "marginSeconds": 1}}, 20 + 30 + 10 + 1),
        ({"config": {"timing": {"drain_seconds": 90}}}, 5 + 90 + 10 + 5),
    ],
)
def test_the_grace_period_follows_the_drain(changes: Values, seconds: int) -> None:
    documents = render_chart(with_values(changes))
    deployment = only(documents, "Deployment")
    assert pod_of(deployment)["terminationGracePeriodSeconds"] == seconds
    assert_survives_its_drain(deployment, settings_of(documents))


def test_probes_ask_alive_and_ready_apart() -> None:
    container = container_of(only(render_chart(MINIMAL), "Deployment"))
    paths = {name: probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}


def test_the_container_listens_where_its_port_says() -> None:
    documents = render_chart(MINIMAL)
    (port,) = container_of(only(documents, "Deployment"))["ports"]
    assert settings_of(documents)["listen"] == {"host": "0.0.0.0", "port": port["containerPort"]}


def test_no_pod_leaves_before_its_successor_is_ready() -> None:
    rolling = only(render_chart(MINIMAL), "Deployment")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}


def test_selectors_leave_out_what_an_upgrade_changes() -> None:
    # A Deployment's selector can never be changed, and a Service that selected a version would drop the old pods
    # before the new ones are ready.
    documents = render_chart(MINIMAL, release="blue")
    selector = {"app.kubernetes.io/name": "penstock", "app.kubernetes.io/instance": "blue"}
    assert only(documents, "Deployment")["spec"]["selector"] == {"matchLabels": selector}
    assert only(documents, "Service")["spec"]["selector"] == selector


def test_service_variables_stay_out_of_the_environment() -> None:
    # A Service called penstock would set PENSTOCK_PORT=tcp://..., a name under which settings are looked for.
    assert pod_of(only(render_chart(MINIMAL), "Deployment"))["enableServiceLinks"] is False


def test_the_secret_holds_hashes_where_the_settings_look_for_them() -> None:
    documents = render_chart(with_values({"auth": {"keys": {"bob": KEY_HASH}}}))
    secret = only(documents, "Secret")
    assert secret["stringData"]["keys.txt"].splitlines() == [f"alice={KEY_HASH}", f"bob={KEY_HASH}"]
    assert _mounted_keys(documents) == (secret["metadata"]["name"], "keys.txt", "/etc/penstock/auth/keys.txt")
    assert settings_of(documents)["auth"]["keys_file"] == "/etc/penstock/auth/keys.txt"


def test_an_own_secret_is_mounted_and_none_is_made() -> None:
    documents = render_chart(INSTALLATIONS["own secret"])
    assert of_kind(documents, "Secret") == []
    assert _mounted_keys(documents) == ("callers", "keys", settings_of(documents)["auth"]["keys_file"])


def test_anonymous_has_no_keys_file() -> None:
    documents = render_chart(INSTALLATIONS["anonymous"])
    assert settings_of(documents)["auth"] == {"allow_anonymous": True}
    assert of_kind(documents, "Secret") == []
    assert [volume["name"] for volume in pod_of(only(documents, "Deployment"))["volumes"]] == ["config"]


def _mounted_keys(documents: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Secret, entry in it, and path in the container."""
    deployment = only(documents, "Deployment")
    (secret,) = [volume["secret"] for volume in pod_of(deployment)["volumes"] if volume["name"] == "keys"]
    (mount,) = [mount for mount in container_of(deployment)["volumeMounts"] if mount["name"] == "keys"]
    (item,) = secret["items"]
    return secret["secretName"], item["key"], f"{mount['mountPath']}/{item['path']}"


@pytest.mark.parametrize(
    "changes",
    [
        {"limits": {"stream_seconds": 60}},
        {"config": {"store": {"url": "redis://r"}}},
        {"auth": {"plans": {"gold": {"streams": 9}}}},
        {"moderation": {"packs": ["pii"]}},
    ],
)
def test_a_changed_configuration_rolls_the_pods(changes: Values) -> None:
    assert _pod_annotations(with_values(changes)) != _pod_annotations(MINIMAL)


def test_an_unchanged_configuration_leaves_the_pods_alone() -> None:
    assert _pod_annotations(with_values({"replicaCount": 5, "service": {"port": 80}})) == _pod_annotations(MINIMAL)


def test_changed_keys_are_read_again_and_cut_no_stream() -> None:
    assert _pod_annotations(with_values({"auth": {"keys": {"bob": KEY_HASH}}})) == _pod_annotations(MINIMAL)


def test_plans_tokens_and_pages_come_from_the_values() -> None:
    jwt = {"issuer": "i", "audience": "a", "jwks_url": "https://i/keys"}
    values = UPSTREAM | {
        "auth": {"jwt": jwt, "plans": {"gold": {"streams": 9}}},
        "cors": {"origins": ["https://app.example"]},
    }
    settings = settings_of(render_chart(values))
    assert settings["auth"] == {"allow_anonymous": False, "jwt": jwt, "plans": {"gold": {"streams": 9}}}
    assert settings["listen"]["cors"] == {"origins": ["https://app.example"]}


def test_https_in_the_pod_and_its_probes() -> None:
    documents = render_chart(INSTALLATIONS["https"])
    deployment = only(documents, "Deployment")
    settings = settings_of(documents)
    (secret,) = [volume["secret"] for volume in pod_of(deployment)["volumes"] if volume["name"] == "tls"]
    (mount,) = [mount for mount in container_of(deployment)["volumeMounts"] if mount["name"] == "tls"]
    assert secret["secretName"] == "front"
    assert settings["listen"]["tls"] == {
        "cert_file": f"{mount['mountPath']}/tls.crt",
        "key_file": f"{mount['mountPath']}/tls.key",
        "client_ca_file": f"{mount['mountPath']}/ca.crt",
    }
    probes = [probe for name, probe in container_of(deployment).items() if name.endswith("Probe")]
    assert [probe["httpGet"]["scheme"] for probe in probes] == ["HTTPS"] * 3


def test_the_shared_redis_comes_from_a_secret() -> None:
    documents = render_chart(with_values({"store": {"existingSecret": "redis", "on_failure": "end"}}))
    assert "existingSecret" not in settings_of(documents)["store"]
    assert settings_of(documents)["store"]["on_failure"] == "end"
    deployment = only(documents, "Deployment")
    (variable,) = container_of(deployment)["env"]
    assert variable["name"] == "PENSTOCK_STORE__URL"
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "redis", "key": "url"}


def test_the_audit_of_each_pod_has_a_folder_of_its_own() -> None:
    documents = render_chart(INSTALLATIONS["moderated"])
    deployment = only(documents, "Deployment")
    settings = settings_of(documents)
    (mount,) = [mount for mount in container_of(deployment)["volumeMounts"] if mount["name"] == "audit"]
    (volume,) = [volume for volume in pod_of(deployment)["volumes"] if volume["name"] == "audit"]
    folder, key = container_of(deployment)["env"][::-1]
    assert volume["persistentVolumeClaim"] == {"claimName": "audit"}
    assert settings["audit"]["file"]["path"] == f"{mount['mountPath']}/audit.jsonl"
    assert mount["subPathExpr"] == f"$({folder['name']})"
    assert folder["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert key["name"] == "PENSTOCK_AUDIT__KEY"
    assert key["valueFrom"]["secretKeyRef"] == {"name": "digests", "key": "key"}
    assert settings["moderation"]["packs"] == ["pii", {"name": "secrets", "action": "halt"}]


def test_without_a_volume_there_is_no_file() -> None:
    assert "file" not in settings_of(render_chart(MINIMAL))["audit"]


def _pod_annotations(values: Values) -> dict[str, str]:
    annotations: dict[str, str] = only(render_chart(values), "Deployment")["spec"]["template"]["metadata"][
        "annotations"
    ]
    return annotations


def test_traces_go_where_otel_says() -> None:
    assert environment_of(only(render_chart(INSTALLATIONS["everything"]), "Deployment")) == {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "gate",
    }
    assert environment_of(only(render_chart(MINIMAL), "Deployment")) == {}


def test_the_image_defaults_to_the_version_of_the_application() -> None:
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"]
    assert container_of(only(render_chart(MINIMAL), "Deployment"))["image"] == f"penstock:{version}"
    everything = only(render_chart(INSTALLATIONS["everything"]), "Deployment")
    assert container_of(everything)["image"] == "registry.example/penstock:1.2.3"


def test_replicas_spread_by_the_labels_that_select_them() -> None:
    deployment = only(render_chart(INSTALLATIONS["everything"]), "Deployment")
    (constraint,) = pod_of(deployment)["topologySpreadConstraints"]
    assert constraint["topologyKey"] == "topology.kubernetes.io/zone"
    assert constraint["labelSelector"] == deployment["spec"]["selector"]
    assert "topologySpreadConstraints" not in pod_of(only(render_chart(MINIMAL), "Deployment"))


def test_the_notes_warn_of_an_open_door() -> None:
    with Chart.load(CHART) as chart:
        notes = chart.render(INSTALLATIONS["anonymous"])["penstock/templates/NOTES.txt"]
        assert "WARNING: auth.allowAnonymous is true" in notes
        assert "WARNING" not in chart.render(MINIMAL)["penstock/templates/NOTES.txt"]


# Handed on as they are: Kubernetes' or Penstock's own checks apply.
FREE_OBJECTS = {
    "/routing",
    "/answers/[]",
    "/answer_cache",
    "/global",
    "/families",
    "/audit/volume",
    "/auth/jwt",
    "/auth/plans",
    "/config",
    "/extraEnv/[]/valueFrom",
    "/resources/requests",
    "/resources/limits",
}


def test_the_schema_is_closed_and_describes_every_value() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for path, node in _schema_nodes("", schema):
        if path and not path.endswith("[]"):
            assert node.get("description"), f"{path} has no description"
        if node.get("type") == "object" and path not in FREE_OBJECTS:
            assert "additionalProperties" in node, f"{path} lets unknown keys through"


def test_every_value_of_the_schema_has_a_default_to_read() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    missing = {path for path, _ in _schema_nodes("", schema) if not _has(defaults, path)}
    # The upstream is the user's to name, and lists are empty.
    assert {path for path in missing if "[]" not in path and not path.startswith("/upstream/")} == {"/global"}


def _schema_nodes(path: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _schema_nodes(f"{path}/{name}", child)
    if "items" in schema:
        yield from _schema_nodes(f"{path}/[]", schema["items"])


def _has(values: Any, path: str) -> bool:
    for name in path.split("/")[1:]:
        if not isinstance(values, dict) or name not in values:
            return False
        values = values[name]
    return True
