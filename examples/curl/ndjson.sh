#!/bin/sh
# The same events, one JSON object a line; `| penstock verify -` judges them.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --no-buffer --silent --show-error --fail-with-body "$url/v1/streams" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --header "Accept: application/x-ndjson" \
  --data '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}'
