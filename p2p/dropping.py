"""A keyspace that ends while nodes run: its model was dropped.

Who clears out a shop also takes down its letter box, or the post would go on to bring letters that nobody reads. Each part of
the machine that keeps something by keyspace lets go of it here, in the very event in which the host lost the rows; none of
them may ever look up a keyspace that is not there.

The number of a keyspace is never used again (a model that gets the same name later is another incarnation, with another
number). So whatever comes late, a batch, a chunk, a question, a wait, speaks of a keyspace that is unknown here, as one whose
schema has not come yet does: it is counted, it recreates nothing, and nobody is blamed.
"""

from p2p.collection import Collection
from p2p.core import Core, Keyspace
from p2p.identity.retirement import Retirement
from p2p.paper.schedule import Schedule
from p2p.pulling.fetching import Fetching
from p2p.pulling.pull import Pull
from p2p.pushing.push import Push
from p2p.reach import Reach


class Dropping:
    """The part of the machine that lets go of keyspaces, in all others.

    Args:
        core: shared state; calls `let_go` from now on.
        push, pull, schedule, reach, retirement, collection, fetching: the parts that keep something by keyspace.
    """

    def __init__(
        self,
        core: Core,
        push: Push,
        pull: Pull,
        schedule: Schedule,
        reach: Reach,
        retirement: Retirement,
        collection: Collection,
        fetching: Fetching,
    ) -> None:
        self._parts = (push, pull, schedule, reach, retirement, collection, fetching)
        core.let_go = self.let_go

    def let_go(self, keyspace: Keyspace) -> None:
        """This one is gone from `Core.keyspaces`; waits for it are answered with the reason."""
        for part in self._parts:
            part.forget_keyspace(keyspace.replica.keyspace)
