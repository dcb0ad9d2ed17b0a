#!lua flags=no-writes
-- A snapshot of a shard held against its own rules, while everything is in motion.
--
-- KEYS[1]  T, the tag of the shard
-- Returns  what is wrong, one line each

local T = KEYS[1]
local wrong = {}

local function note(id, what)
  wrong[#wrong + 1] = id .. ': ' .. what
end

local function check(id)
  local f = redis.call('HMGET', T .. ':r:' .. id, 'state', 'worker', 'tenant', 'priority', 'entry',
    'epoch')
  local state = f[1]
  if state ~= 'wait' and state ~= 'run' and state ~= 'park' then
    note(id, 'is live in state ' .. tostring(state))
    return
  end
  local parked = redis.call('ZSCORE', T .. ':park', id)
  if (state == 'park') ~= (parked and true or false) then
    note(id, 'state ' .. state .. ', parked ' .. tostring(parked))
  end
  local last = redis.call('XREVRANGE', T .. ':o:' .. id, '+', '-', 'COUNT', 1)[1]
  if state == 'park' and last and tonumber(last[2][2]) >= tonumber(f[6]) then
    note(id, 'is parked under the epoch of its last writer')
  end
  if state == 'run' and redis.call('SISMEMBER', T .. ':own:' .. f[2], id) == 0 then
    note(id, 'runs, and its worker does not own it')
  end
  if state == 'run' and not redis.call('ZSCORE', T .. ':workers', f[2]) then
    note(id, 'runs on a worker without a lease')
  end
  local lane = T .. ':in:' .. f[4] .. ':' .. f[3]
  if #redis.call('XRANGE', lane, f[5], f[5]) == 0 then
    note(id, 'state ' .. state .. ', and its reference is gone')
  end
end

for _, id in ipairs(redis.call('ZRANGE', T .. ':live', 0, -1)) do
  check(id)
end
for _, id in ipairs(redis.call('ZRANGE', T .. ':park', 0, -1)) do
  if not redis.call('ZSCORE', T .. ':live', id) then
    note(id, 'is parked and not live')
  end
end
for _, worker in ipairs(redis.call('ZRANGE', T .. ':workers', 0, -1)) do
  for _, id in ipairs(redis.call('SMEMBERS', T .. ':own:' .. worker)) do
    local state = redis.call('HGET', T .. ':r:' .. id, 'state')
    if not redis.call('ZSCORE', T .. ':live', id) then
      note(id, 'is owned and not live')
    end
    if state ~= 'run' then
      note(id, 'is owned in state ' .. tostring(state))
    end
  end
end
return wrong
