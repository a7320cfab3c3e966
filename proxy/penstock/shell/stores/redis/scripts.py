"""What must be one step in Redis, as Lua: beginning a stream, ending one whose replica died, and giving one up.

An heir that ends a stream leaves its name at `{prefix}:{id}:heir` for as long as any stream may live. Whoever finds it
there has lost the stream and its bill, however long it slept and whatever of the log has been forgotten meanwhile.
"""

# KEYS: meta, log, heir, the open streams of the replica, the claim (where there is a key).
# ARGV: meta, seconds to keep, stream's id, claim, first and last part of the name of a stream's meta.
# Returns 1, 0 where an heir has ended the stream, or the claim that had the key before. May be repeated. The entry
# 0-1 says nothing; it is there so that a log which is gone is told from one that was never written to.
BEGIN = """
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
if KEYS[5] then
  local held = redis.call('GET', KEYS[5])
  if held then
    local other = cjson.decode(held)['stream_id']
    if other ~= ARGV[3] and redis.call('EXISTS', ARGV[5] .. other .. ARGV[6]) == 1 then return held end
  end
  redis.call('SET', KEYS[5], ARGV[4], 'EX', ARGV[2])
end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XADD', KEYS[2], '0-1', 'o', '1')
  redis.call('EXPIRE', KEYS[2], ARGV[2])
end
redis.call('SADD', KEYS[4], ARGV[3])
return 1
"""

# KEYS: meta, log, heir, the open streams of the dead replica, its lease, the claim (where it shall be free again).
# ARGV: stream's id, heir's name, seconds to keep that name, seconds to keep the rest, id of the entry, its fields.
# Returns 1 where the stream is ended by this heir, be it by an earlier try; 0 where its replica lives or was faster.
END_LOST = """
local heir = redis.call('GET', KEYS[3])
if heir then return heir == ARGV[2] and 1 or 0 end
if redis.call('EXISTS', KEYS[1]) == 0 or redis.call('EXISTS', KEYS[5]) == 1 then return 0 end
local added = redis.pcall('XADD', KEYS[2], ARGV[5], unpack(ARGV, 6))
if type(added) == 'table' and added['err'] then return 0 end
redis.call('SET', KEYS[3], ARGV[2], 'EX', ARGV[3])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('EXPIRE', KEYS[2], ARGV[4])
redis.call('SREM', KEYS[4], ARGV[1])
if KEYS[6] then
  local held = redis.call('GET', KEYS[6])
  if held and cjson.decode(held)['stream_id'] == ARGV[1] then redis.call('DEL', KEYS[6]) end
end
return 1
"""

# KEYS: meta, log, heir, the open streams of the replica. ARGV: stream's id.
# Returns 1 where an heir had ended the stream; else nobody can any more, nor follow it, and it returns 0.
GIVE_UP = """
redis.call('SREM', KEYS[4], ARGV[1])
if redis.call('EXISTS', KEYS[3]) == 1 then return 1 end
redis.call('DEL', KEYS[1], KEYS[2])
return 0
"""
