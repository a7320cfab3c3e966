"""Penstock's plugin for vLLM: tagged token ids, a step at a time, for the sidecar in `proxy/penstock`.

The map: vLLM loads `endpoint` (its routes) and `register` (in each of its processes). `connection` is one sidecar's
WebSocket; it opens requests through `chat` and sends what its `outbox` holds. `tap` watches vLLM's engine steps and
tells the `streams`, which part their tokens into `channels` by `vocabulary` and write `frames`. In the engine's own
process `grammar_stop` ends structured values: it asks the `language` of their grammar, which `notations` reads, by
`white_space`. `grammar_processor` does on the device, with `grammar_tensors`, what a mask of tokens can tell; `tails`
says of which grammars that is enough. Only `tap`, `chat` and those two know vLLM's classes, and nothing here is
imported by the sidecar, nor the other way round.
"""

__version__ = "0.1.0"
