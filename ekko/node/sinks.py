"""The node's side of its sinks: a companion (`ekko.node.companion`) for each `[sinks.NAME]`, and how far each is behind.

A sink says up to where changes are in it. How far that is behind is worked out here, from the node's own ring of changes, so
that it is right also of one that says nothing any more.
"""

import asyncio
import time
from collections.abc import Mapping
from operator import itemgetter
from typing import Any, Final

import structlog

from ekko.companions.picture import SinkPicture
from ekko.config.sections import NodeConfig, SinkSection
from ekko.errors import ConfigError
from ekko.node.companion import Companion
from ekko.sinks.target import check_installed, shown
from ekko.store import Store

# A sink says how it is every half second; one that has been silent for longer is late by that much more.
SILENT_MS: Final = 2_000

log = structlog.get_logger(__name__)


def check_sinks(config: NodeConfig) -> None:
    """That what sinks need is installed.

    Raises:
        ConfigError: in one line.
    """
    for name, section in config.sinks.items():
        try:
            check_installed(section.target)
        except ConfigError as error:
            raise ConfigError(f"sinks.{name}.target: {error}") from None


class NodeSink:
    """One of them, beside one life of a node.

    Args:
        name: its name.
        section: its settings.
        config: the node's.
        store: what readers of the node see.
    """

    def __init__(self, name: str, section: SinkSection, config: NodeConfig, store: Store) -> None:
        self._name = name
        self._section = section
        self._node = config.node
        self._store = store
        self._heard_ms = 0
        self._through_ms = 0  # Unix milliseconds: what the node had then was in the sink once
        self._place: tuple[int, int, int] | None = None  # model, breaks, position: up to where changes are in the sink
        self._error, self._error_ms = "", 0  # the last one, and when it was there last
        self._failing = False
        self._labels = {"sink": name, "model": section.model, "target": shown(section.target)}
        self.process = Companion("sink", "ekko.sinks", self._begin, hear=self._hear, labels=self._labels)

    def _begin(self) -> dict[str, Any]:
        node, section = self._node, self._section
        return {
            "node": node.id,
            "sink": self._name,
            "run_dir": str(node.run_dir),
            "model": section.model,
            "target": section.target,
            "tables": section.tables,
            "feed_name": section.feed_name or node.id,
            "prefix": section.prefix,
        }

    def _hear(self, said: Mapping[str, Any]) -> None:
        match said:
            case {"state": dict(state)}:
                now_ms = time.time_ns() // 1_000_000
                self._heard_ms = now_ms
                self._through_ms = state["through_ms"] or self._through_ms
                if state["place"] is not None:
                    model, breaks, position = state["place"]
                    self._place = model, breaks, position
                if state["error"]:
                    self._error, self._error_ms = state["error"], now_ms
                if bool(state["error"]) != self._failing:  # not at each attempt
                    self._failing = not self._failing
                    if self._failing:
                        log.warning("sink_failing", **self._labels, reason=state["error"])
                    else:
                        log.info("sink_reached", **self._labels)

    def picture(self) -> SinkPicture:
        """How it is now."""
        now_ms = time.time_ns() // 1_000_000
        process = self.process.picture
        error, error_ms = max((self._error, self._error_ms), (process.error, process.error_ms), key=itemgetter(1))
        return SinkPicture(
            self._name,
            self._section.model,
            self._labels["target"],
            process,
            behind_rows=self._behind(),
            behind_ms=self._late_ms(now_ms),
            last_error=error,
            last_error_ms=error_ms,
        )

    def _behind(self) -> int | None:
        """Changes that the node has noted and that are not in the sink; None: it is not known which those are."""
        model = self._store.models.get(self._section.model)
        noted = None if model is None else model.changes_noted
        if model is None or noted is None or self._place is None:
            return None
        breaks, head = noted
        return head - self._place[2] if self._place[:2] == (model.spec.id, breaks) else None

    def _late_ms(self, now_ms: int) -> int | None:
        if not self._through_ms:
            return None
        state = self.process.picture.state
        if state and state["late_ms"] is not None and now_ms - self._heard_ms < SILENT_MS:
            return int(state["late_ms"])
        return max(0, now_ms - self._through_ms)


class NodeSinks:
    """All of a node's; see `NodeSink`."""

    def __init__(self, config: NodeConfig, store: Store) -> None:
        self._sinks = [NodeSink(name, section, config, store) for name, section in config.sinks.items()]

    async def run(self) -> None:
        """Run them until cancelled or stopped."""
        async with asyncio.TaskGroup() as tasks:
            for sink in self._sinks:
                tasks.create_task(sink.process.run())

    async def stop(self) -> None:
        """End them; what each is at has a moment, and where it is is left with it."""
        await asyncio.gather(*(sink.process.stop() for sink in self._sinks))

    def pictures(self) -> tuple[SinkPicture, ...]:
        """How they are now."""
        return tuple(sink.picture() for sink in self._sinks)
