#!/bin/sh
# Leaves a stream in the middle and takes it up after its third event.
set -eu
url=${URL:-http://127.0.0.1:8080}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

curl --no-buffer --silent --max-time 1 "$url/v1/streams" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --dump-header "$work/head" --output "$work/events" \
  --data '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}],
           "vllm_xargs": {"replay": "tour"}, "penstock": {"on_disconnect": "linger"}}' || true
id=$(tr -d '\r' < "$work/head" | sed -n 's/^[Xx]-[Ss]tream-[Ii]d: *//p')

curl --no-buffer --silent --show-error --fail-with-body "$url/v1/streams/$id/events" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --header "Last-Event-ID: $id:3"
