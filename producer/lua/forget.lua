#!lua flags=allow-oom
-- Shorten the time that ended requests are kept, and delete their replies; the records of errors
-- keep their time, as dead letters need them.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     time to live in ms; ids
-- Returns  how many of them have ended well, or were cancelled or expired
-- Twice    the time to live is never made longer

-- @include record

local T, ttl = KEYS[1], ARGV[1]
local EMPTY_KEPT_MS = 60000
local count = 0
for i = 2, #ARGV do
  local record = record_of(T, ARGV[i])
  local f = redis.call('HMGET', record, 'state', 'finish', 'reply', 'at')
  -- After a server rolled back, what was read to its end may run again.
  if f[1] == 'end' and f[4] then
    local replies = T .. ':reply:' .. f[3]
    redis.call('XDEL', replies, f[4])
    if redis.call('XLEN', replies) == 0 then
      -- Kept for a while: a new stream might give the next reply an id that its reader has passed.
      redis.call('PEXPIRE', replies, EMPTY_KEPT_MS)
    end
  end
  if f[1] == 'end' and f[2] ~= 'error' then
    redis.call('PEXPIRE', record, ttl, 'LT')
    redis.call('PEXPIRE', T .. ':o:' .. ARGV[i], ttl, 'LT')
    count = count + 1
  end
end
return count
