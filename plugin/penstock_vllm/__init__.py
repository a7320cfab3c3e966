"""Penstock's plugin for vLLM. It registers no hook yet: a vLLM that has it installed serves as if it had not.

The sidecar reads vLLM's plain chunks; see `proxy/penstock`. The two packages never import each other.
"""
