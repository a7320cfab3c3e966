#!/bin/sh
# The JSON Schema of the events. It asks for no key.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --silent --show-error --fail-with-body "$url/v1/schema"
