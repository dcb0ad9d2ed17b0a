-- Shared by the scripts: server time, settings, and the one way a request ends.
-- `T` is the tag of the shard, `r` what `load` gave.

local GROUP = 'g'
local DEAD_KEPT = 10000
local DEAD_TTL_MS = 7 * 86400000
local CONTROL_KEPT = 1000

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), tonumber(time[2])
end

-- Numbers go to the server in full: tostring would round times to 14 digits.
local function int(number)
  return string.format('%.0f', number)
end

-- Whether it is one of the numbers that we write: none is negative, infinite or NaN.
local function is_sound(value)
  return value and value >= 0 and value < 2 ^ 53
end

local settings = {}

local function setting(T, name, default)
  if settings[name] == nil then
    settings[name] = redis.call('HGET', T .. ':settings', name)
  end
  local value = tonumber(settings[name] or default)
  return is_sound(value) and value or default
end

local function weight_of(T, tenant)
  local weight = setting(T, 'weight:' .. tenant, 1)
  return weight > 0 and weight or 1
end

local function record_of(T, id)
  return T .. ':r:' .. id
end

-- What a command gives, or nil where its key is of another type or holds entries that we did not
-- write: such damage to one request must not fail the calls that serve all the others.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    if string.find(reply.err, 'WRONGTYPE', 1, true)
      or string.find(reply.err, 'equal or smaller', 1, true) then
      return nil
    end
    error(reply)
  end
  return reply
end

local NUMBERS = { 'epoch', 'offset', 'attempts', 'deadline', 'cost', 'most' }
local TEXTS = { 'worker', 'tenant', 'priority', 'entry' }

-- Whoever may write records may write anything there. `damage` says what is wrong; the claim ends
-- such a request, and until then it is as good as one with a 0 in that place.
local function mend(r)
  for _, name in ipairs(NUMBERS) do
    if not is_sound(r[name]) or r[name] % 1 ~= 0 then
      r[name], r.damage = 0, name .. ' must be a whole number'
    end
  end
  for _, name in ipairs(TEXTS) do
    if not r[name] then
      r[name], r.damage = '', name .. ' must be given'
    end
  end
  return r
end

-- The fields of a record that decide what may happen to it, or nil if there is no record; of more
-- fields only one, as `extra`.
local function load(T, id, ...)
  if string.find(id, '[^%w_.-]') then -- no request has such an id
    return nil
  end
  local f = try('HMGET', record_of(T, id), 'state', 'epoch', 'offset', 'attempts', 'worker',
    'tenant', 'priority', 'entry', 'deadline', 'cost', 'most', 'cancel', 'finish', 'digest',
    'reply', 'charged', ...)
  if not f or not f[1] then
    return nil
  end
  return mend({
    id = id, state = f[1], epoch = tonumber(f[2]), offset = tonumber(f[3]),
    attempts = tonumber(f[4]), worker = f[5], tenant = f[6], priority = f[7], entry = f[8],
    deadline = tonumber(f[9]), cost = tonumber(f[10]), most = tonumber(f[11]),
    cancel = f[12] == '1', finish = f[13], digest = f[14] or '', reply = f[15] or '',
    charged = f[16] == '1', extra = f[17],
  })
end

local function lane_of(T, r)
  return T .. ':in:' .. r.priority .. ':' .. r.tenant
end

-- What a call does to the keys that its requests share waits for `settle`, so that it costs one
-- command a call and not one a request. A script that may end or place a request does so within
-- `settling`.
local batches = {} -- command and key -> the whole command
local dropped = {} -- lane -> delivered references to remove
local tenants = {} -- tenant -> more or less live requests
local credits = {} -- priority -> tenant -> virtual time given back
local reply_ttls = {} -- reply stream -> time to live

