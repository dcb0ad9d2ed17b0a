#!lua flags=allow-oom
-- Drop dead letters for good: they are no longer listed, and cannot be tried again.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     ids
-- Returns  how many were dropped
-- Twice    0

-- @include record

local T, count = KEYS[1], 0
for i = 1, #ARGV do
  local record = record_of(T, ARGV[i])
  local entry = redis.call('HGET', record, 'dead')
  if entry then
    redis.call('XDEL', T .. ':dead', entry)
    redis.call('HDEL', record, 'dead', 'payload')
    redis.call('PEXPIRE', record, ttl_of(T, 'result_ttl_ms', 86400000))
    count = count + 1
  end
end
return count
