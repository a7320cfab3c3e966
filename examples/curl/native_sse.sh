#!/bin/sh
# One answer as server-sent events. The recorded tour of `penstock replay` shows reasoning, answer and a tool call.
set -eu
url=${URL:-http://127.0.0.1:8080}

curl --no-buffer --silent --show-error --fail-with-body "$url/v1/streams" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --data @- <<'JSON'
{
  "model": "tiny",
  "messages": [{"role": "user", "content": "hi"}],
  "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}],
  "vllm_xargs": {"replay": "tour"}
}
JSON
