"""Which kinds of message there are. What they look like, and since when, is said beside the codec of each."""

from typing import Final

from p2p.wire import busy, ceilings, collection, fences, identity, link, members, paper, pulling, pushing, reach

# A message's number on the wire is its place here, from 1; new ones go to the end.
KINDS: Final = (
    members.HELLO,
    members.REFUSAL,
    members.HEARTBEAT,
    members.SCHEMA_UPDATE,
    members.LEAVE,
    pushing.BATCH,
    pulling.PULL_REQUEST,
    pulling.PULL_REPLY,
    link.ACK,
    link.SESSION_BROKEN,
    reach.REACH_QUERY,
    reach.REACHED,
    members.REGISTER_INDEX,
    members.MEMBER_NEWS,
    identity.BLOCK_REQUEST,
    identity.BLOCK_GRANT,
    paper.VERSIONS_WANTED,
    paper.VERSION_LIST,
    paper.SHARDS_WANTED,
    paper.SHARDS_REPLY,
    identity.RETIREMENTS,
    identity.RETIRE_REPORT,
    pushing.ADOPT,
    collection.STABLE_ASK,
    collection.STABLE_REPORT,
    collection.STABLE,
    pulling.INCOMPLETE,
    pulling.KEYS_WANTED,
    pulling.KEYS_FOUND,
    link.WANTS,
    fences.FENCE_REPORT,
    busy.BACKLOGGED,
    busy.STATE_CHUNK,
    ceilings.CEILING_ASK,
    ceilings.CEILING_TOLD,
)
NUMBER_OF: Final = {kind.message: number for number, kind in enumerate(KINDS, start=1)}


def since(message: type) -> int:
    """The first protocol version that has this kind of message."""
    return KINDS[NUMBER_OF[message] - 1].since
