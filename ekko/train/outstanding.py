"""What a worker has asked of servers and is not answered yet: who is asked, when again, and what an answer means.

Pure: messages and the time go in, messages to send come out; `ekko.train.client` has the sockets. The rules that it follows are
those of `ekko.train.server.wire`.

Every request may be sent twice, so that whatever goes wrong has one remedy: it is sent again, to whoever is primary by then.
What was sent to a server and not answered in time, or answered with a reason to try again, is *withdrawn*; a pull's keys are
divided anew, and pushes go out again in the order of their numbers, since a server takes a worker's pushes in no other order. A
server that was not greeted in this life, or that says it does not know us, is greeted first.
"""

from collections.abc import Mapping
from typing import Final, assert_never

import numpy as np

from ekko.errors import EkkoError, ModelError
from ekko.train.requests import (
    COLUMN_BYTES_MAX,
    RETRY_S,
    Columns,
    Part,
    Pulling,
    Pushing,
    Send,
    Server,
    columns_bytes,
    is_large,
)
from ekko.train.routing import Places, Routing
from ekko.train.server import wire as w
from ekko.train.server.wire import F32, U64

# How often a worker asks who serves what while it has no answer that helps.
WHO_S: Final = 0.1
# How often a life is raised above one that servers know; once is enough unless two processes begin the same worker.
LIVES_MAX: Final = 3


