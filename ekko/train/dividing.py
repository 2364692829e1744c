"""Pulls and pushes as messages to servers: each server has what belongs to its partitions, and no message is too large."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from ekko.errors import ModelError
from ekko.train.requests import COLUMN_BYTES_MAX, Pulling, Pushing, columns_bytes, is_large
from ekko.train.routing import Places, Routing
from ekko.train.server.wire import F32, U64


@dataclass(frozen=True, slots=True, eq=False)
class PullPart:
    """Some keys of a pull, for one server."""

    endpoint: str
    places: Mapping[str, Places]  # where they are among the pull's
    partitions: tuple[int, ...]  # of all keys, and of no others
    tables: dict[str, U64]


def parts_of_pull(routing: Routing, pulling: Pulling, is_open: Callable[[str], bool]) -> Iterator[PullPart]:
    """What of a pull is not with a server and can be sent. What cannot is left with it."""
    going: dict[str, dict[str, Places]] = {}
    touched: set[int] = set()
    unsent, pulling.unsent = pulling.unsent, {}
    for table, places in unsent.items():
        parts, partitions = routing.by_endpoint(pulling.keys_at(table, places))
        touched.update(partitions)
        for endpoint, part in parts.items():
            own = part if places is None else places if part is None else places[part]
            if is_open(endpoint):
                going.setdefault(endpoint, {})[table] = own
            else:
                pulling.again(table, own)
    for endpoint, own_places in going.items():
        for some in pulling.chunks(own_places):
            tables = {table: pulling.keys_at(table, at) for table, at in some.items()}
            if all(at is None for at in some.values()) and set(some) == set(pulling.keys):
                named = tuple(sorted(touched))  # all there is of this pull
            else:
                named = tuple(sorted({one for keys in tables.values() for one in routing.partitions_of(keys)}))
            yield PullPart(endpoint, some, named, tables)


def parts_of_push(
    routing: Routing, pushing: Pushing, partitions: list[int]
) -> Iterator[tuple[tuple[int, ...], dict[str, tuple[U64, F32]]]]:
    """A push in some partitions, which have one server: partitions, and the columns of their keys.

    Raises:
        ModelError: one partition has more than a message may.
    """
    columns = routing.of_partitions(pushing.columns, partitions)
    if not is_large(columns):
        yield tuple(partitions), columns
        return
    if len(partitions) == 1:
        raise ModelError(
            f"push {pushing.number} has {columns_bytes(columns)} bytes in one partition: one message may have "
            f"{COLUMN_BYTES_MAX}: push smaller batches, or give the model more partitions"
        )
    half = len(partitions) // 2
    yield from parts_of_push(routing, pushing, partitions[:half])
    yield from parts_of_push(routing, pushing, partitions[half:])
