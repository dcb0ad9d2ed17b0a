#!lua flags=allow-oom
-- Give a request back: parked for any worker, or ended if that was asked for meanwhile.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     id, epoch, undo (1: the attempt does not count), delay ms (0: at once after undo, else
--          growing with the attempts), last error ('' keeps the one before), worker
-- Returns  OK | FENCED
-- Twice    OK, or FENCED once another worker has it: it is gone either way

-- @include record

local T, id, epoch = KEYS[1], ARGV[1], tonumber(ARGV[2])
local undo, delay, reason, worker = ARGV[3] == '1', tonumber(ARGV[4]), ARGV[5], ARGV[6]
local BACKOFF_MS, BACKOFF_MOST_MS = 1000, 60000
local now, micros = now_ms()

local r = load(T, id)
if r and r.state == 'park' and r.epoch == epoch + 1 then
  return 'OK'
end
if not r or r.state ~= 'run' or r.epoch ~= epoch or r.worker ~= worker then
  return 'FENCED'
end
local attempts = r.attempts
if undo then
  attempts = math.max(attempts - 1, 0)
elseif delay == 0 then
  local full = math.min(BACKOFF_MS * 2 ^ math.min(attempts - 1, 16), BACKOFF_MOST_MS)
  delay = math.floor(full * (0.5 + micros / 2000000)) -- jitter: half to all of it
end
if reason ~= '' then
  redis.call('HSET', record_of(T, id), 'reason', reason)
end
settling(T, function()
  park_record(T, r, now, now + delay, attempts)
end)
wake(T, 'wake') -- a delay too: who waits must learn how long
return 'OK'
