"""All messages between nodes."""

from p2p.messages.busy import Backlogged, StateChunk
from p2p.messages.ceilings import CeilingAsk, CeilingTold
from p2p.messages.collection import Stable, StableAsk, StableReport
from p2p.messages.fences import FenceReport
from p2p.messages.identity import BlockGrant, BlockRequest, Retirements, RetireReport
from p2p.messages.link import Ack, SessionBroken, Wants
from p2p.messages.members import Heartbeat, Hello, Leave, MemberNews, Refusal, RegisterIndex, SchemaUpdate
from p2p.messages.paper import ShardsReply, ShardsWanted, VersionList, VersionsWanted
from p2p.messages.pulling import Incomplete, KeysFound, KeysWanted, PullReply, PullRequest
from p2p.messages.pushing import Adopt, Batch
from p2p.messages.reach import Reached, ReachQuery

Message = (
    Hello
    | Refusal
    | Heartbeat
    | SchemaUpdate
    | Leave
    | Batch
    | PullRequest
    | PullReply
    | Ack
    | SessionBroken
    | ReachQuery
    | Reached
    | RegisterIndex
    | MemberNews
    | BlockRequest
    | BlockGrant
    | VersionsWanted
    | VersionList
    | ShardsWanted
    | ShardsReply
    | Retirements
    | RetireReport
    | Adopt
    | Wants
    | StableAsk
    | StableReport
    | Stable
    | Incomplete
    | KeysWanted
    | KeysFound
    | FenceReport
    | Backlogged
    | StateChunk
    | CeilingAsk
    | CeilingTold
)
