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

from ekko.errors import EkkoError, ModelError, WorkerDropped
from ekko.train.dividing import parts_of_pull, parts_of_push
from ekko.train.requests import RETRY_S, Columns, Part, Pulling, Pushing, Send, Server
from ekko.train.routing import Routing
from ekko.train.server import wire as w
from ekko.train.server.wire import F32, U64
from ekko.train.standing import Standing

# How often a worker asks who serves what while it has no answer that helps.
WHO_S: Final = 0.1


class Outstanding:
    """All requests of one worker.

    Args:
        model: the model's name.
        worker: which worker this is, from 0.
        life: a number that is larger than in all lives of this worker before.
        endpoints: of servers of the model, any of them.
    """

    def __init__(self, model: str, worker: int, life: int, endpoints: tuple[str, ...]) -> None:
        self.standing = Standing(model, worker, life, endpoints)
        self._numbers = 0
        self._parts: dict[int, Part] = {}
        self._pulls: dict[Pulling, None] = {}  # without a complete answer
        self._pushes: dict[int, Pushing] = {}
        self._pushed = 0  # the number of the last one
        self._who_s = 0.0  # when to ask who serves what; infinity: not at all
        self._out: list[Send] = []
        self.failure: EkkoError | None = None  # of all that was asked, and will be
        self.stamp = 0  # the largest of pushes that were answered
        self.retries = 0  # requests that were sent again

    # --- what the owner asks ---------------------------------------------------------------------------------------------

    @property
    def settings(self) -> w.ModelSettings | None:
        """Of the model; None: no server has said them yet."""
        return self.standing.settings

    @property
    def joined(self) -> bool:
        """Whether every partition's primary has welcomed us."""
        return self.standing.joined

    @property
    def clock(self) -> int:
        """When we joined: the number of this worker's last push that is in all partitions."""
        return self.standing.clock

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

    def deadline_s(self, now_s: float) -> float:
        """When `tick` has something to do, unless something comes before."""
        times = [part.due_s for part in self._parts.values()]
        if self._pulls or self._pushes or not self.joined:
            times.append(self._who_s)
            times += self.standing.opens_s(now_s)
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
        assert self.standing.routing is not None
        pushing = Pushing(number, columns, rate, set(range(self.standing.routing.partitions)))
        self._pushes[number], self._pushed = pushing, number
        self._flow(now_s)
        return pushing

    def rejoin(self, life: int, now_s: float) -> int:
        """Begin a later life, after the servers have dropped us: nothing of the former one is sent again.

        Args:
            life: a number that is larger than in all lives before.
            now_s: the time.

        Returns:
            How many pushes had no answer.
        """
        assert isinstance(self.failure, WorkerDropped), self.failure
        self.failure = None
        lost, self._pushes, self._pushed = len(self._pushes), {}, 0
        self.standing.rejoin(life)
        self._who_s = now_s
        self._flow(now_s)
        return lost

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
                server.served()
                self._arrived(number, part, tables)
            case w.Pushed():
                server.served()
                self._taken(number, part, answer)
            case w.Welcome():
                server.served()
                self._welcomed(number, part, answer, now_s)
            case w.NotPrimary(serving):
                before = self.standing.routing
                self._withdraw(number, part)
                self._learn(serving, now_s)
                if before is not None and before.primaries == serving.primaries:
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
        if (failure := self.standing.welcomed(part.endpoint, answer, self._answered, now_s)) is not None:
            self._fail(failure)
            return
        self._follow_routing(now_s)

    def _answered(self, partition: int, last: int) -> int:
        """The number up to which our pushes were answered there; `last`: what counted there when we were welcomed."""
        pending = [number for number, pushing in self._pushes.items() if partition in pushing.pending]
        return min(pending) - 1 if pending else max(last, self._pushed)

    def _refused(self, number: int, part: Part, kind: str, reason: str, now_s: float) -> None:
        server = self._server(part.endpoint)
        server.reason = reason
        match kind:
            case w.BUSY | w.GAP:
                self._withdraw(number, part)
                self._server(part.endpoint).pause(now_s)
            case w.HELLO:
                self._withdraw(number, part)
                server.greeted = False
                if part.is_hello:
                    self._server(part.endpoint).pause(now_s)
            case w.STALE if part.is_hello and self.standing.may_raise() and (life := _last_number(reason)) is not None:
                self._withdraw(number, part)
                self.standing.raise_above(life)
            case w.STALE:
                self._fail(ModelError(f"{self.standing.who} began anew in another process: this one ends"))
            case w.DROPPED:
                waiting = f"; {len(self._pushes)} of its pushes had no answer and may be lost" if self._pushes else ""
                self._fail(
                    WorkerDropped(
                        f"{self.standing.who} was silent for too long (worker_timeout), and the others went on without it"
                        f"{waiting}: call client.rejoin(), and go on with the batch after client.clock"
                    )
                )
            case _ if part.pulling is not None:
                part.pulling.failure = ModelError(f"{part.endpoint} refused a pull: {reason}")
                self.cancel(part.pulling)
            case _:
                self._fail(ModelError(f"{part.endpoint} refused {self.standing.who}: {reason}"))

    # --- what is sent ----------------------------------------------------------------------------------------------------

    def _flow(self, now_s: float) -> None:
        """Send what can be sent."""
        routing = self.standing.routing
        if self.failure is not None or routing is None:
            if self._who_s <= now_s and self.failure is None:
                self._ask_who_serves(now_s)
            return
        for endpoint in self.standing.ungreeted(now_s):
            server = self._server(endpoint)
            server.greeting = True
            self._send(Part(endpoint, now_s + server.retry_s), self.standing.hello)
        if not self.joined or self.settings is None:
            return
        self._flow_pushes(routing, now_s)
        for pulling in self._pulls:
            if pulling.unsent:
                self._flow_pull(routing, pulling, now_s)

    def _flow_pushes(self, routing: Routing, now_s: float) -> None:
        held: set[int] = set()  # partitions in which a push waits: later ones wait behind it
        for pushing in self._pushes.values():
            going: dict[str, list[int]] = {}
            for partition in sorted(pushing.pending - pushing.flying):
                endpoint = routing.endpoint_of(partition)
                if partition in held or not self.standing.is_open(endpoint, now_s):
                    held.add(partition)
                else:
                    going.setdefault(endpoint, []).append(partition)
            for endpoint, partitions in going.items():
                try:
                    for some, columns in parts_of_push(routing, pushing, partitions):
                        self._send_push(pushing, endpoint, some, columns, now_s)
                except ModelError as error:
                    self._fail(error)
                    return

    def _send_push(
        self, pushing: Pushing, endpoint: str, partitions: tuple[int, ...], columns: dict[str, tuple[U64, F32]], now_s: float
    ) -> None:
        pushing.flying.update(partitions)
        part = Part(endpoint, now_s + self._server(endpoint).retry_s, pushing=pushing, partitions=partitions)
        one = self.standing
        self._send(part, w.Push(one.model, one.worker, one.life, pushing.number, partitions, columns, pushing.rate))

    def _flow_pull(self, routing: Routing, pulling: Pulling, now_s: float) -> None:
        one = self.standing
        for some in parts_of_pull(routing, pulling, lambda endpoint: one.is_open(endpoint, now_s)):
            part = Part(some.endpoint, now_s + self._server(some.endpoint).retry_s, pulling=pulling, places=some.places)
            self._send(part, w.Pull(one.model, one.worker, one.life, pulling.clock, some.partitions, some.tables))

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
        if (failure := self.standing.learn(serving)) is not None:
            self._fail(failure)
            return
        self._follow_routing(now_s)

    def _follow_routing(self, now_s: float) -> None:
        """Whom we know to be primary has changed, maybe: nothing waits for the answer of somebody else."""
        assert self.standing.routing is not None
        acting = self.standing.routing.acting
        for number, part in list(self._parts.items()):
            if part.endpoint not in acting and number in self._parts:
                self._withdraw(number, part)
        self._who_s = np.inf if self.standing.is_settled else now_s + (RETRY_S if self.joined else WHO_S)

    def _ask_who_serves(self, now_s: float) -> None:
        self._who_s = now_s + WHO_S
        for endpoint in self.standing.endpoints:
            self._ask(endpoint, w.WhoServes(self.standing.model))
        self._show_life()

    def _show_life(self) -> None:
        """Tell servers that have nothing of us that we are here: while another one is away, they would take us for dead."""
        routing = self.standing.routing
        if routing is None or self.settings is None or self.settings.mode == w.ASYNC:
            return
        busy = {part.endpoint for part in self._parts.values()}
        for endpoint in routing.acting:
            if self._server(endpoint).greeted and endpoint not in busy:
                self._ask(endpoint, self.standing.hello)

    def _ask(self, endpoint: str, request: w.Request) -> None:
        """Send what no answer is waited for."""
        self._numbers += 1
        self._out.append(Send(endpoint, self._numbers, request))

    def _fail(self, failure: EkkoError) -> None:
        """Nothing can be asked any more."""
        self.failure = self.failure or failure
        for pulling in self._pulls:
            pulling.failure = self.failure
        self._parts.clear()
        self._pulls.clear()

    def _server(self, endpoint: str) -> Server:
        return self.standing.server(endpoint)


def _last_number(reason: str) -> int | None:
    """The number in which a reason ends; None: it ends in something else."""
    digits = reason.rpartition(" ")[2]
    return int(digits) if digits.isascii() and digits.isdigit() and int(digits) < w.NUMBER_MAX else None


def _odd(endpoint: str) -> EkkoError:
    return EkkoError(f"{endpoint} answered something that was not asked: use one release of ekko for servers and workers")
