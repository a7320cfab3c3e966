"""Penstock, the sidecar: one stable event schema in front of vLLM.

The map: `cli` and `demo` are what a user starts, `app` puts the parts together, `settings` says what can be set
(`access_settings` who may do what), `shell` does all the awaiting, `core` decides. `core/exchange.py` is the
journey of one request; start there.
"""

__version__ = "0.1.0"
