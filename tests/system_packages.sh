#!/usr/bin/env bash
# Installs the Debian packages that are missing, if any: `system_packages.sh venv` those of a Python environment,
# `system_packages.sh tests` the real servers that the tests run against as well.
set -euo pipefail
python="${PYTHON:-python3.11}"

missing=()
need() { # COMMAND PACKAGE: nginx and haproxy lie where only root looks
  PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2")
}
"$python" -c 'import ensurepip' 2>/dev/null || missing+=("${python##*/}-venv")
if [[ "$1" == tests ]]; then
  need redis-server redis-server
  need openssl openssl
  need nginx nginx-light
  need haproxy haproxy
fi
((${#missing[@]})) || exit 0

as_root=()
((EUID == 0)) || as_root=(sudo)
echo "installing ${missing[*]}"
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends "${missing[@]}"
