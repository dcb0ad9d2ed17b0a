#!lua
-- Try dead letters again, from their first token, as if they had just been enqueued.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     earliest deadline in ms from now; ids
-- Returns  per id: OK | NONE (no error of that id) | GONE (its payload is not kept any more) |
--          BUSY or QUOTA (no room now: it stays a dead letter)
-- Twice    NONE: it waits already

local T = KEYS[1]

-- @include record
-- @include place

local function revive(id)
  local record = record_of(T, id)
  local r = load(T, id)
  if not r or r.state ~= 'end' or r.finish ~= 'error' then
    return 'NONE'
  end
  if redis.call('HSTRLEN', record, 'payload') == 0 then
    return 'GONE'
  end
  local refusal = refusal_of(r.tenant)
  if refusal then
    return refusal
  end
  local f = redis.call('HMGET', record, 'dead', 'at')
  if f[1] then
    redis.call('XDEL', T .. ':dead', f[1])
  end
  if f[2] then
    redis.call('XDEL', T .. ':reply:' .. r.reply, f[2])
  end
  redis.call('DEL', T .. ':o:' .. id)
  redis.call('HDEL', record, 'finish', 'reason', 'ended', 'dead', 'at', 'starts', 'cancel',
    'digest', 'claimed', 'charged')
  local deadline = int(math.max(r.deadline, now + tonumber(ARGV[1])))
  local entry = line_up(id, r.priority, r.tenant, int(r.cost), int(r.most))
  redis.call('HSET', record, 'state', 'wait', 'epoch', int(r.epoch + 1), 'offset', 0, 'attempts', 0,
    'worker', '', 'entry', entry, 'deadline', deadline)
  redis.call('PERSIST', record)
  later('ZADD', T .. ':live', deadline, id)
  count_live(r.tenant)
  return 'OK'
end

local replies = {}
settling(T, function()
  for i = 2, #ARGV do
    replies[#replies + 1] = revive(ARGV[i])
  end
end)
wake(T, 'wake')
return replies