class Outstanding:
    """All requests of one worker.

    Args:
        model: the model's name.
        worker: which worker this is, from 0.
        life: a number that is larger than in all lives of this worker before.
        endpoints: of servers of the model, any of them.
    """

    def __init__(self, model: str, worker: int, life: int, endpoints: tuple[str, ...]) -> None:
        self._model = model
        self._worker = worker
        self._life = life
        self._lives = 0
        self._known = dict.fromkeys(endpoints)
        self._servers: dict[str, Server] = {}
        self._routing: Routing | None = None
        self._last: dict[int, int] = {}  # partition -> number of our last push there, as its primary said in welcoming us
        self._numbers = 0
        self._parts: dict[int, Part] = {}
        self._pulls: dict[Pulling, None] = {}  # without a complete answer
        self._pushes: dict[int, Pushing] = {}
        self._pushed = 0  # the number of the last one
        self._who_s = 0.0  # when to ask who serves what; infinity: not at all
        self._out: list[Send] = []
        self.settings: w.ModelSettings | None = None
        self.failure: EkkoError | None = None  # of all that was asked, and will be
        self.stamp = 0  # the largest of pushes that were answered
        self.retries = 0  # requests that were sent again

    # --- what the owner asks ---------------------------------------------------------------------------------------------

    @property
    def joined(self) -> bool:
        """Whether every partition's primary has welcomed us."""
        return self._routing is not None and len(self._last) == self._routing.partitions

    @property
    def clock(self) -> int:
        """When we joined: the number of this worker's last push that is in all partitions."""
        return min(self._last.values())

    @property
    def pushes(self) -> int:
        """Pushes without a complete answer."""
        return len(self._pushes)

    @property
    def requests(self) -> int:
        """Requests that were sent."""
        return self._numbers

    @property
    def pulls(self) -> int:
        """Pulls without a complete answer."""
        return len(self._pulls)

    def node_at(self, endpoint: str) -> str | None:
        """The node beside the server there, if that is known."""
        return None if self._routing is None else self._routing.node_at(endpoint)

    def deadline_s(self, now_s: float) -> float:
        """When `tick` has something to do, unless something comes before."""
        times = [part.due_s for part in self._parts.values()]
        if self._pulls or self._pushes or not self.joined:
            times.append(self._who_s)
            times += [server.not_before_s for server in self._servers.values() if server.not_before_s > now_s]
        return min(times, default=np.inf)

    def pull(self, keys: Mapping[str, U64], clock: int, now_s: float) -> Pulling:
        """Ask for rows; tables and keys are checked."""
        assert self.settings is not None
        pulling = Pulling(keys, clock, self.settings.tables)
        if pulling.missing:
            self._pulls[pulling] = None
            self._flow(now_s)
        return pulling

    def cancel(self, pulling: Pulling) -> None:
        """Nobody wants the answer any more."""
        self._pulls.pop(pulling, None)
        if not pulling.done:
            pulling.failure = ModelError("this pull was given up: begin another one")
        for number in [number for number, part in self._parts.items() if part.pulling is pulling]:
            del self._parts[number]

    def push(self, number: int, columns: Columns, rate: float, now_s: float) -> Pushing:
        """Hand gradients over; tables, keys and values are checked. `number`: one more than that of the push before."""
        assert self._routing is not None
        pushing = Pushing(number, columns, rate, set(range(self._routing.partitions)))
        self._pushes[number], self._pushed = pushing, number
        self._flow(now_s)
        return pushing

    def tick(self, now_s: float) -> None:
        """Time has passed."""
        for number, part in list(self._parts.items()):
            if part.due_s <= now_s and number in self._parts:
                server = self._server(part.endpoint)
                server.silences += 1
                self._withdraw(number, part)
                self._who_s = min(self._who_s, now_s)
        if now_s >= self._who_s:
            self._ask_who_serves(now_s)
        self._flow(now_s)

    def drain(self) -> list[Send]:
        """What is to be sent now."""
        out, self._out = self._out, []
        return out

    def unsent(self, number: int, now_s: float) -> None:
        """There is no connection to the server that a request was for, or not yet."""
        if (part := self._parts.get(number)) is not None:
            self._withdraw(number, part)
            self._server(part.endpoint).pause(now_s)
            self._who_s = min(self._who_s, now_s + WHO_S)

    # --- answers ---------------------------------------------------------------------------------------------------------

    def answered(self, endpoint: str, number: int, answer: w.Answer, now_s: float) -> None:
        """A server answered a request. Answers to requests that were withdrawn are of no use, and do no harm."""
        if isinstance(answer, w.Serving):
            self._learn(answer, now_s)
            self._flow(now_s)
            return
        part = self._parts.get(number)
        if part is None or part.endpoint != endpoint:
            if isinstance(answer, w.Failed) and answer.kind == w.SETTINGS and not self.joined:
                self._fail(ModelError(f"{endpoint}: {answer.reason}"))
            return
        server = self._server(endpoint)
        server.silences = 0
        match answer:
            case w.Pulled(tables):
                server.pauses = 0
                self._arrived(number, part, tables)
            case w.Pushed():
                server.pauses = 0
                self._taken(number, part, answer)
            case w.Welcome():
                server.pauses = 0
                self._welcomed(number, part, answer, now_s)
            case w.NotPrimary(serving):
                before = self._routing
                self._withdraw(number, part)
                self._learn(serving, now_s)
                if before is not None and self._routing is not None and before.primaries == self._routing.primaries:
                    server.pause(now_s)
                    self._who_s = min(self._who_s, now_s + WHO_S)
            case w.Failed(kind, reason):
                self._refused(number, part, kind, reason, now_s)
            case w.Released():
                self._fail(_odd(endpoint))
            case _:
                assert_never(answer)
        self._flow(now_s)

    def _arrived(self, number: int, part: Part, tables: Mapping[str, F32]) -> None:
        pulling = part.pulling
        del self._parts[number]
        if pulling is None or not pulling.arrived(part.places, tables):
            self._fail(_odd(part.endpoint))
            return
        if pulling.done:
            del self._pulls[pulling]

    def _taken(self, number: int, part: Part, answer: w.Pushed) -> None:
        pushing = part.pushing
        del self._parts[number]
        if pushing is None or answer.number != pushing.number:
            self._fail(_odd(part.endpoint))
            return
        self.stamp = max(self.stamp, answer.stamp)
        pushing.pending.difference_update(part.partitions)
        pushing.flying.difference_update(part.partitions)
        if not pushing.pending:
            self._pushes.pop(pushing.number, None)

    def _welcomed(self, number: int, part: Part, answer: w.Welcome, now_s: float) -> None:
        del self._parts[number]
        server = self._server(part.endpoint)
        server.greeting, server.greeted = False, True
        if self.settings is None:
            self.settings = answer.settings
        elif self.settings != answer.settings:
            self._fail(
                ModelError(
                    f"the servers of model {self._model!r} have other settings than when this client was made: make another one"
                )
            )
            return
        self._learn(answer.serving, now_s)
        for partition, last in enumerate(answer.last):
            if last < 0:
                continue
            if partition in self._last and last < (answered := self._answered(partition)):
                self._fail(_lost(self._model, self._worker, partition, last, answered))
                return
            self._last[partition] = last
        if any(last < 0 and self._primary(partition) == part.endpoint for partition, last in enumerate(answer.last)):
            # It is about to act for a partition and does not yet, or it is not its primary after all: ask again in a moment.
            server.greeted = False
            self._server(part.endpoint).pause(now_s)

    def _answered(self, partition: int) -> int:
        """The number up to which our pushes were answered there."""
        pending = [number for number, pushing in self._pushes.items() if partition in pushing.pending]
        return min(pending) - 1 if pending else max(self._last[partition], self._pushed)

    def _refused(self, number: int, part: Part, kind: str, reason: str, now_s: float) -> None:
        server = self._server(part.endpoint)
        match kind:
            case w.BUSY | w.GAP:
                self._withdraw(number, part)
                self._server(part.endpoint).pause(now_s)
            case w.HELLO:
                self._withdraw(number, part)
                server.greeted = False
                if part.is_hello:
                    self._server(part.endpoint).pause(now_s)
            case w.STALE if part.is_hello and not self.joined and self._lives < LIVES_MAX and reason.split()[-1].isdigit():
                # A clock that was set back: whoever has just begun knows that it is the latest.
                self._lives += 1
                self._life = int(reason.split()[-1]) + 1
                self._withdraw(number, part)
                for other in self._servers.values():
                    other.greeted = False
            case w.STALE:
                self._fail(
                    ModelError(f"worker {self._worker} of model {self._model!r} began anew in another process: this one ends")
                )
            case _ if part.pulling is not None:
                part.pulling.failure = ModelError(f"{part.endpoint} refused a pull: {reason}")
                self.cancel(part.pulling)
            case _:
                self._fail(ModelError(f"{part.endpoint} refused worker {self._worker} of model {self._model!r}: {reason}"))

    # --- what is sent ----------------------------------------------------------------------------------------------------

    def _flow(self, now_s: float) -> None:
        """Send what can be sent."""
        if self.failure is not None or self._routing is None:
            if self._who_s <= now_s and self.failure is None:
                self._ask_who_serves(now_s)
            return
        for endpoint in self._routing.acting:
            server = self._server(endpoint)
            if not server.greeted and not server.greeting and server.not_before_s <= now_s:
                server.greeting = True
                self._send(Part(endpoint, now_s + server.retry_s), w.Hello(self._model, self._worker, self._life))
        if not self.joined or self.settings is None:
            return
        self._flow_pushes(now_s)
        for pulling in self._pulls:
            if pulling.unsent:
                self._flow_pull(pulling, now_s)

    def _open(self, endpoint: str, now_s: float) -> bool:
        server = self._server(endpoint)
        return server.greeted and server.not_before_s <= now_s

    def _flow_pushes(self, now_s: float) -> None:
        assert self._routing is not None
        held: set[int] = set()  # partitions in which a push waits: later ones wait behind it
        for pushing in self._pushes.values():
            going: dict[str, list[int]] = {}
            for partition in sorted(pushing.pending - pushing.flying):
                endpoint = self._routing.endpoint_of(partition)
                if partition in held or not self._open(endpoint, now_s):
                    held.add(partition)
                else:
                    going.setdefault(endpoint, []).append(partition)
            for endpoint, partitions in going.items():
                self._send_push(pushing, endpoint, partitions, now_s)

    def _send_push(self, pushing: Pushing, endpoint: str, partitions: list[int], now_s: float) -> None:
        assert self._routing is not None
        columns = self._routing.of_partitions(pushing.columns, partitions)
        if is_large(columns):
            if len(partitions) == 1:
                self._fail(
                    ModelError(
                        f"push {pushing.number} has {columns_bytes(columns)} bytes in one partition: one message may have "
                        f"{COLUMN_BYTES_MAX}: push smaller batches, or give the model more partitions"
                    )
                )
                return
            half = len(partitions) // 2
            self._send_push(pushing, endpoint, partitions[:half], now_s)
            self._send_push(pushing, endpoint, partitions[half:], now_s)
            return
        pushing.flying.update(partitions)
        due_s = now_s + self._server(endpoint).retry_s
        part = Part(endpoint, due_s, pushing=pushing, partitions=tuple(partitions))
        self._send(
            part,
            w.Push(self._model, self._worker, self._life, pushing.number, part.partitions, columns, pushing.rate),
        )

    def _flow_pull(self, pulling: Pulling, now_s: float) -> None:
        assert self._routing is not None
        going: dict[str, dict[str, Places]] = {}
        touched: set[int] = set()
        unsent, pulling.unsent = pulling.unsent, {}
        for table, places in unsent.items():
            parts, partitions = self._routing.by_endpoint(pulling.keys_at(table, places))
            touched.update(partitions)
            for endpoint, part in parts.items():
                own = part if places is None else places if part is None else places[part]
                if self._open(endpoint, now_s):
                    going.setdefault(endpoint, {})[table] = own
                else:
                    pulling.again(table, own)
        for endpoint, own_places in going.items():
            for some in pulling.chunks(own_places):
                self._send_pull(pulling, endpoint, some, touched, now_s)

    def _send_pull(
        self, pulling: Pulling, endpoint: str, places: Mapping[str, Places], touched: set[int], now_s: float
    ) -> None:
        assert self._routing is not None
        tables = {table: pulling.keys_at(table, at) for table, at in places.items()}
        if all(at is None for at in places.values()) and set(places) == set(pulling.keys):
            partitions = tuple(sorted(touched))  # all there is of this pull
        else:
            partitions = tuple(sorted({one for keys in tables.values() for one in self._routing.partitions_of(keys)}))
        part = Part(endpoint, now_s + self._server(endpoint).retry_s, pulling=pulling, places=places)
        self._send(part, w.Pull(self._model, self._worker, self._life, pulling.clock, partitions, tables))

    def _send(self, part: Part, request: w.Request) -> None:
        self._numbers += 1
        self._parts[self._numbers] = part
        self._out.append(Send(part.endpoint, self._numbers, request))

    # --- what goes wrong -------------------------------------------------------------------------------------------------

    def _withdraw(self, number: int, part: Part) -> None:
        """Of a part that was not answered as hoped: what is in it is to be sent again. Its server gets no later push before."""
        del self._parts[number]
        self.retries += 1
        if part.is_hello:
            self._server(part.endpoint).greeting = False
        elif part.pulling is not None:
            for table, places in part.places.items():
                part.pulling.again(table, places)
        elif part.pushing is not None:
            part.pushing.flying.difference_update(part.partitions)
            for other, later in [(other, later) for other, later in self._parts.items() if later.endpoint == part.endpoint]:
                if later.pushing is not None:
                    del self._parts[other]
                    later.pushing.flying.difference_update(later.partitions)

    def _learn(self, serving: w.Serving, now_s: float) -> None:
        """What a server says of who serves what."""
        if self._routing is not None and len(serving.primaries) != self._routing.partitions:
            self._fail(
                ModelError(f"the servers of model {self._model!r} have other partitions than they had: make another client")
            )
            return
        self._routing = Routing(serving, 1 if self.settings is None else self.settings.shards)
        self._known |= dict.fromkeys(self._routing.endpoints)
        acting = self._routing.acting
        for number, part in list(self._parts.items()):
            if part.endpoint not in acting and number in self._parts:
                self._withdraw(number, part)
        self._who_s = np.inf if self._settled else now_s + (RETRY_S if self.joined else WHO_S)

    @property
    def _settled(self) -> bool:
        """Whether nobody keeps silent."""
        return self.joined and all(server.silences == 0 for server in self._servers.values())

    def _ask_who_serves(self, now_s: float) -> None:
        self._who_s = now_s + WHO_S
        for endpoint in self._known:
            self._numbers += 1  # no answer to it is waited for
            self._out.append(Send(endpoint, self._numbers, w.WhoServes(self._model)))
        self._show_life()

    def _show_life(self) -> None:
        """Tell servers that have nothing of us that we are here: while another one is away, they would take us for dead."""
        if self._routing is None or self.settings is None or self.settings.mode == w.ASYNC:
            return
        busy = {part.endpoint for part in self._parts.values()}
        for endpoint in self._routing.acting:
            if self._server(endpoint).greeted and endpoint not in busy:
                self._numbers += 1  # no answer to it is waited for
                self._out.append(Send(endpoint, self._numbers, w.Hello(self._model, self._worker, self._life)))

    def _fail(self, failure: EkkoError) -> None:
        """Nothing can be asked any more."""
        self.failure = self.failure or failure
        for pulling in self._pulls:
            pulling.failure = self.failure
        self._parts.clear()
        self._pulls.clear()

    def _server(self, endpoint: str) -> Server:
        return self._servers.setdefault(endpoint, Server())

    def _primary(self, partition: int) -> str | None:
        return None if self._routing is None else self._routing.endpoint_of(partition)


def _odd(endpoint: str) -> EkkoError:
    return EkkoError(f"{endpoint} answered something that was not asked: use one release of ekko for servers and workers")


def _lost(model: str, worker: int, partition: int, last: int, answered: int) -> ModelError:
    return ModelError(
        f"the servers of model {model!r} have the pushes of worker {worker} up to {last} in partition {partition}, and had "
        f"answered {answered}: they lost some. Make another client, and go on with the batch after its `clock`"
    )
