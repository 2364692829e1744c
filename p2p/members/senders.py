"""Who sent a message: the link that it belongs to, or a stranger.

Everybody's boot is known from gossip, so naming one proves nothing. Where there are keys the link is that of the key's owner,
even where gossip says that the same boot is another node's, too.
"""

from p2p import messages as m
from p2p.core import Core
from p2p.errors import RemoteProtocolError
from p2p.identity.retirement import Retirement
from p2p.link.links import Link
from p2p.members.introductions import Introductions


class Senders:
    """Tells peers and strangers apart.

    Args:
        core: shared state.
        introductions: answers strangers that may join.
        retirement: answers those that were expelled.
    """

    def __init__(self, core: Core, introductions: Introductions, retirement: Retirement) -> None:
        self._core = core
        self._introductions = introductions
        self._retirement = retirement

    def link_of(self, envelope: m.Envelope, message: m.Message, proven: m.NodeId | None) -> Link | None:
        """The link that a message came over; None where a stranger sent it.

        Raises:
            RemoteProtocolError: the life that the message names as its sender is another node's.
        """
        core, boot = self._core, envelope.sender_boot
        if proven is None:
            return core.link_of(boot)
        link = core.links.get(proven)
        if link is not None and link.boot == boot:
            return link
        member = core.membership.members.get(proven)
        if member is not None and member.record.boot == boot:
            return core.link(proven) if link is None else None  # one of a former life is dropped when its end is learned
        node = self._introductions.node_of(boot)
        if node is None and isinstance(message, m.Heartbeat):
            node = message.member.node
        if node is not None and node != proven:
            core.counters.impostors += 1
            raise RemoteProtocolError(f"a message in the name of {node!r} from the owner of {proven!r}'s key")
        return None

    def on_stranger(self, envelope: m.Envelope, message: m.Message, now: m.Now) -> None:
        """Somebody whom we do not know, or who knows a former life of ours."""
        core = self._core
        core.counters.strangers += 1
        if isinstance(message, m.Heartbeat) and envelope.sender_boot in core.record.expelled:
            self._retirement.tell_stranger(message.member.address, envelope.sender_boot, now)
        elif isinstance(message, m.Retirements) and envelope.receiver_boot == core.options.boot:
            self._retirement.on_farewell(message, envelope.sender_boot, now)
        elif isinstance(message, m.Heartbeat) and message.member.boot == envelope.sender_boot:
            self._introductions.answer_stranger(message.member, now)
