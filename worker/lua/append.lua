#!lua flags=allow-oom
-- Commit tokens of up to 64 requests, and renew the worker's lease.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker, lease ms; per request: id, epoch, start, count, token ids packed, text, digest,
--          log probabilities packed
-- Returns  per request: OK | FENCED | CANCEL | GAP
-- Twice    the second run finds the offset already there: OK
--
-- Guards against a repeated or lost delta: the epoch, with the worker's name, since a server that
-- rolled back may give an epoch again; the offset; and the entry id, which must grow and is the
-- number of tokens so far. With a reply stream the record keeps the tokens
-- until the end, and its offset is the guard.

-- @include record

local T, worker = KEYS[1], ARGV[1]
local FIELDS = 8
local verdicts = {}

local function append(id, epoch, start, count, tokens, text, digest, logprobs)
  local r = redis.call('HMGET', record_of(T, id), 'state', 'epoch', 'offset', 'cancel',
    'reply', 'worker')
  if r[1] ~= 'run' or tonumber(r[2]) ~= epoch or r[6] ~= worker then
    return 'FENCED'
  end
  if r[4] == '1' then
    return 'CANCEL'
  end
  local offset = tonumber(r[3])
  if offset >= start + count then
    return 'OK'
  end
  if offset ~= start then
    return 'GAP'
  end
  local stop = int(start + count)
  if r[5] and r[5] ~= '' then
    local at, starts = int(start), redis.call('HGET', record_of(T, id), 'starts')
    redis.call('HSET', record_of(T, id), 'offset', stop, 'digest', digest,
      'starts', (starts and starts .. ' ' or '') .. at, 'tokens:' .. at, tokens,
      'text:' .. at, text, 'logprobs:' .. at, logprobs)
    return 'OK'
  end
  redis.call('XADD', T .. ':o:' .. id, stop .. '-0', entry_of(logprobs, 'e', int(epoch),
    't', tokens, 'x', text, 'h', digest))
  redis.call('HSET', record_of(T, id), 'offset', stop, 'digest', digest)
  return 'OK'
end

redis.call('ZADD', T .. ':workers', int(now_ms() + tonumber(ARGV[2])), worker)
for i = 3, #ARGV, FIELDS do
  verdicts[#verdicts + 1] = append(ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]),
    tonumber(ARGV[i + 3]), ARGV[i + 4], ARGV[i + 5], ARGV[i + 6], ARGV[i + 7])
end
return verdicts
