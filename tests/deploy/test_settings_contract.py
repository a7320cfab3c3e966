"""Penstock itself accepts the settings that the chart and the laptop cluster give it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.manifests import (
    K8S,
    MINIMAL,
    Manifest,
    Values,
    of_kind,
    only,
    read_kustomization,
    render_chart,
    with_values,
)

KEYS_FOLDER = "/etc/penstock/auth"


def check_config(documents: list[Manifest], folder: Path) -> subprocess.CompletedProcess[str]:
    """`penstock check-config` on the files that the pod mounts under /etc/penstock, laid out in `folder`."""
    for secret in of_kind(documents, "Secret"):
        (folder / "keys.txt").write_text(secret["stringData"]["keys.txt"])
    text = only(documents, "ConfigMap")["data"]["penstock.yaml"]
    settings = folder / "penstock.yaml"
    settings.write_text(text.replace(KEYS_FOLDER, str(folder)))
    return subprocess.run(
        [sys.executable, "-m", "penstock", "check-config", "--config", str(settings)],
        env={name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    "values",
    [
        MINIMAL,
        {"upstream": {"url": "http://vllm:8000"}, "auth": {"allowAnonymous": True}},
        with_values(
            {
                "upstream": {"url": "http://vllm.models.svc:8000", "discover": "dns", "zone": "a"},
                "moreUpstreams": [{"url": "http://vllm-b:8000", "zone": "b", "weight": 2}],
                "routing": {"zone": "a", "affinity": "prefix"},
                "passthrough": ["POST /tokenize"],
                "answers": [{"id": "hours", "question": "when .*open.*", "text": "From nine to five."}],
                "answer_cache": {"requests": "deterministic", "seconds": 60},
            }
        ),
        with_values(
            {
                "upstream": {"name": "main", "running_usage": False, "parses_tools": False},
                "reasoning": "hide",
                "families": {"planner": {"models": ["planner*"], "reasoning": {"open": "<p>", "close": "</p>"}}},
                "timing": {"drain_seconds": 90, "first_byte_seconds": 0.5},
                "config": {"limits": {"stream_seconds": 5}},
                "auth": {
                    "plans": {"gold": {"tokens_per_minute": 1000, "models": ["qwen*"]}},
                    "jwt": {"issuer": "i", "audience": "a", "jwks_url": "https://i/keys", "plan_claim": "tier"},
                    "keys": {"bob": "sha256:" + "a" * 64 + " plan=gold expires=2030-01-01T00:00:00Z"},
                },
                "cors": {"origins": ["https://app.example"]},
                "store": {"retention_seconds": 0, "linger_seconds": 1.5, "memory_bytes": 65536, "on_failure": "end"},
            }
        ),
        with_values(
            {
                "moderation": {
                    "packs": ["pii", {"name": "secrets", "action": "halt", "without": ["secrets.jwt"]}],
                    "rules": [
                        {"id": "a", "literal": "Project Zephyr", "placeholder": "[internal]", "models": ["tiny*"]},
                        {"id": "b", "regex": "TKT-[0-9]{6}", "action": "halt", "channels": ["answer"]},
                        {"id": "c", "words": ["damn"], "action": "flag", "keys": ["alice"]},
                    ],
                    "classifiers": [
                        {"url": "http://c/v1/moderations", "on_failure": "closed", "timeout_ms": 500},
                        {"url": "http://g/v1/chat/completions", "shape": "guard", "model": "g", "mode": "gate"},
                    ],
                    "window": {"chars": 100},
                }
            }
        ),
        with_values(
            {
                "moderation": {"packs": ["profanity"]},
                "audit": {"volume": {"emptyDir": {}}, "days": 90, "otlp": True, "text": "masked", "sample": 0.5},
            }
        ),
    ],
    ids=["keys", "anonymous", "cluster", "changed", "moderated", "audited"],
)
def test_penstock_accepts_the_settings_of_the_chart(values: Values, tmp_path: Path) -> None:
    checked = check_config(render_chart(values), tmp_path)
    assert checked.returncode == 0, checked.stderr


def test_penstock_accepts_the_settings_of_the_laptop_cluster(tmp_path: Path) -> None:
    checked = check_config(read_kustomization(K8S / "demo"), tmp_path)
    assert checked.returncode == 0, checked.stderr
