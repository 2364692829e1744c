"""What Redis does in one step: scripts in Lua. Numbers there are doubles, so a stamp is two halves of 32 bits."""

from typing import Final

TAKEN: Final = "EKKOLIFE"  # the error of a feed whose number is not the one that counts

_LIFE: Final = (
    """
local life = redis.call('GET', KEYS[1])
if life ~= ARGV[1] then return redis.error_reply('"""
    + TAKEN
    + """ ' .. (life or '0') .. ' ' .. ARGV[1]) end
"""
)

# KEYS: life, rows, deleted. ARGV: our life, what to do, keys, stamps, rows. Returns how many keys it counted for.
APPLY: Final = (
    _LIFE
    + """
local what, keys, stamps, rows = ARGV[2], ARGV[3], ARGV[4], ARGV[5]
local n = #keys / 8
local fields, chosen, values = {}, {}, {}
for i = 1, n do fields[i] = string.sub(keys, 8 * i - 7, 8 * i) end
local held = redis.call('HMGET', KEYS[2], unpack(fields))
local dead = false
if redis.call('EXISTS', KEYS[3]) == 1 then dead = redis.call('HMGET', KEYS[3], unpack(fields)) end
local function compare(a, b)  -- -1, 0, 1 of two stamps, the first 8 bytes
  local alow, ahigh = struct.unpack('<I4I4', a)
  local blow, bhigh = struct.unpack('<I4I4', b)
  if ahigh ~= bhigh then return ahigh < bhigh and -1 or 1 end
  if alow ~= blow then return alow < blow and -1 or 1 end
  return 0
end
local width = n > 0 and #rows / n or 0
for i = 1, n do
  local stamp = string.sub(stamps, 8 * i - 7, 8 * i)
  local before = held[i] or (dead and dead[i])
  if what == 'forget' then
    if before and compare(before, stamp) <= 0 then chosen[#chosen + 1] = fields[i] end
  elseif not before or compare(before, stamp) < 0 then
    chosen[#chosen + 1] = fields[i]
    values[#values + 1] = fields[i]
    values[#values + 1] = what == 'put' and stamp .. string.sub(rows, width * (i - 1) + 1, width * i) or stamp
  end
end
if #chosen == 0 then return 0 end
if what == 'put' then
  if dead then redis.call('HDEL', KEYS[3], unpack(chosen)) end
  redis.call('HSET', KEYS[2], unpack(values))
else
  redis.call('HDEL', KEYS[2], unpack(chosen))
  if what == 'delete' then redis.call('HSET', KEYS[3], unpack(values))
  elseif dead then redis.call('HDEL', KEYS[3], unpack(chosen)) end
end
return #chosen
"""
)

# KEYS: life, cursor, a deleted hash for each table. ARGV: our life, the cursor, a stamp, which table, where in it to go on, how
# many to look at. Forgets deletions below the stamp, some at a time; returns which table is next, and where in it.
COMMIT: Final = (
    _LIFE
    + """
redis.call('SET', KEYS[2], ARGV[2])
local tables = #KEYS - 2
if tables == 0 then return {0, '0'} end
local low, high = struct.unpack('<I4I4', ARGV[3])
local at = tonumber(ARGV[4]) % tables
local found = redis.call('HSCAN', KEYS[3 + at], ARGV[5], 'COUNT', ARGV[6])
for i = 1, #found[2], 2 do
  local slow, shigh = struct.unpack('<I4I4', found[2][i + 1])
  if shigh < high or (shigh == high and slow < low) then redis.call('HDEL', KEYS[3 + at], found[2][i]) end
end
if found[1] == '0' then return {(at + 1) % tables, '0'} end
return {at, found[1]}
"""
)

# KEYS: life, rows, deleted, tables. ARGV: our life, the table.
DROP: Final = (
    _LIFE
    + """
redis.call('UNLINK', KEYS[2], KEYS[3])
redis.call('HDEL', KEYS[4], ARGV[2])
return 0
"""
)

# KEYS: rows. ARGV: a cursor, how many. Returns the next cursor, keys, stamps.
HELD: Final = """
local found = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local keys, stamps = {}, {}
for i = 1, #found[2], 2 do
  keys[#keys + 1] = found[2][i]
  stamps[#stamps + 1] = string.sub(found[2][i + 1], 1, 8)
end
return {found[1], table.concat(keys), table.concat(stamps)}
"""

# KEYS: rows. ARGV: keys, bytes of a row. Returns stamps and rows, zeros where there is none.
LOOKUP: Final = """
local n = #ARGV[1] / 8
local fields = {}
for i = 1, n do fields[i] = string.sub(ARGV[1], 8 * i - 7, 8 * i) end
local found = redis.call('HMGET', KEYS[1], unpack(fields))
local nothing = string.rep('\\0', 8 + tonumber(ARGV[2]))
for i = 1, n do found[i] = found[i] or nothing end
return table.concat(found)
"""
