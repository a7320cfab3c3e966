"""Logs that every replica finds, in Redis Streams; a replica that dies is noticed and its streams are ended.

`store` is the whole, of these parts: `link` (the connection, and who lives), `carried` (the streams of this replica,
written ahead), `mirrors` (those of others, and words between replicas), `heirs` (those of the dead), `scripts` (what
must be one step). The entry that starts with event N has the id `N-0`, so that Redis itself refuses a second writer of
the same event, and that a write may be repeated.

    {prefix}:{id}:meta       JSON: who owns the stream, what form it has, which replica carries it
    {prefix}:{id}:log        stream: `d` bytes, `n` the last event in them, `e` on the last entry, `w` an answer's head
    {prefix}:{id}:heir       the replica that has ended the stream of another one, and bills it
    {prefix}:key:…           JSON: the stream that answers an idempotency key
    {prefix}:replicas        set of replica names
    {prefix}:at:{replica}    its lease: gone where the replica is
    {prefix}:at:{replica}:open      set of the streams that it carries
    {prefix}:at:{replica}:control   stream of what others ask of it: cancel, watch, annotate; and of their answers
"""
