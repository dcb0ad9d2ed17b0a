#!lua flags=allow-oom
-- Claim what fits a worker's free budget, and renew its lease.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker, lease ms, number of this claim, sequences, tokens, kv tokens, most requests,
--          most ended references to pass over, most attempts, kv tokens of the worker when it
--          runs nothing (0: not known), requests that it runs of other shards, kv tokens that one
--          request holds at the most, however long (0: no such bound)
-- Returns  {more, claims, now, inbox, control, left, due}: more is 1 if it stopped at the
--          references, not at the budget; a claim is {id, epoch, attempts, payload, committed token
--          ids packed as uint32}; what is parked until `now` in ms or earlier was looked at; the
--          entries in the inbox; the last entry of the control stream, to wait from; left is 0 if
--          nothing could be claimed by anybody now; when the next parked one is due, or ''
-- Twice    under the same number it returns the same requests, as far as the worker still runs
--          them, and takes no others
--
-- Order: parked requests that are due; then the priorities, of which one that waits gets a token
-- for every AGE of its betters; inside one the lane of least virtual time, which is tokens over
-- the tenant's weight. The first that does not fit ends the claim: smaller ones may not overtake it
-- for ever. One that never fits this worker is claimed at once, for the engine to refuse it in its
-- own words. A paused shard gives nothing.
--
-- allow-oom: claiming is how a full server is drained.

-- @include record
-- @include lane

local T = KEYS[1]
local worker, lease, seq = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local sequences, tokens, kv = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local limit, scans, max_attempts = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local kv_total = tonumber(ARGV[10])
local kv_each = tonumber(ARGV[12])
local now = now_ms()
local own, self = T .. ':own:' .. worker, T .. ':w:' .. worker
-- New tokens that must find room in the KV cache beside the prompt; the rest may preempt.
local RESERVE = 256
-- Tokens that a priority may be served while a lower one waits for one token.
local AGE = 16
local holds = redis.call('SCARD', own) + tonumber(ARGV[11])
local claims, taken = {}, {}

redis.call('ZADD', T .. ':workers', int(now + lease), worker)

