#!lua flags=allow-oom
-- Join the deltas of ended requests into one entry each: a fraction of the memory, for outputs that
-- are kept after they were read. Whoever is in the middle of one has to begin anew.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     ids
-- Returns  how many were joined
-- Twice    0

-- @include record

local T, count = KEYS[1], 0

local function value(fields, name)
  for i = 1, #fields, 2 do
    if fields[i] == name then
      return fields[i + 1]
    end
  end
end

local function join(output)
  local entries = redis.call('XRANGE', output, '-', '+')
  local last = entries[#entries]
  local tokens, text, logprobs = {}, {}, {}
  for i, entry in ipairs(entries) do
    tokens[i], text[i] = value(entry[2], 't'), value(entry[2], 'x')
    logprobs[i] = value(entry[2], 'l') or ''
  end
  if not value(last[2], 'l') and table.concat(logprobs) ~= '' then
    table.insert(last[2], 'l')
    table.insert(last[2], '')
  end
  for i = 1, #last[2], 2 do
    if last[2][i] == 't' then
      last[2][i + 1] = table.concat(tokens)
    elseif last[2][i] == 'x' then
      last[2][i + 1] = table.concat(text)
    elseif last[2][i] == 'l' then
      last[2][i + 1] = table.concat(logprobs)
    end
  end
  local ttl = redis.call('PTTL', output)
  redis.call('DEL', output)
  redis.call('XADD', output, last[1], unpack(last[2]))
  redis.call('PEXPIRE', output, ttl)
end

for i = 1, #ARGV do
  local r, output = load(T, ARGV[i]), T .. ':o:' .. ARGV[i]
  if r and r.state == 'end' and r.reply == '' and redis.call('XLEN', output) > 1 then
    join(output)
    count = count + 1
  end
end
return count
