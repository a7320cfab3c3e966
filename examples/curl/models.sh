#!/bin/sh
# The models of the engine, as it lists them itself.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --silent --show-error --fail-with-body "$url/v1/models" --header "Authorization: Bearer ${KEY:-none}"
echo
