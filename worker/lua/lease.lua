#!lua flags=allow-oom
-- Take, renew or end a worker's lease, with its registration.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker, lease ms (0: it ends now), 1 to wake who waits for work; then the fields and
--          values of the registration, if any
-- Returns  nothing
-- Twice    the same

-- @include record

local T, worker, lease = KEYS[1], ARGV[1], tonumber(ARGV[2])

if #ARGV > 3 then
  redis.call('HSET', T .. ':w:' .. worker, unpack(ARGV, 4))
end
redis.call('ZADD', T .. ':workers', lease > 0 and int(now_ms() + lease) or 0, worker)
if ARGV[3] == '1' then
  wake(T, 'wake')
end
