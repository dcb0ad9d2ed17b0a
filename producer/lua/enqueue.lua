#!lua
-- Enqueue one or many requests: for each the record, its reference, the indexes and a wake.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     per request: id, fingerprint, payload, tenant, priority, deadline ms, prompt tokens,
--          most new tokens
-- Returns  per request: OK | DUP (same id, same content: nothing done) | CONFLICT (same id, other
--          content) | BUSY (as many live requests as max_live); and last the retry-after in ms,
--          0 unless one was BUSY
-- Twice    the second run finds its own records: DUP

-- @include record

local T = KEYS[1]
local FIELDS = 8
local now, micros = now_ms()
local max_live = setting(T, 'max_live', 1000000)
local replies, added, busy = {}, false, false

-- A lane starts at the least virtual time of its priority, so that idling earns no credit.
local function open_lane(priority, tenant)
  local lanes = T .. ':lanes:' .. priority
  if not redis.call('ZSCORE', lanes, tenant) then
    local least = redis.call('ZRANGE', lanes, 0, 0, 'WITHSCORES')
    redis.call('ZADD', lanes, least[2] or 0, tenant)
  end
end

local function enqueue(id, print, payload, tenant, priority, deadline, cost, most)
  local lane = T .. ':in:' .. priority .. ':' .. tenant
  if redis.call('EXISTS', lane) == 0 then
    redis.call('XGROUP', 'CREATE', lane, GROUP, 0, 'MKSTREAM')
  end
  local entry = redis.call('XADD', lane, '*', 'id', id, 'cost', cost, 'most', most)
  redis.call('DEL', T .. ':o:' .. id) -- of a record long expired
  redis.call('HSET', record_of(T, id), 'state', 'wait', 'epoch', 0, 'offset', 0, 'attempts', 0,
    'worker', '', 'tenant', tenant, 'priority', priority, 'entry', entry, 'deadline', deadline,
    'cost', cost, 'most', most, 'print', print, 'payload', payload, 'created', int(now))
  redis.call('ZADD', T .. ':live', deadline, id)
  open_lane(priority, tenant)
end

local live = redis.call('ZCARD', T .. ':live')
for i = 1, #ARGV, FIELDS do
  local id, print = ARGV[i], ARGV[i + 1]
  local known = redis.call('HGET', record_of(T, id), 'print')
  if known then
    replies[#replies + 1] = known == print and 'DUP' or 'CONFLICT'
  elseif live >= max_live then
    replies[#replies + 1] = 'BUSY'
    busy = true
  else
    enqueue(id, print, ARGV[i + 2], ARGV[i + 3], ARGV[i + 4], ARGV[i + 5], ARGV[i + 6], ARGV[i + 7])
    replies[#replies + 1] = 'OK'
    live = live + 1
    added = true
  end
end
if added then
  wake(T, 'wake')
end
-- Spread over a second, so that refused producers do not come back together.
replies[#replies + 1] = busy and 1000 + math.floor(micros / 1000) or 0
return replies
