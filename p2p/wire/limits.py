"""Every limit on what a peer may send, and on what we send."""

from typing import Final

# One message. Large enough that a step of 10,000 rows of 64 floats is one message, small enough that a row of high priority
# never waits long behind it.
MESSAGE_BYTES_MAX: Final = 16 << 20
# Rows of one batch message or one pull chunk; what exceeds it travels in parts (R7). Far below the message limit, because
# the header, the claims and one row of the largest width come on top.
BATCH_BYTES_MAX: Final = 4 << 20
HEADER_BYTES_MAX: Final = 8 << 20
# What msgpack may make of a header: a byte becomes a list of 72, and repeats compress to nothing. No header has maps. Below
# the first bound it can cost a few megabytes and is not looked at; of those above, only the kinds that tell of the whole
# schema or of many members have more items than the second, and none more than the third.
PLAIN_HEADER_BYTES_MAX: Final = 65_536
HEADER_ITEMS_MAX: Final = 1 << 16
LARGE_HEADER_ITEMS_MAX: Final = 1 << 19
MEMBERS_MAX: Final = 4_096
SCHEMA_ENTRIES_MAX: Final = 131_072
SECTIONS_MAX: Final = 4_096
WRITER_RECORDS_MAX: Final = 4_096
HOLDINGS_MAX: Final = 1_024
SHARDS_MAX: Final = 65_536
# Steps that an asker has above its vector, of 8 bytes and a bit a shard: all that may wait (`OPEN_STEPS_MAX`) at 64 shards.
KNOWN_BYTES_MAX: Final = 65_536
# Clocks in milliseconds: 8,900 years. What is computed with must stay far inside a signed 64-bit number.
TIME_BITS: Final = 48
SUMMARIES_MAX: Final = 4_096
HOPS_MAX: Final = 255
# Nodes that hold collection up, by name; a person needs the first few.
HELD_UP_MAX: Final = 16
# A frame costs 3 to 5 us at each end, whatever is in it, so columns smaller than this share one. Larger ones ZeroMQ hands on
# uncopied, which is worth a frame.
PACK_BYTES_MAX: Final = 16_384
# Steps that share a message (`p2p.pushing.groups`); each costs 24 bytes and more. A writer of tiny steps has some 5,000 a
# second.
GROUP_STEPS_MAX: Final = 256
# Keys that are asked for at once (`p2p.pulling.fetching`).
WANTED_KEYS_MAX: Final = 1_024
