"""Serve the tiny scripted model with the real vLLM on 127.0.0.1.

    python serve.py --port 8000 [more arguments for vLLM]

With `--stop-with-stdin` it lives no longer than whoever holds the other end of its standard input.
Run by an interpreter that has vLLM. The model is made on the first start and kept in `.engine/` at the root
of the repository (or where TINY_VLLM_MODELS says); its name changes with vLLM and with make_model.py.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODELS = Path(os.environ.get("TINY_VLLM_MODELS", HERE.parents[1] / ".engine"))

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # The model is too small to share out: more threads only wait for each other.
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # As `vllm serve` sets it.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "TOKENIZERS_PARALLELISM": "false",
    # vLLM's processes find scripted.py and model_names.py here.
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
}

ARGUMENTS = (
    *("--host", "127.0.0.1"),
    *("--served-model-name", "tiny", "tiny-parsed"),
    *("--max-model-len", "2048", "--max-num-seqs", "64", "--max-num-batched-tokens", "256"),
    # 1024 blocks of 32 tokens: one long stream is seen in the cache's usage, and the cache can be filled.
    *("--block-size", "32", "--num-gpu-blocks-override", "1024"),
    *("--dtype", "float32", "--enforce-eager"),
    *("--logits-processors", "scripted:Scripted", "penstock_vllm.grammar_processor:GrammarStop"),
    *("--middleware", "model_names.ParsersByName"),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3"),
    "--enable-prompt-tokens-details",
    "--disable-uvicorn-access-log",
)


def vllm_version() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    sys.exit(f"{sys.executable} has no vLLM; run serve.py with an interpreter that has it")


def model_directory() -> Path:
    recipe = (HERE / "make_model.py").read_bytes() + vllm_version().encode()
    directory = MODELS / f"tiny-{hashlib.sha256(recipe).hexdigest()[:12]}"
    if not directory.exists():
        subprocess.run([sys.executable, str(HERE / "make_model.py"), str(directory)], check=True)
    return directory


def stop_with_stdin() -> None:
    """Wait for the end of standard input, then take the whole process group along, the engine's too."""
    # Not through sys.stdin: its lock, held here, would crash an interpreter that ends for another reason.
    while os.read(0, 1024):
        continue
    os.killpg(0, signal.SIGKILL)


def serve(*more: str) -> None:
    """Do in this process what `vllm serve` does. Its child processes import this small file again, not the server."""
    os.environ.update(ENVIRONMENT)
    sys.path.insert(0, str(HERE))
    # Not vLLM's own main: that asks for the version of a distribution `vllm`, and the CPU build is called otherwise.
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = ServeSubcommand()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args(["serve", str(model_directory()), *ARGUMENTS, *more])
    command.validate(arguments)
    command.cmd(arguments)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--stop-with-stdin" in arguments:
        arguments.remove("--stop-with-stdin")
        threading.Thread(target=stop_with_stdin, daemon=True).start()
    serve(*arguments)
