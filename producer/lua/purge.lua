#!lua flags=allow-oom
-- Cancel what waits in one lane, in its order, up to a reference: what comes meanwhile stays.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     priority, tenant, id of the last reference, most to look at
-- Returns  {cancelled, looked at, of those written by no enqueue and dropped}; less looked at than
--          asked for: that was all
-- Twice    the second run goes on with the next

-- @include record
-- @include lane

local T, priority, tenant, stop = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local lane = T .. ':in:' .. priority .. ':' .. tenant
local now = now_ms()
local cancelled, foreign = 0, 0

if redis.call('TYPE', lane).ok ~= 'stream' then
  return { 0, 0, 0 }
end
local entries = redis.call('XRANGE', lane, '(' .. last_delivered(lane), stop, 'COUNT', ARGV[4])
if #entries == 0 then
  return { 0, 0, 0 }
end
-- Delivering in order keeps the group's lag known.
redis.call('XREADGROUP', 'GROUP', GROUP, 'workers', 'COUNT', #entries, 'STREAMS', lane, '>')

local function purge(entry)
  local id = read_reference(entry[2])
  local r = id and load(T, id)
  foreign = foreign + (id and 0 or 1)
  if not r or r.state ~= 'wait' or r.entry ~= entry[1] then
    drop_entry(lane, entry[1])
    return
  end
  r.state = 'park' -- delivered, owned by nobody: ending it drops the reference too
  r.tenant, r.priority = tenant, priority -- where it is, whatever the record says
  r.epoch = r.epoch + 1
  finish_record(T, r, now, { finish = 'cancelled', reason = 'purged by an operator' })
  cancelled = cancelled + 1
end

settling(T, function()
  for _, entry in ipairs(entries) do
    purge(entry)
  end
end)
if redis.call('EXISTS', lane) == 0 then
  forget_lane(T, priority, tenant)
end
return { cancelled, #entries, foreign }
