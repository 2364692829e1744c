"""What an operator does to the models of a cluster, through any of its nodes: switch aliases, drop models.

A switch is refused while some live holder has not caught up with the new model, since its readers would find rows missing. It
is set a moment ahead (`SWITCH_AHEAD_MS`): by then every node has heard of it, and all of them flip within the difference of
their clocks. Who hears of it later flips at once. Nothing here waits for nodes that are silent; they follow when they are back.
"""

import asyncio
import secrets
import time
from collections.abc import Callable

import structlog

from ekko.errors import EkkoError, ModelError
from ekko.generations import Alias, Generation, check_free
from ekko.model import EXTRAS_SINCE, check_name
from ekko.store import Store
from p2p import messages as m

# How long a switch waits for others to catch up before it is refused; below the command's own time-out.
CATCH_UP_MS = 20_000
# A timer is set at most so far ahead, since it counts another clock than the moment of a switch does, and that one may be set.
LOOK_AGAIN_S = 1.0
# Requests of operators that wait at once.
OPERATIONS_MAX = 16

log = structlog.get_logger(__name__)


class Operations:
    """Aliases and drops of one node's life.

    Args:
        node: its id.
        store: its models.
        submit: hands an event to the protocol; raises `EkkoError` when it is refused.
        protocol_min: the oldest protocol version that a member speaks, the silent ones included.
        clock: Unix milliseconds.
    """

    def __init__(
        self,
        node: str,
        store: Store,
        submit: Callable[[m.CaughtUpRequested | m.SchemaChanged], None],
        protocol_min: Callable[[], int],
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._node = node
        self._store = store
        self._submit = submit
        self._protocol_min = protocol_min
        self._clock = clock
        self._waits: dict[int, asyncio.Future[m.WaitEnded | m.Refused]] = {}  # by request
        self._requests = -1_000  # those of publishers count up from 0, those of other tools are constants above
        self._timer: asyncio.TimerHandle | None = None
        store.on_registers = self.settle

    # --- readers follow

    def settle(self) -> None:
        """Let switches whose moment has come count for readers, and look again when the next one comes."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_ms = self._clock()
        if self._store.settle_aliases(now_ms):
            log.info("alias_switched", aliases=self.aliases())
        next_ms = self._store.registers.pending(now_ms)
        if next_ms is not None:
            delay_s = min(LOOK_AGAIN_S, (next_ms - now_ms) / 1000)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self.settle)

    def close(self) -> None:
        """No timer fires any more, and who waits is told."""
        self._store.on_registers = lambda: None
        if self._timer is not None:
            self._timer.cancel()
        for wait in self._waits.values():
            wait.cancel()

    def aliases(self) -> dict[str, dict[str, object]]:
        """For people and tools: what each alias stands for now, what it stood for before, and what is ahead."""
        now_ms, registers = self._clock(), self._store.registers
        pictures: dict[str, dict[str, object]] = {}
        for name, alias in registers.aliases.items():
            current = registers.resolve(name, now_ms)
            if current is None:
                continue  # removed
            ahead = alias.effective_ms > now_ms
            pictures[name] = {
                "model": current.name,
                "here": self._store.holds(current),
                "back": None if alias.previous is None else alias.previous.name,
                "next": alias.target.name if ahead and alias.target is not None else None,
                "switches_ms": alias.effective_ms,
            }
        return pictures

    # --- what an operator asks

    async def alias(self, name: str, model: str | None, *, back: bool, remove: bool, force: bool) -> dict[str, object]:
        """Switch an alias.

        Args:
            name: the alias.
            model: what it is to stand for, unless it is to go back to what it stood for before, or to be removed.
            back: go back.
            remove: the name means a model again.
            force: also where some node has not caught up.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """
        registers = self._store.registers
        check_free(registers, name)
        self._check_versions()
        known = registers.aliases.get(name)
        if (back or remove) and (known is None or (known.target is None and not back)):
            raise ModelError(f"there is no alias {name!r}: there are {', '.join(map(repr, self.aliases())) or 'none'}")
        target: Generation | None = None
        if back:
            assert known is not None
            target = known.previous
            if target is None or registers.is_dropped(target):
                raise ModelError(f"alias {name!r} has no way back: what it stood for before is dropped, or there was nothing")
        elif not remove:
            target = self._generation(model or "")
        if target is not None and known is not None and known.target == target and not registers.is_dropped(target):
            raise ModelError(f"alias {name!r} stands for model {target.name!r} already, or is about to")
        silent: tuple[str, ...] = ()
        if target is not None:
            silent = await self._check_caught_up(name, target, force)
        # Others may have changed something while this waited.
        value = self._store.registers.switched(name, target, self._store.generation(name), self._clock(), secrets.randbits(64))
        if target is not None and not self._store.holds(target):
            raise ModelError(f"model {target.name!r} was dropped meanwhile")
        self._publish(value)
        return {
            "alias": name,
            "model": None if target is None else target.name,
            "before": None if value.previous is None else value.previous.name,
            "switches_ms": value.effective_ms,
            "silent": list(silent),
        }

    def _publish(self, value: Alias) -> None:
        self._store.set_alias(value)
        log.info("alias_set", alias=value.name, model=None if value.target is None else value.target.name)
        self._submit(m.SchemaChanged())

    def _generation(self, model: str) -> Generation:
        check_name("model", model)
        generation = self._store.generation(model)
        if generation is None:
            known = ", ".join(map(repr, self._store.models)) or "none"
            stands_for = self._store.registers.resolve(model, self._clock())
            which = "" if stands_for is None else f" (an alias, now of model {stands_for.name!r}: name that)"
            raise ModelError(f"node {self._node!r} has no model {model!r}{which}: it has {known}")
        return generation

    def _check_versions(self) -> None:
        """Nodes of version 1 know neither aliases nor drops."""
        oldest = self._protocol_min()
        if oldest < EXTRAS_SINCE:
            raise ModelError(
                f"some node, silent ones included, has protocol version {oldest}, which knows no aliases and no drops: upgrade "
                "all nodes first (`ekko status` shows who), and expel those that are gone for good"
            )

    async def _check_caught_up(self, alias: str, target: Generation, force: bool) -> tuple[str, ...]:
        """Who is silent, and was not waited for.

        Raises:
            ModelError: some live holder has not caught up with the model, or it is empty; not with `force`.
        """
        model = self._store.models.get(target.name)
        if model is None or not self._store.holds(target):
            raise ModelError(f"node {self._node!r} does not have model {target.name!r}: ask one that has")
        if force:
            return ()
        remedy = "wait for them, or use --force"
        if not model.stamp_max:
            raise ModelError(f"model {target.name!r} is empty: publish it first, or use --force")
        answer = await self.wait_caught_up(model.spec.id)
        if isinstance(answer, m.Refused):
            raise ModelError(f"alias {alias!r} is not switched to model {target.name!r}: {answer.reason}")
        if answer.lagging:
            raise ModelError(
                f"alias {alias!r} is not switched: {', '.join(answer.lagging)} "
                f"{'has' if len(answer.lagging) == 1 else 'have'} not caught up with model {target.name!r} yet: {remedy}"
            )
        return answer.silent

    async def wait_caught_up(self, family: int, timeout_ms: int = CATCH_UP_MS) -> m.WaitEnded | m.Refused:
        """Wait until all live holders of a model have what is here of it; who has not by then, and who is silent.

        Raises:
            EkkoError: too many wait.
        """
        if len(self._waits) >= OPERATIONS_MAX:
            raise EkkoError(f"{OPERATIONS_MAX} operations wait on this node already: ask again in a moment")
        self._requests -= 1
        request = self._requests
        wait: asyncio.Future[m.WaitEnded | m.Refused] = asyncio.get_running_loop().create_future()
        self._waits[request] = wait
        try:
            self._submit(m.CaughtUpRequested(request, family, timeout_ms))
            return await wait
        finally:
            del self._waits[request]

    def on_answer(self, answer: m.WaitEnded | m.Refused) -> bool:
        """Whether an answer of the protocol was for an operation here."""
        wait = self._waits.get(answer.request)
        if wait is not None and not wait.done():
            wait.set_result(answer)
        return wait is not None

    def drop(self, what: str, *, force: bool) -> dict[str, object]:
        """Drop a model, or one of its tables (`MODEL/TABLE`), on all nodes, for good.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """
        model, slash, table = what.partition("/")
        generation = self._generation(model)
        self._check_versions()
        used, kept = self._store.registers.users_of(generation)
        if slash:
            return self._drop_table(generation, table, used, force=force)
        # The name of an alias means the model that it stands for, also to who wants to drop one of the same name.
        if used:
            raise ModelError(f"alias {used[0]!r} stands for model {model!r}: switch it to another one first")
        if kept and not force:
            raise ModelError(f"model {model!r} is the way back of alias {kept[0]!r}: use --force to drop it all the same")
        taken = self._store.drop_model(model, self._clock())
        log.warning("model_dropped", model=model, incarnation=generation.incarnation, bytes=taken)
        self._submit(m.SchemaChanged())
        return {"model": model, "bytes": taken}

    def _drop_table(self, generation: Generation, table: str, used: list[str], *, force: bool) -> dict[str, object]:
        model = generation.name
        if used and not force:
            raise ModelError(f"alias {used[0]!r} stands for model {model!r}: use --force to drop a table of it all the same")
        taken = self._store.drop_table(model, table, self._clock())
        log.warning("table_dropped", model=model, table=table, bytes=taken)
        self._submit(m.SchemaChanged())
        return {"model": model, "table": table, "bytes": taken}
