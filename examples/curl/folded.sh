#!/bin/sh
# The whole answer as one JSON object, with its blocks and its usage. Reasoning is counted and not sent.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --silent --show-error --fail-with-body "$url/v1/streams" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --header "Accept: application/json" \
  --data '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "penstock": {"reasoning": "hide"}}'
echo
