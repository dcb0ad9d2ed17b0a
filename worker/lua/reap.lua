#!lua flags=allow-oom
-- Park what dead workers ran, and end what is overdue. Any worker may call it at any time.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     most requests to move
-- Returns  requests moved; as many as asked for: there may be more
-- Twice    the second run finds less to do

-- @include record

local T, budget = KEYS[1], tonumber(ARGV[1])
local now = now_ms()
local WORKERS_AT_ONCE = 16
local moved, parked, failure = 0, 0, nil

local function orphan(worker, own, id)
  local r = load(T, id)
  if r and r.state == 'run' and r.worker == worker then
    park_record(T, r, now, now, r.attempts)
    parked = parked + 1
  else
    redis.call('SREM', own, id)
  end
end

local function bury(worker)
  local own = T .. ':own:' .. worker
  for _, id in ipairs(redis.call('SRANDMEMBER', own, budget - moved)) do
    orphan(worker, own, id)
    moved = moved + 1
  end
  if redis.call('SCARD', own) == 0 then
    redis.call('ZREM', T .. ':workers', worker)
    redis.call('DEL', T .. ':w:' .. worker)
  end
end

local function expire(id)
  local r = load(T, id)
  if not r or r.state == 'end' then
    redis.call('ZREM', T .. ':live', id)
    return
  end
  r.epoch = r.epoch + 1
  finish_record(T, r, now, { finish = 'expired', reason = 'deadline passed' })
end

settling(T, function()
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', T .. ':workers', '-inf', int(now), 'LIMIT',
    0, WORKERS_AT_ONCE)) do
    if moved < budget then
      bury(worker)
    end
  end
end)
settling(T, function() -- what was just ended is no longer live
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', T .. ':live', '-inf', int(now), 'LIMIT', 0,
    math.max(budget - moved, 0))) do
    local is_well, error_of_one = pcall(expire, id)
    failure = failure or not is_well and error_of_one
    moved = moved + 1
  end
end)
if redis.call('ZCARD', T .. ':live') == 0 then
  redis.call('DEL', T .. ':tenants') -- counts of records that were lost
end
local oldest = math.max(now - setting(T, 'dead_ttl_ms', DEAD_TTL_MS), 0)
try('XTRIM', T .. ':dead', 'MINID', int(oldest))
if parked > 0 then
  wake(T, 'wake')
end
if failure then
  error(failure)
end
return moved
