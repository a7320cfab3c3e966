"""The shell: all the awaiting.

`server` has the routes, `accept` chooses a form of the events; `serving` makes an exchange for each request that
`admission` has room for, and `asking` finds who answers it. `driver` carries one exchange between `engine` (the
connection to vLLM) and `client` (the connection to the caller). `cluster` chooses the engine, `sources` are the ways
an answer comes, `tagged` is the connection to the plugin. Between driver and client stands `streams`: every event goes
into a log of `stores/` before it is sent, and `resume` answers from logs. `auth` knows the keys and lets callers in;
`books` opens an account for each stream: `rate_limits` over `ledgers`, and `usage_records`, which go to `sinks`.
`tokens` asks an issuer who a caller is, `callers` says what one is; `tls` and `cors` guard the door, `watched` looks at
files again. `police` has what moderation needs: `rulebook`, `moderator` and `audit`. `tools` runs the calls that are
bound here, at addresses that `reach` allows, for MCP by `mcp_transport`. `prepared` answers without an engine (with
`answer_cache`), `passthrough` hands other routes on. `telemetry` knows the traces, `replay` is the mock engine.
"""
