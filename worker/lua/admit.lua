#!lua
-- Enqueue requests of the inbox, or end them as errors; each leaves the inbox in the same step.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     per entry: entry id, a request id made of it, what is wrong with it ('': nothing); then
--          what `place` takes, as far as it is known
-- Returns  per entry: OK | DUP | REFUSED | BUSY or QUOTA (it stays) | GONE (somebody was faster);
--          and last the retry-after in ms, 0 unless one stays
-- Twice    GONE

local T = KEYS[1]

-- @include record
-- @include place

-- An error that its producer finds where the answer would be.
local function refuse(i, id, reason)
  local r = {
    id = id, state = 'wait', epoch = 0, offset = 0, attempts = 0, worker = '', entry = '',
    tenant = ARGV[i + 3], priority = ARGV[i + 4], cost = 0, most = 0, digest = '',
    reply = ARGV[i + 8],
  }
  redis.call('DEL', T .. ':o:' .. id)
  redis.call('HSET', record_of(T, id), 'state', 'wait', 'epoch', 0, 'offset', 0, 'attempts', 0,
    'tenant', r.tenant, 'priority', r.priority, 'reply', r.reply, 'print', '',
    'created', int(now))
  count_tenant(r.tenant, 1)
  finish_record(T, r, now, { finish = 'error', reason = reason })
  return 'REFUSED'
end

local function admit(i)
  local entry, made, reason = ARGV[i], ARGV[i + 1], ARGV[i + 2]
  if #redis.call('XRANGE', T .. ':inbox', entry, entry) == 0 then
    return 'GONE'
  end
  local id, verdict = ARGV[i + 3], nil
  if reason ~= '' then
    local is_free = redis.call('EXISTS', record_of(T, id)) == 0
    verdict = refuse(i + 3, is_free and id or made, reason)
  else
    verdict = place(i + 3)
  end
  if verdict == 'CONFLICT' then
    verdict = refuse(i + 3, made, 'request_id must be a new id, got that of another request: ' .. id)
  end
  if verdict ~= 'BUSY' and verdict ~= 'QUOTA' then
    redis.call('XDEL', T .. ':inbox', entry)
  end
  return verdict
end

return settling(T, function()
  local replies, added, refused = {}, false, false
  for i = 1, #ARGV, FIELDS + 3 do
    local verdict = admit(i)
    replies[#replies + 1] = verdict
    added = added or verdict == 'OK'
    refused = refused or verdict == 'BUSY' or verdict == 'QUOTA'
  end
  if added then
    wake(T, 'wake')
  end
  replies[#replies + 1] = refused and retry_after_ms() or 0
  return replies
end)