local function later(command, key, ...)
  local name = command .. key
  local batch = batches[name] or { command, key }
  for _, argument in ipairs({ ... }) do
    batch[#batch + 1] = argument
  end
  batches[name] = batch
end

local function drop_entry(lane, entry)
  local entries = dropped[lane] or {}
  entries[#entries + 1] = entry
  dropped[lane] = entries
end

local function count_tenant(tenant, by)
  tenants[tenant] = (tenants[tenant] or 0) + by
end

-- Remove delivered references, and their stream with the last one.
local function drop_entries(lane, entries)
  redis.call('XACK', lane, GROUP, unpack(entries))
  redis.call('XDEL', lane, unpack(entries))
  if redis.call('XLEN', lane) == 0 then
    redis.call('DEL', lane)
  end
end

-- Give virtual time back to a lane, but not below where it was opened: what was charged to a lane
-- of that name which is forgotten since must not become credit.
local function credit(T, priority, tenant, amount)
  local lanes, name = T .. ':lanes:' .. priority, priority .. ':' .. tenant
  local score = redis.call('ZADD', lanes, 'XX', 'INCR', -amount, tenant)
  local floor = score and tonumber(redis.call('HGET', T .. ':opened', name) or 0)
  if score and tonumber(score) < floor then
    redis.call('ZADD', lanes, 'XX', floor, tenant)
  end
end

local function forget_lane(T, priority, tenant)
  redis.call('ZREM', T .. ':lanes:' .. priority, tenant)
  redis.call('HDEL', T .. ':opened', priority .. ':' .. tenant)
end

local function settle(T)
  for _, batch in pairs(batches) do
    redis.call(unpack(batch))
  end
  for lane, entries in pairs(dropped) do
    drop_entries(lane, entries)
  end
  for priority, given in pairs(credits) do
    for tenant, amount in pairs(given) do
      credit(T, priority, tenant, amount)
    end
  end
  for tenant, by in pairs(tenants) do
    if redis.call('HINCRBY', T .. ':tenants', tenant, by) <= 0 then
      redis.call('HDEL', T .. ':tenants', tenant)
    end
  end
  for replies, ttl in pairs(reply_ttls) do
    redis.call('PEXPIRE', replies, ttl)
  end
  batches, dropped, tenants, credits, reply_ttls = {}, {}, {}, {}, {}
end

-- Run the body of a script, and settle also what it did before an error.
local function settling(T, body)
  local is_well, reply = pcall(body)
  settle(T)
  if not is_well then
    error(reply)
  end
  return reply
end

local function wake(T, kind)
  redis.call('XADD', T .. ':ctl', 'MAXLEN', '~', CONTROL_KEPT, '*', 't', kind)
end

local function ttl_of(T, name, default)
  return int(setting(T, name, default))
end

-- Lanes are charged for the most that a request may take; what it did not take is given back.
local function give_back(T, r, total)
  local unused = r.most - total
  if unused > 0 and r.charged then
    local given = credits[r.priority] or {}
    given[r.tenant] = (given[r.tenant] or 0) + unused / weight_of(T, r.tenant)
    credits[r.priority] = given
  end
end

-- The fields of an output's entry, with its log probabilities if there are any.
local function entry_of(logprobs, ...)
  local fields = { ... }
  if logprobs and logprobs ~= '' then
    fields[#fields + 1] = 'l'
    fields[#fields + 1] = logprobs
  end
  return unpack(fields)
end

-- The last entry of a request's own stream: its last tokens with the finish.
local function end_output(T, r, total, last, digest, ttl)
  local output = T .. ':o:' .. r.id
  local function add()
    return try('XADD', output, int(total) .. '-1', entry_of(last.logprobs, 'e', int(r.epoch),
      't', last.tokens or '', 'x', last.text or '', 'h', digest, 'f', last.finish,
      'y', last.reason or '', 'p', int(last.prompt or 0), 'c', int(total)))
  end
  if not add() then
    redis.call('DEL', output) -- nobody could read it
    add()
  end
  redis.call('PEXPIRE', output, ttl)
end

-- The fields of a record with the checkpoints of `name`, in order; each is written once, at its
-- offset, so that a long output is not written again with each of them.
local function checkpoints(T, id, name)
  local fields = {}
  for start in string.gmatch(redis.call('HGET', record_of(T, id), 'starts') or '', '%d+') do
    fields[#fields + 1] = name .. ':' .. start
  end
  return fields
end

-- What the checkpoints of `name` hold together.
local function joined(T, id, name)
  local fields = checkpoints(T, id, name)
  if #fields == 0 then
    return ''
  end
  local parts = redis.call('HMGET', record_of(T, id), unpack(fields))
  for i = 1, #parts do
    parts[i] = parts[i] or ''
  end
  return table.concat(parts)
end

-- The whole output as one entry of the stream that its producer reads; returns its id.
local function reply(T, r, now, total, last, digest, ttl)
  local record, replies = record_of(T, r.id), T .. ':reply:' .. r.reply
  local whole = { tokens = last.tokens or '', text = last.text or '',
    logprobs = last.logprobs or '' }
  if r.offset > 0 then
    for name, tail in pairs(whole) do
      local fields = checkpoints(T, r.id, name)
      whole[name] = joined(T, r.id, name) .. tail
      if #fields > 0 then
        later('HDEL', record, unpack(fields))
      end
    end
    later('HDEL', record, 'starts')
  end
  reply_ttls[replies] = ttl
  local oldest = int(math.max(now - ttl, 0))
  local function add()
    return try('XADD', replies, 'MINID', '~', oldest, '*', entry_of(whole.logprobs,
      'id', r.id, 'e', int(r.epoch), 't', whole.tokens, 'x', whole.text, 'h', digest, 'f', last.finish,
      'y', last.reason or '', 'p', int(last.prompt or 0), 'c', int(total)))
  end
  local at = add()
  if not at then
    redis.call('DEL', replies) -- nobody could read it
    at = add()
  end
  return at
end

-- An error keeps its payload, so that it may be tried again.
local function bury(T, r, last)
  local record = record_of(T, r.id)
  local letters = T .. ':dead'
  if redis.call('XLEN', letters) >= DEAD_KEPT then -- what is not listed must not be kept either
    for _, oldest in ipairs(redis.call('XRANGE', letters, '-', '+', 'COUNT', 2)) do
      local other = record_of(T, oldest[2][2])
      redis.call('XDEL', letters, oldest[1])
      redis.call('HDEL', other, 'payload', 'dead')
      redis.call('PEXPIRE', other, ttl_of(T, 'result_ttl_ms', 86400000), 'LT')
    end
  end
  local entry = redis.call('XADD', letters, '*', 'id', r.id, 'tenant', r.tenant,
    'attempts', int(r.attempts), 'reason', last.reason or '')
  redis.call('HSET', record, 'dead', entry)
  redis.call('PEXPIRE', record, ttl_of(T, 'dead_ttl_ms', DEAD_TTL_MS))
end

-- End a request: terminal entry, references, indexes and time-to-live in one step.
-- last: finish, reason, tokens, text, digest, logprobs, count (of tokens), prompt (tokens).
-- Whoever ends what a worker runs raises the epoch first, so that the worker is fenced.
-- A reference that still waits stays: deleting it before delivery would make the group's lag
-- unknown. The claim that comes to it finds the record ended, or gone, and drops it.
local function finish_record(T, r, now, last)
  local total = r.offset + (last.count or 0)
  local record, digest = record_of(T, r.id), last.digest or r.digest
  local ttl = ttl_of(T, 'result_ttl_ms', 86400000)
  local at = {}
  if r.reply == '' then
    end_output(T, r, total, last, digest, ttl)
  else
    at = { 'at', reply(T, r, now, total, last, digest, ttl) }
  end
  redis.call('HSET', record, 'state', 'end', 'epoch', int(r.epoch), 'offset', int(total),
    'digest', digest, 'finish', last.finish, 'reason', last.reason or '', 'ended', int(now),
    unpack(at))
  if last.finish == 'error' then
    bury(T, r, last)
  else
    redis.call('HDEL', record, 'payload')
    redis.call('PEXPIRE', record, ttl)
  end
  later('ZREM', T .. ':live', r.id)
  if r.state ~= 'run' then
    later('ZREM', T .. ':park', r.id)
  else
    later('SREM', T .. ':own:' .. r.worker, r.id)
  end
  if r.state ~= 'wait' then
    drop_entry(lane_of(T, r), r.entry)
  end
  give_back(T, r, total)
  count_tenant(r.tenant, -1)
end

-- Take a request from its worker and park it until `due`; what was to end anyway ends.
local function park_record(T, r, now, due, attempts)
  redis.call('SREM', T .. ':own:' .. r.worker, r.id)
  r.epoch = r.epoch + 1
  if r.cancel then
    finish_record(T, r, now, { finish = 'cancelled', reason = 'cancelled by the producer' })
    return
  end
  redis.call('HSET', record_of(T, r.id), 'state', 'park', 'epoch', int(r.epoch), 'worker', '',
    'attempts', int(attempts))
  redis.call('ZADD', T .. ':park', int(due), r.id)
end
