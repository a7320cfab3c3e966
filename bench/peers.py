"""Other gateways to stand beside Penstock, each in a virtual environment of its own."""

import subprocess
import sys
from pathlib import Path

_PACKAGES = {"litellm": "litellm[proxy]", "smg": "smg"}

# What a peer may take to load its parts.
START_SECONDS = 120.0


def peer_python(directory: Path, name: str) -> Path:
    """The interpreter of a peer's environment below `directory`, made if it is missing."""
    python = directory / name / "bin" / "python"
    if not (python.parent / name).exists():
        subprocess.run([sys.executable, "-m", "venv", directory / name], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", _PACKAGES[name]], check=True)
    return python


def version(python: Path, package: str) -> str:
    told = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", told], capture_output=True, text=True, check=True).stdout.strip()


def smg_command(python: Path, engine: str, port: int, own_port: int) -> list[str | Path]:
    """The Shepherd Model Gateway on `port` in front of `engine`; its metrics are on `own_port`."""
    command: list[str | Path] = [python.parent / "smg", "launch", "--worker-urls", engine, "--host", "127.0.0.1"]
    return [*command, "--port", str(port), "--prometheus-port", str(own_port)]
