"""The core: signals in, commands out; no I/O, no clock, no log, no randomness.

`exchange` holds the journey and its single ending. The steps on the way, in order: `engine_stream` (with `sse` and
`characters`), `channels` (with `families` and `markers`), `tool_calls`, `stop_strings`, `moderation`,
`accounting`, `blocks`, and a dialect of `dialects/`. `events` travel between the steps; `signals` come from the
shell and `commands` go to it. `verifier` judges an event log, `fold` adds one up, `recording` reads replays.
"""