local function read_tokens(r)
  if r.offset == 0 then
    return ''
  end
  if r.reply ~= '' then
    return joined(T, r.id, 'tokens')
  end
  local parts = {}
  for _, entry in ipairs(try('XRANGE', T .. ':o:' .. r.id, '-', '+') or {}) do
    for i = 1, #entry[2], 2 do
      if entry[2][i] == 't' then
        parts[#parts + 1] = entry[2][i + 1]
      end
    end
  end
  return table.concat(parts)
end

-- Token ids in the order they were committed.
local function committed(r)
  r.tokens = r.tokens or read_tokens(r)
  return r.tokens
end

local function give(r)
  claims[#claims + 1] = { r.id, r.epoch, r.attempts, r.extra, committed(r) }
end

local function room()
  return sequences > 0 and tokens > 0 and limit > 0 and scans > 0
end

local function kv_length(r)
  return r.cost + r.offset + math.min(math.max(r.most - r.offset, 0), RESERVE)
end

-- What it holds of that at one time: a model with a window gives back what is behind it.
local function kv_cost(r)
  return kv_each > 0 and math.min(kv_length(r), kv_each) or kv_length(r)
end

local function never_fits(r)
  return kv_total > 0 and kv_length(r) > kv_total
end

local function fits(r)
  return kv_cost(r) <= kv or holds == 0 or never_fits(r)
end

local function take(r)
  r.epoch, r.attempts = r.epoch + 1, r.attempts + 1
  redis.call('HSET', record_of(T, r.id), 'state', 'run', 'epoch', int(r.epoch), 'attempts',
    int(r.attempts), 'worker', worker, 'claimed', int(now), 'charged', 1)
  later('SADD', own, r.id)
  sequences, limit, holds = sequences - 1, limit - 1, holds + 1
  if not never_fits(r) then -- what the engine refuses takes nothing
    tokens, kv = tokens - r.cost - r.offset, kv - kv_cost(r)
  end
  taken[#taken + 1] = r.id
  give(r)
end

-- Whether the request ended instead of being claimed; its reference was delivered before.
local function ended(r)
  if r.damage then
    r.epoch = r.epoch + 1
    finish_record(T, r, now, { finish = 'error', reason = 'the record is damaged: ' .. r.damage })
    return true
  end
  if r.deadline <= now then
    r.epoch = r.epoch + 1
    finish_record(T, r, now, { finish = 'expired', reason = 'deadline passed' })
    return true
  end
  if #committed(r) ~= 4 * r.offset then
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
    local r = load(T, id, 'payload')
    if not r then
      redis.call('ZREM', T .. ':park', id)
    elseif ended(r) then
      scans = scans - 1
    elseif not fits(r) then
      return false
    else
      later('ZREM', T .. ':park', id)
      take(r)
    end
  end
  return true
end

-- lane -> its references from where the group is, read in growing pieces, and how many of them are
-- to be delivered in the end.
local readers = {}

-- The next waiting reference of a lane: {entry id, fields}, or nil.
local function peek(lane)
  local reader = readers[lane]
  if not reader then
    if redis.call('TYPE', lane).ok ~= 'stream' then
      return nil
    end
    reader = { at = last_delivered(lane), entries = {}, next = 1, piece = 1, delivered = 0 }
    readers[lane] = reader
  end
  if reader.next > #reader.entries then
    reader.entries = redis.call('XRANGE', lane, '(' .. reader.at, '+', 'COUNT', reader.piece)
    reader.next, reader.piece = 1, math.min(reader.piece * 4, 64)
  end
  return reader.entries[reader.next]
end

local function deliver(lane, entry)
  local reader = readers[lane]
  reader.at, reader.next, reader.delivered = entry, reader.next + 1, reader.delivered + 1
end

-- priority -> the lane of least virtual time, what it was charged since that was looked up, and
-- how far ahead of the next it was.
local leads = {}

local function charge_lead(priority)
  local lead = leads[priority]
  if lead and lead.charge > 0 then
    redis.call('ZINCRBY', T .. ':lanes:' .. priority, lead.charge, lead.tenant)
  end
  leads[priority] = nil
end

-- The tenant whose lane has the least virtual time, or nil if there is none.
local function first_tenant(priority)
  local lead = leads[priority]
  if lead and (lead.charge == 0 or lead.charge < lead.spare) then
    return lead.tenant
  end
  charge_lead(priority)
  local two = redis.call('ZRANGE', T .. ':lanes:' .. priority, 0, 1, 'WITHSCORES')
  if two[1] then
    local spare = two[4] and tonumber(two[4]) - tonumber(two[2]) or math.huge
    leads[priority] = { tenant = two[1], charge = 0, spare = spare }
  end
  return two[1]
end

-- priority -> the next to be claimed: tenant, lane, entry id, request id, charge; false: none waits.
local heads = {}

local function head_of(priority)
  while heads[priority] == nil do
    local tenant = first_tenant(priority)
    local lane = tenant and T .. ':in:' .. priority .. ':' .. tenant
    local head = tenant and peek(lane)
    local id, charge = nil, nil
    if head then
      id, charge = read_reference(head[2])
    end
    if id then
      heads[priority] = { tenant = tenant, lane = lane, entry = head[1], id = id, charge = charge }
    elseif head and scans > 0 then
      deliver(lane, head[1])
      drop_entry(lane, head[1])
      scans = scans - 1
    elseif tenant and scans > 0 then
      -- Forgetting the lane of least virtual time costs nothing: it would start there again.
      forget_lane(T, priority, tenant)
      leads[priority] = nil
      scans = scans - 1
    else
      heads[priority] = false
    end
  end
  return heads[priority]
end

-- Claim the head of a priority. Returns what it takes, 0 for a reference that had ended, or nil if
-- it does not fit.
local function claim_head(priority, head)
  local r = load(T, head.id, 'payload')
  local is_live = r and r.state == 'wait' and r.entry == head.entry
  if is_live and r.deadline > now and not fits(r) then
    return nil
  end
  deliver(head.lane, head.entry)
  heads[priority] = nil
  if not is_live then -- ended while it waited
    drop_entry(head.lane, head.entry)
    scans = scans - 1
    return 0
  end
  r.state = 'park' -- delivered, owned by nobody: ending it drops the reference too
  r.tenant, r.priority = head.tenant, priority -- where it is, whatever the record says
  if ended(r) then
    scans = scans - 1
    return 0
  end
  local charge, lead = r.cost + r.most, leads[priority]
  lead.charge = lead.charge + charge / weight_of(T, head.tenant)
  take(r)
  return charge
end

-- Tokens that the betters of a waiting priority were served.
local passed = {}

-- The priority to claim from next, or nil if nothing waits.
local function next_priority()
  local first
  for priority = 2, 0, -1 do
    local head = head_of(priority)
    if not head then
      passed[priority] = 0
    elseif passed[priority] >= AGE * head.charge then
      return priority
    else
      first = priority
    end
  end
  return first
end

local function served(priority, charge)
  passed[priority] = math.max(passed[priority] - AGE * charge, 0)
  for below = priority + 1, 2 do
    if head_of(below) then
      passed[below] = passed[below] + charge
    end
  end
end

local function claim_waiting()
  local aged = T .. ':aged'
  local before = redis.call('HMGET', aged, 1, 2)
  passed = { [0] = 0, tonumber(before[1] or 0), tonumber(before[2] or 0) }
  while room() do
    local priority = next_priority()
    local charge = priority and claim_head(priority, head_of(priority))
    if not charge then
      break
    end
    served(priority, charge)
  end
  for priority = 1, 2 do
    if passed[priority] > 0 then
      redis.call('HSET', aged, priority, int(passed[priority]))
    elseif before[priority] then
      redis.call('HDEL', aged, priority)
    end
  end
end

-- What the claims so far have left to do; also after an error, so that a repeat finds them.
local function write_down()
  for priority = 0, 2 do
    charge_lead(priority)
  end
  for lane, reader in pairs(readers) do
    if reader.delivered > 0 then
      redis.call('XREADGROUP', 'GROUP', GROUP, 'workers', 'COUNT', reader.delivered, 'STREAMS',
        lane, '>')
    end
  end
  redis.call('HSET', self, 'claim_seq', seq, 'claim_ids', table.concat(taken, ' '))
end

local left = false

local function claim()
  if setting(T, 'paused', 0) ~= 0 then
    return
  end
  left = true
  if claim_parked() then
    claim_waiting()
    left = not room() or heads[0] or heads[1] or heads[2]
  end
end

local function next_due()
  local first = redis.call('ZRANGEBYSCORE', T .. ':park', '(' .. int(now), '+inf', 'WITHSCORES',
    'LIMIT', 0, 1)
  return first[2] or ''
end

local inbox = try('XLEN', T .. ':inbox') or 0
local newest = redis.call('XREVRANGE', T .. ':ctl', '+', '-', 'COUNT', 1)[1]
local control = newest and newest[1] or '0-0'
local last = redis.call('HMGET', self, 'claim_seq', 'claim_ids')
if last[1] == seq then
  for id in string.gmatch(last[2] or '', '%S+') do
    local r = load(T, id, 'payload')
    if r and r.state == 'run' and r.worker == worker then
      give(r)
    end
  end
  -- Without claims it looked at nothing: the worker must not wait on the strength of this.
  return { #claims == 0 and 1 or 0, claims, now, inbox, control, 1, next_due() }
end
settling(T, function()
  local is_well, why = pcall(claim)
  write_down()
  if not is_well then
    error(why)
  end
end)
return { scans <= 0 and 1 or 0, claims, now, inbox, control, left and 1 or 0, next_due() }
