"""Where the logs of streams are kept.

A log is written before its bytes are sent and outlives its stream for `store.retention_seconds`, so that a client that
lost its connection finds everything again. `log` is the log of one stream and what is asked of a store; `memory` keeps
logs in this process, `redis` where every replica finds them.
"""
