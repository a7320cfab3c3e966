#!/bin/sh
# OpenAI chat, streamed, with the usage at its end.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --no-buffer --silent --show-error --fail-with-body "$url/v1/chat/completions" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --data @- <<'JSON'
{
  "model": "tiny",
  "messages": [{"role": "user", "content": "hi"}],
  "stream": true,
  "stream_options": {"include_usage": true}
}
JSON
