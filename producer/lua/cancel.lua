#!lua flags=allow-oom
-- Cancel a request: at once if it waits or is parked, by a flag its worker meets if it runs.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     id
-- Returns  OK (it is cancelled, or will be within one flush) | ENDED (otherwise, before) | NONE
-- Twice    OK again

-- @include record

local T, id = KEYS[1], ARGV[1]
local r = load(T, id)
if not r then
  return 'NONE'
end
if r.state == 'end' then
  return r.finish == 'cancelled' and 'OK' or 'ENDED'
end
if r.state == 'run' then
  redis.call('HSET', record_of(T, id), 'cancel', 1)
  wake(T, 'cancel')
  return 'OK'
end
r.epoch = r.epoch + 1
settling(T, function()
  finish_record(T, r, (now_ms()), { finish = 'cancelled', reason = 'cancelled by the producer' })
end)
return 'OK'
