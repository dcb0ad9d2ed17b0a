-- Shared by the scripts that enqueue: put one request in its lane, unless it is there or full.

local FIELDS = 9
local now, micros = now_ms()
local max_live = setting(T, 'max_live', 1000000)
local live = redis.call('ZCARD', T .. ':live')
local quotas, counts = {}, {}
local opened = {}
-- How far this server's clock is ahead of that which the deadlines were made with, in ms.
local skew = 0

-- A lane starts at the least virtual time of its priority, so that idling earns no credit.
local function open_lane(priority, tenant, lane)
  if opened[lane] then
    return
  end
  if redis.call('EXISTS', lane) == 0 then
    redis.call('XGROUP', 'CREATE', lane, GROUP, 0, 'MKSTREAM')
  end
  local lanes = T .. ':lanes:' .. priority
  if not redis.call('ZSCORE', lanes, tenant) then
    local least = redis.call('ZRANGE', lanes, 0, 0, 'WITHSCORES')
    redis.call('ZADD', lanes, least[2] or 0, tenant)
    redis.call('HSET', T .. ':opened', priority .. ':' .. tenant, least[2] or 0)
  end
  opened[lane] = true
end

local function is_over_quota(tenant)
  if not quotas[tenant] then
    quotas[tenant] = setting(T, 'quota:' .. tenant, 0)
    counts[tenant] = tonumber(redis.call('HGET', T .. ':tenants', tenant) or 0)
  end
  return quotas[tenant] > 0 and counts[tenant] >= quotas[tenant]
end

-- Why there is no room for one more of a tenant, or nil if there is.
local function refusal_of(tenant)
  return live >= max_live and 'BUSY' or is_over_quota(tenant) and 'QUOTA' or nil
end

local function count_live(tenant)
  live, counts[tenant] = live + 1, counts[tenant] + 1
  count_tenant(tenant, 1)
end

-- A reference behind all others of its lane; returns its entry id.
local function line_up(id, priority, tenant, cost, most)
  local lane = T .. ':in:' .. priority .. ':' .. tenant
  open_lane(priority, tenant, lane)
  return redis.call('XADD', lane, '*', 'id', id, 'cost', cost, 'most', most)
end

-- ARGV from `i`: id, fingerprint, payload, tenant, priority, deadline ms, prompt tokens, most new
-- tokens, name of the reply stream ('' for a stream of its own).
-- Returns OK | DUP | CONFLICT | BUSY | QUOTA.
local function place(i)
  local id, print, payload, tenant = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local priority, cost, most = ARGV[i + 4], ARGV[i + 6], ARGV[i + 7]
  local deadline = int(math.max(tonumber(ARGV[i + 5]) + skew, 0))
  local known = redis.call('HGET', record_of(T, id), 'print')
  if known then
    return known == print and 'DUP' or 'CONFLICT'
  end
  local refusal = refusal_of(tenant)
  if refusal then
    return refusal
  end
  local entry = line_up(id, priority, tenant, cost, most)
  redis.call('DEL', T .. ':o:' .. id) -- of a record long expired
  redis.call('HSET', record_of(T, id), 'state', 'wait', 'epoch', 0, 'offset', 0, 'attempts', 0,
    'worker', '', 'tenant', tenant, 'priority', priority, 'entry', entry, 'deadline', deadline,
    'cost', cost, 'most', most, 'print', print, 'payload', payload, 'created', int(now),
    'reply', ARGV[i + 8])
  later('ZADD', T .. ':live', deadline, id)
  count_live(tenant)
  return 'OK'
end

-- Spread over a second, so that refused producers do not come back together.
local function retry_after_ms()
  return 1000 + math.floor(micros / 1000)
end
