"""`make demo ENGINE=vllm`: starts the real vLLM with the tiny model and shows one stream of it through Penstock.

Run by the sidecar's interpreter; the engine runs in its own (`.venv-vllm`).
"""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
ENGINE_PYTHON = HERE.parents[1] / ".venv-vllm/bin/python"
START_SECONDS = 240


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, engine: "subprocess.Popen[bytes]") -> bool:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and engine.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return False


def main() -> int:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    print("starting vLLM with a tiny model made on the spot; this takes about 40 seconds", flush=True)
    with tempfile.TemporaryFile() as log:
        command = [ENGINE_PYTHON, HERE / "serve.py", "--port", str(port), "--stop-with-stdin"]
        # The engine lives no longer than this process: it ends when its standard input does.
        engine = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
        try:
            if not wait_until_healthy(url, engine):
                log.seek(0)
                print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
                print("vLLM did not start; its last words are above", file=sys.stderr)
                return 1
            return subprocess.call([sys.executable, "-m", "penstock", "demo", "--upstream", url])
        finally:
            if engine.stdin is not None:
                engine.stdin.close()
            engine.wait(timeout=60)


if __name__ == "__main__":
    sys.exit(main())
