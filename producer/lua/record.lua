-- Shared by the scripts: server time, settings, and the one way a request ends.

local GROUP = 'g'
local DEAD_KEPT = 10000
local CONTROL_KEPT = 1000

local function now_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), tonumber(time[2])
end

-- Numbers go to the server in full: tostring would round times to 14 digits.
local function int(number)
  return string.format('%.0f', number)
end

local function setting(T, name, default)
  return tonumber(redis.call('HGET', T .. ':settings', name) or default)
end

local function record_of(T, id)
  return T .. ':r:' .. id
end

-- What a command gives, or nil where its key is of another type: such damage to one request must
-- not fail the calls that serve all the others.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then
    if string.find(reply.err, 'WRONGTYPE', 1, true) then
      return nil
    end
    error(reply)
  end
  return reply
end

-- The fields of a record that decide what may happen to it, or nil if there is no record.
local function load(T, id)
  local f = try('HMGET', record_of(T, id), 'state', 'epoch', 'offset', 'attempts', 'worker',
    'tenant', 'priority', 'entry', 'deadline', 'cost', 'most', 'cancel', 'finish', 'digest')
  if not f or not f[1] then
    return nil
  end
  return {
    id = id, state = f[1], epoch = tonumber(f[2]), offset = tonumber(f[3]),
    attempts = tonumber(f[4]), worker = f[5], tenant = f[6], priority = f[7], entry = f[8],
    deadline = tonumber(f[9]), cost = tonumber(f[10]), most = tonumber(f[11]),
    cancel = f[12] == '1', finish = f[13], digest = f[14] or '',
  }
end

local function lane_of(T, r)
  return T .. ':in:' .. r.priority .. ':' .. r.tenant
end

-- Remove a delivered reference, and its stream with the last one.
local function drop_entry(lane, entry)
  redis.call('XACK', lane, GROUP, entry)
  redis.call('XDEL', lane, entry)
  if redis.call('XLEN', lane) == 0 then
    redis.call('DEL', lane)
  end
end

local function wake(T, kind)
  redis.call('XADD', T .. ':ctl', 'MAXLEN', '~', CONTROL_KEPT, '*', 't', kind)
end

-- End a request: terminal entry, references, indexes and time-to-live in one step.
-- last: finish, reason, tokens, text, digest, count (of tokens), prompt (tokens). Whoever ends
-- what a worker runs raises the epoch first, so that the worker is fenced.
-- A reference that still waits stays: deleting it before delivery would make the group's lag
-- unknown. The claim that comes to it finds the record ended, or gone, and drops it.
local function finish_record(T, r, now, last)
  local total = r.offset + (last.count or 0)
  local output, record = T .. ':o:' .. r.id, record_of(T, r.id)
  local digest = last.digest or r.digest
  if redis.call('TYPE', output).ok ~= 'stream' then
    redis.call('DEL', output) -- nobody could read it
  end
  redis.call('XADD', output, int(total) .. '-1', 'e', int(r.epoch), 't', last.tokens or '',
    'x', last.text or '', 'h', digest, 'f', last.finish, 'y', last.reason or '',
    'p', int(last.prompt or 0), 'c', int(total))
  redis.call('HSET', record, 'state', 'end', 'epoch', int(r.epoch), 'offset', int(total),
    'digest', digest, 'finish', last.finish, 'reason', last.reason or '', 'ended', int(now))
  if last.finish ~= 'error' then
    redis.call('HDEL', record, 'payload') -- an error keeps it: dead letters may be tried again
  end
  local ttl = setting(T, 'result_ttl_ms', 86400000)
  redis.call('PEXPIRE', record, int(ttl))
  redis.call('PEXPIRE', output, int(ttl))
  redis.call('ZREM', T .. ':live', r.id)
  redis.call('ZREM', T .. ':park', r.id)
  if r.state == 'run' then
    redis.call('SREM', T .. ':own:' .. r.worker, r.id)
  end
  if r.state ~= 'wait' then
    drop_entry(lane_of(T, r), r.entry)
  end
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
