#!/bin/sh
# Starts a stream, cancels it by its id as soon as it runs, and shows its last two events.
set -eu
url=${URL:-http://127.0.0.1:8080}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

curl --no-buffer --silent --show-error "$url/v1/streams" \
  --header "Authorization: Bearer ${KEY:-none}" \
  --header "Accept: application/x-ndjson" \
  --dump-header "$work/head" --output "$work/events" \
  --data '{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "vllm_xargs": {"replay": "tour"}}' &
stream=$!

# The id comes with the head of the answer, before the first event.
for _ in $(seq 100); do
  id=$(cat "$work/head" 2>/dev/null | tr -d '\r' | sed -n 's/^[Xx]-[Ss]tream-[Ii]d: *//p')
  [ -n "$id" ] && break
  sleep 0.1
done

curl --silent --show-error --fail-with-body --request DELETE "$url/v1/streams/$id" \
  --header "Authorization: Bearer ${KEY:-none}"
wait "$stream"
tail -n 2 "$work/events"
