"""The core: signals in, commands out; no I/O, no clock, no log, no randomness.

`request` reads what a caller wants and `prompt` what its prompt tells, `setting` is what a stream is given; `exchange`
takes it from its first signal to its single ending, `journey` holds the order of the steps, `transcript` numbers what
they give. The steps on the way, in order: `engine_stream` (with `sse`, `mould` and `characters`) or `tagged_stream`
(with `frames` and `detokenize`), `channels` (with `families` and `markers`), `stop_strings`, `tool_calls` (with
`tool_markup`, `json_text` and `schemas`), `tool_policy`, `citations`, `moderation`, `verdicts`, `structured`,
`tool_loop`, `accounting`, `blocks`, `pacing`, and a dialect of `dialects/`. `extras` are what comes with a text,
`wishes` what a request asks of tools and values, `notes` what a backend adds. `events` travel between the steps;
`signals` come from the shell and `commands` go to it; `errors` says whose fault it was. Moderation holds text in
`lanes`; its `rules` are compiled from `patterns` (which `unambiguous` finds fit), see text as `folding` shows it and
may ask for `checksums`; `timeline` is for its audit. `kept_answer` is an engine's answer to be told again. `verifier`
judges an event log, `fold` adds one up, `resuming` finds a cursor in one, `continuing` hands its partial answer back,
`lost` ends one whose replica died, `recording` reads replays.
"""
