#!lua flags=allow-oom
-- Claim what fits a worker's free budget, and renew its lease.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker, lease ms, number of this claim, sequences, tokens, kv tokens, most requests,
--          most ended references to pass over, most attempts, kv tokens of the worker when it
--          runs nothing (0: not known)
-- Returns  {more, claims, now}: more is 1 if it stopped at the references, not at the budget; a
--          claim is {id, epoch, attempts, payload, committed token ids packed as uint32}; what is
--          parked until `now` in ms or earlier was looked at
-- Twice    under the same number it returns the same requests, as far as the worker still runs
--          them, and takes no others
--
-- Order: parked requests that are due; then the priorities; inside one the lane of least virtual
-- time. The first that does not fit ends the claim: smaller ones may not overtake it for ever. One
-- that never fits this worker is claimed at once, for the engine to refuse it in its own words.
--
-- allow-oom: claiming is how a full server is drained.

-- @include record

local T = KEYS[1]
local worker, lease, seq = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local sequences, tokens, kv = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local limit, scans, max_attempts = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local kv_total = tonumber(ARGV[10])
local now = now_ms()
local own, self = T .. ':own:' .. worker, T .. ':w:' .. worker
-- New tokens that must find room in the KV cache beside the prompt; the rest may preempt.
local RESERVE = 256
local holds = redis.call('SCARD', own)
local claims, taken = {}, {}

redis.call('ZADD', T .. ':workers', int(now + lease), worker)

-- Token ids in the order they were committed.
local function committed(r)
  if r.offset == 0 then
    return ''
  end
  local parts = {}
  for _, entry in ipairs(redis.call('XRANGE', T .. ':o:' .. r.id, '-', '+')) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 't' then
        parts[#parts + 1] = entry[2][i + 1]
      end
    end
  end
  return table.concat(parts)
end

local function give(r)
  claims[#claims + 1] = {
    r.id, r.epoch, r.attempts, redis.call('HGET', record_of(T, r.id), 'payload'), committed(r),
  }
end

local function room()
  return sequences > 0 and tokens > 0 and limit > 0 and scans > 0
end

local function kv_cost(r)
  return r.cost + r.offset + math.min(math.max(r.most - r.offset, 0), RESERVE)
end

local function never_fits(r)
  return kv_total > 0 and kv_cost(r) > kv_total
end

local function fits(r)
  return kv_cost(r) <= kv or holds == 0 or never_fits(r)
end

local function take(r)
  r.epoch, r.attempts = r.epoch + 1, r.attempts + 1
  redis.call('HSET', record_of(T, r.id), 'state', 'run', 'epoch', int(r.epoch), 'attempts',
    int(r.attempts), 'worker', worker, 'claimed', int(now))
  redis.call('SADD', own, r.id)
  sequences, limit, holds = sequences - 1, limit - 1, holds + 1
  if not never_fits(r) then -- what the engine refuses takes nothing
    tokens, kv = tokens - r.cost - r.offset, kv - kv_cost(r)
  end
  taken[#taken + 1] = r.id
  give(r)
end

-- Whether the request ended instead of being claimed; its reference was delivered before.
local function ended(r)
  if r.deadline <= now then
    r.epoch = r.epoch + 1
    finish_record(T, r, now, { finish = 'expired', reason = 'deadline passed' })
    return true
  end
  if r.offset > 0 and redis.call('TYPE', T .. ':o:' .. r.id).ok ~= 'stream' then
    r.epoch = r.epoch + 1
    finish_record(T, r, now, { finish = 'error', reason = 'the tokens written so far are gone' })
    return true
  end
  if r.attempts < max_attempts then
    return false
  end
  local why = redis.call('HGET', record_of(T, r.id), 'reason') or ''
  why = 'given up after ' .. int(r.attempts) .. ' attempts: '
    .. (why == '' and 'its worker died each time' or why)
  redis.call('XADD', T .. ':dead', 'MAXLEN', '~', DEAD_KEPT, '*', 'id', r.id, 'reason', why,
    'attempts', int(r.attempts))
  r.epoch = r.epoch + 1
  finish_record(T, r, now, { finish = 'error', reason = why })
  return true
end

-- False: the head does not fit, so nothing further is claimed.
local function claim_parked()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', T .. ':park', '-inf', int(now), 'LIMIT', 0,
    math.max(limit, 0))) do
    if not room() then
      return false
    end
    local r = load(T, id)
    if not r then
      redis.call('ZREM', T .. ':park', id)
    elseif ended(r) then
      scans = scans - 1
    elseif not fits(r) then
      return false
    else
      redis.call('ZREM', T .. ':park', id)
      take(r)
    end
  end
  return true
end

local delivered = {} -- lane -> last delivered entry id

local function last_delivered(lane)
  if not delivered[lane] then
    local info = redis.call('XINFO', 'GROUPS', lane)[1]
    if not info then -- a stream that no enqueue made
      redis.call('XGROUP', 'CREATE', lane, GROUP, 0)
      info = { 'last-delivered-id', '0-0' }
    end
    for i = 1, #info, 2 do
      if info[i] == 'last-delivered-id' then
        delivered[lane] = info[i + 1]
      end
    end
  end
  return delivered[lane]
end

-- The next waiting reference of a lane: {entry id, request id}, or nil.
local function peek(lane)
  if redis.call('EXISTS', lane) == 0 then
    return nil
  end
  local ahead = redis.call('XRANGE', lane, '(' .. last_delivered(lane), '+', 'COUNT', 1)[1]
  return ahead and { ahead[1], ahead[2][2] }
end

local function deliver(lane, entry)
  redis.call('XREADGROUP', 'GROUP', GROUP, 'workers', 'COUNT', 1, 'STREAMS', lane, '>')
  delivered[lane] = entry
end

-- Claim the head of a lane. False: it does not fit.
local function claim_head(lanes, tenant, lane, head)
  local r = load(T, head[2])
  if not r or r.state ~= 'wait' or r.entry ~= head[1] then
    deliver(lane, head[1]) -- ended while it waited
    drop_entry(lane, head[1])
    scans = scans - 1
    return true
  end
  if r.deadline > now and not fits(r) then
    return false
  end
  deliver(lane, head[1])
  r.state = 'park' -- delivered, owned by nobody: ending it drops the reference too
  if ended(r) then
    scans = scans - 1
    return true
  end
  redis.call('ZINCRBY', lanes, r.cost + r.most, tenant)
  take(r)
  return true
end

local function claim_waiting(priority)
  local lanes = T .. ':lanes:' .. priority
  while room() do
    local tenant = redis.call('ZRANGE', lanes, 0, 0)[1]
    if not tenant then
      return true
    end
    local lane = T .. ':in:' .. priority .. ':' .. tenant
    local head = peek(lane)
    if not head then
      -- Forgetting the lane of least virtual time costs nothing: it would start there again.
      redis.call('ZREM', lanes, tenant)
      scans = scans - 1
    elseif not claim_head(lanes, tenant, lane, head) then
      return false
    end
  end
  return false
end

local last = redis.call('HMGET', self, 'claim_seq', 'claim_ids')
if last[1] == seq then
  for id in string.gmatch(last[2], '%S+') do
    local r = load(T, id)
    if r and r.state == 'run' and r.worker == worker then
      give(r)
    end
  end
  return { 0, claims, now }
end
local go_on = claim_parked()
for priority = 0, 2 do
  go_on = go_on and claim_waiting(priority)
end
redis.call('HSET', self, 'claim_seq', seq, 'claim_ids', table.concat(taken, ' '))
return { scans <= 0 and 1 or 0, claims, now }
