"""How a worker stands with the servers of its model: who serves what, who knows it, and which of its pushes count there.

Pure, and a part of `ekko.train.outstanding`. A worker has a *life* at the servers, which begins with a hello to each; a server
that does not know the life takes nothing of it. A life ends when a later one begins: in another process, or in this one where
the servers have dropped the worker for its silence.
"""

from collections.abc import Callable
from typing import Final

from ekko.errors import EkkoError, ModelError
from ekko.train.requests import Server
from ekko.train.routing import Routing
from ekko.train.server import wire as w

# How often a life is raised above one that servers know; once is enough unless two processes begin the same worker.
LIVES_MAX: Final = 3


class Standing:
    """Of one worker.

    Args:
        model: the model's name.
        worker: which worker this is, from 0.
        life: a number that is larger than in all lives of this worker before.
        endpoints: of servers of the model, any of them.
    """

    def __init__(self, model: str, worker: int, life: int, endpoints: tuple[str, ...]) -> None:
        self.model = model
        self.worker = worker
        self.life = life
        self._raised = 0
        self._known = dict.fromkeys(endpoints)
        self._servers: dict[str, Server] = {}
        self._last: dict[int, int] = {}  # partition -> number of our last push there, as its primary said in welcoming us
        self.routing: Routing | None = None
        self.settings: w.ModelSettings | None = None

    @property
    def joined(self) -> bool:
        """Whether every partition's primary has welcomed us."""
        return self.routing is not None and len(self._last) == self.routing.partitions

    @property
    def is_settled(self) -> bool:
        """Whether nobody keeps silent."""
        return self.joined and all(server.silences == 0 for server in self._servers.values())

    @property
    def clock(self) -> int:
        """When we joined: the number of this worker's last push that is in all partitions."""
        return min(self._last.values())

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Of all servers that were ever heard of."""
        return tuple(self._known)

    @property
    def who(self) -> str:
        """This worker, to a user."""
        return f"worker {self.worker} of model {self.model!r}"

    @property
    def hello(self) -> w.Hello:
        """What begins our life at a server, or shows that we live."""
        return w.Hello(self.model, self.worker, self.life)

    @property
    def reasons(self) -> dict[str, str]:
        """Endpoint -> why a server refused what was asked last, or that it does not answer."""
        said = {endpoint: "no answer" if one.silences else one.reason for endpoint, one in self._servers.items()}
        return {endpoint: reason for endpoint, reason in said.items() if reason}

    def node_at(self, endpoint: str) -> str | None:
        """The node beside the server there, if that is known."""
        return None if self.routing is None else self.routing.node_at(endpoint)

    def server(self, endpoint: str) -> Server:
        """What we know of one server."""
        return self._servers.setdefault(endpoint, Server())

    def is_open(self, endpoint: str, now_s: float) -> bool:
        """Whether something may be sent to a server now."""
        server = self.server(endpoint)
        return server.greeted and server.not_before_s <= now_s

    def opens_s(self, now_s: float) -> list[float]:
        """When servers that are left alone for a moment are not any more."""
        return [server.not_before_s for server in self._servers.values() if server.not_before_s > now_s]

    def ungreeted(self, now_s: float) -> list[str]:
        """Servers that act for something, do not know us, and may be told now."""
        if self.routing is None:
            return []
        servers = ((endpoint, self.server(endpoint)) for endpoint in self.routing.acting)
        return [end for end, one in servers if not one.greeted and not one.greeting and one.not_before_s <= now_s]

    def learn(self, serving: w.Serving) -> EkkoError | None:
        """What a server says of who serves what; an error where no worker can go on with that."""
        if self.routing is not None and len(serving.primaries) != self.routing.partitions:
            return ModelError(f"the servers of model {self.model!r} have other partitions than they had: make another client")
        self.routing = Routing(serving, 1 if self.settings is None else self.settings.shards)
        self._known |= dict.fromkeys(self.routing.endpoints)
        return None

    def welcomed(self, endpoint: str, answer: w.Welcome, answered: Callable[[int, int], int], now_s: float) -> EkkoError | None:
        """A server knows us now; an error where no worker can go on with what it says.

        Args:
            endpoint: the server's.
            answer: what it said.
            answered: of a partition, and what it said of it in an earlier welcome: the number up to which our pushes were
                answered there.
            now_s: the time.
        """
        server = self.server(endpoint)
        server.greeting, server.greeted = False, True
        if self.settings is None:
            self.settings = answer.settings
        elif self.settings != answer.settings:
            return ModelError(
                f"the servers of model {self.model!r} have other settings than when this client was made: make another one"
            )
        if (failure := self.learn(answer.serving)) is not None:
            return failure
        for partition, last in enumerate(answer.last):
            if last < 0:
                continue
            if partition in self._last and last < (had := answered(partition, self._last[partition])):
                return _lost(self.model, self.worker, partition, last, had)
            self._last[partition] = last
        assert self.routing is not None
        if any(last < 0 and self.routing.endpoint_of(partition) == endpoint for partition, last in enumerate(answer.last)):
            # It is about to act for a partition and does not yet, or it is not its primary after all: ask again in a moment.
            server.greeted = False
            server.pause(now_s)
        return None

    def may_raise(self) -> bool:
        """Whether our life may be raised above one that servers know: who has just begun knows that it is the latest."""
        return not self.joined and self._raised < LIVES_MAX

    def raise_above(self, life: int) -> None:
        """Our life is later than this one, which was of a clock that was set back since."""
        self._raised += 1
        self._begin(life + 1)

    def rejoin(self, life: int) -> None:
        """Begin a later life, not before `life`: servers say where it goes on."""
        self._raised = 0
        self._last = {}
        self._begin(max(life, self.life + 1))

    def _begin(self, life: int) -> None:
        self.life = life
        for server in self._servers.values():
            server.greeted = server.greeting = False


def _lost(model: str, worker: int, partition: int, last: int, answered: int) -> ModelError:
    return ModelError(
        f"the servers of model {model!r} have the pushes of worker {worker} up to {last} in partition {partition}, and had "
        f"answered {answered}: they lost some. Make another client, and go on with the batch after its `clock`"
    )
