"""Messages to frames and back, and every limit on their size.

A message is `[envelope, head, column, column, ...]`. The envelope is 48 fixed bytes and is rewritten at every hop. The head
holds the header, which is msgpack, and behind it the small columns; each large one is a frame of its own, uncopied in both
directions. Columns are raw little-endian arrays. The checksum in the envelope covers everything below it, so a batch is checked
at each hop and forwarded without being encoded again (R17).

    head (since version 2): uint32 header_bytes | header | 0..7 zeros | column | 0..7 zeros | column ...
    head (version 1):       header, and every column is a frame of its own

Bytes of a peer raise only `RemoteProtocolError` here.

- `limits`: every limit on size. `frames`: envelope, head and columns. `coding`: from message to frames, and back.
- `table`: which kinds of message there are, since which version of the protocol (`p2p.versions`), and which fields later
  versions added to them (`kind`). What a link does not speak is left out at its end of the header, and filled in at the other.
- For each part of `p2p` a module with the codecs of its messages, named as theirs in `p2p.messages`; `rows`, `columns` and
  `values` have what several of them share.
"""

from p2p.wire.coding import decode as decode
from p2p.wire.coding import encode as encode
from p2p.wire.coding import seal as seal
from p2p.wire.frames import ENVELOPE as ENVELOPE
from p2p.wire.frames import MAGIC as MAGIC
from p2p.wire.frames import PACKED_SINCE as PACKED_SINCE
from p2p.wire.frames import VERSIONS as VERSIONS
from p2p.wire.frames import checksum as checksum
from p2p.wire.limits import BATCH_BYTES_MAX as BATCH_BYTES_MAX
from p2p.wire.limits import GROUP_STEPS_MAX as GROUP_STEPS_MAX
from p2p.wire.limits import HEADER_BYTES_MAX as HEADER_BYTES_MAX
from p2p.wire.limits import HEADER_ITEMS_MAX as HEADER_ITEMS_MAX
from p2p.wire.limits import HELD_UP_MAX as HELD_UP_MAX
from p2p.wire.limits import HOLDINGS_MAX as HOLDINGS_MAX
from p2p.wire.limits import HOPS_MAX as HOPS_MAX
from p2p.wire.limits import KNOWN_BYTES_MAX as KNOWN_BYTES_MAX
from p2p.wire.limits import LARGE_HEADER_ITEMS_MAX as LARGE_HEADER_ITEMS_MAX
from p2p.wire.limits import MEMBERS_MAX as MEMBERS_MAX
from p2p.wire.limits import MESSAGE_BYTES_MAX as MESSAGE_BYTES_MAX
from p2p.wire.limits import PACK_BYTES_MAX as PACK_BYTES_MAX
from p2p.wire.limits import PLAIN_HEADER_BYTES_MAX as PLAIN_HEADER_BYTES_MAX
from p2p.wire.limits import SCHEMA_ENTRIES_MAX as SCHEMA_ENTRIES_MAX
from p2p.wire.limits import SECTIONS_MAX as SECTIONS_MAX
from p2p.wire.limits import SHARDS_MAX as SHARDS_MAX
from p2p.wire.limits import SUMMARIES_MAX as SUMMARIES_MAX
from p2p.wire.limits import TIME_BITS as TIME_BITS
from p2p.wire.limits import WANTED_KEYS_MAX as WANTED_KEYS_MAX
from p2p.wire.limits import WRITER_RECORDS_MAX as WRITER_RECORDS_MAX
from p2p.wire.pushing import GROUPS_SINCE as GROUPS_SINCE
from p2p.wire.rows import PRIORITY_SINCE as PRIORITY_SINCE
from p2p.wire.table import since as since
from p2p.wire.values import STRING_BYTES_MAX as STRING_BYTES_MAX
