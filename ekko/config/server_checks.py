"""What `[server]` must be beyond its types."""

from typing import NoReturn

from ekko.addresses import check_endpoint, is_loopback, is_wildcard
from ekko.config.places import Places
from ekko.config.sections import NodeConfig, ServerModelSection, ServerSection, ServerTableSection
from ekko.errors import ConfigError, ModelError
from ekko.model import DENSE_TABLE, SHARDS_DEFAULT, check_name, training_name
from p2p.replica import PARTITIONS_MAX

# As the wire between workers and servers has it (`ekko.train.server.wire`), which a node without servers need not load.
SERVERS_MAX = 64
WORKERS_MAX = 1_024
STALENESS_MAX = 1 << 20
TABLES_MAX = 256
WORKER_TIMEOUT_S_MAX = 30 * 86_400.0
STATE_SUFFIX = ".state"  # of the table with the optimiser's state, beside one with rows


def check_server(config: NodeConfig, places: Places) -> None:
    """Everything about `[server]` that the types cannot say.

    Raises:
        ConfigError: with one line: file, line, setting, what is wrong, what to do.
    """
    if (server := config.server) is None:
        return
    if config.node.role != "train":
        message = f"a server runs beside a training node, and this one has role {config.node.role!r}: leave [server] out"
        raise places.error(("server",), message)
    _check_addresses(config, server, places)
    if not server.models:
        raise places.error(
            ("server", "models"), "there is none: add [server.models.NAME] with its tables, or leave [server] out"
        )
    for name, model in server.models.items():
        _check_model(config, name, model, places)


def _check_addresses(config: NodeConfig, server: ServerSection, places: Places) -> None:
    node = config.node

    def host_of(path: tuple[str, ...], address: str) -> str:
        try:
            host = check_endpoint(address, ipc=False)
        except ValueError as error:
            raise places.error(path, str(error)) from None
        assert host is not None
        if not is_loopback(host) and config.security is None:
            message = (
                f"host {host!r} is not loopback, and what goes beyond this machine is encrypted: add [security] with key_file "
                "and allow (see `ekko keygen`), or use 127.0.0.1"
            )
            raise places.error(path, message)
        return host

    wildcard = is_wildcard(host_of(("server", "listen"), server.listen))
    if wildcard and server.advertise is None:
        raise places.error(("server", "listen"), "nobody can dial that: set server.advertise to an address that others reach")
    taken = {"node.peers": node.peers, "node.local": node.local, "node.http": f"tcp://{node.http}"}
    if (clash := next((name for name, address in taken.items() if address == server.listen), None)) is not None:
        raise places.error(("server", "listen"), f"uses the same address as {clash}: each needs a port of its own")
    if server.advertise is not None and is_wildcard(host_of(("server", "advertise"), server.advertise)):
        raise places.error(("server", "advertise"), "nobody can dial that: name an address that others reach")
    if len(server.peers) >= SERVERS_MAX:
        raise places.error(("server", "peers"), f"there may be {SERVERS_MAX} servers, and these are {len(server.peers) + 1}")
    dialled: dict[str, str] = {}
    for name, address in (server.peers | {node.id: server.endpoint}).items():
        path = ("server", "peers", name)
        try:
            check_name("node", name)
        except ModelError as error:
            raise places.error(path, str(error)) from None
        if name == node.id and server.peers.get(name, address) != address:
            message = f"this node's own server is dialled at {address}, not {server.peers[name]}: correct it, or leave it out"
            raise places.error(path, message)
        if is_wildcard(host_of(path, address)):
            raise places.error(path, "nobody can dial that: name an address that is reached from here")
        if (other := dialled.setdefault(address, name)) != name:
            raise places.error(path, f"has the address of {other!r}: each server has one of its own")


def _check_model(config: NodeConfig, name: str, model: ServerModelSection, places: Places) -> None:
    at = ("server", "models", name)

    def refuse(key: str, message: str) -> NoReturn:
        raise places.error((*at, key), message)

    try:
        check_name("model", training_name(check_name("model", name)))
    except ModelError as error:
        raise places.error(at, str(error)) from None
    if training_name(name) in config.models:
        message = f"it is made as [server.models.{name}] says: leave this section out"
        raise places.error(("models", training_name(name)), message)
    served = config.models.get(name)
    shards = SHARDS_DEFAULT if served is None else served.shards
    if not 2 <= model.partitions <= min(PARTITIONS_MAX, shards):
        refuse(
            "partitions",
            f"expected a whole number from 2 to {PARTITIONS_MAX}, and no more than the model's {shards} shards, "
            f"got {model.partitions}",
        )
    if model.hold != "all" and not (model.hold and set(model.hold) <= set(range(model.partitions))):
        refuse("hold", f"expected 'all' or partitions from 0 to {model.partitions - 1}, got {model.hold}")
    _check_pace(model, refuse_at=at, places=places)
    if not 1 <= len(model.tables) <= TABLES_MAX:
        refuse("tables", f"expected 1 to {TABLES_MAX} tables, got {len(model.tables)}")
    for table, section in model.tables.items():
        path = (*at, "tables", table)
        _check_table(path, table, section, model, places)
        known = None if served is None else served.tables.get(table)
        if known is not None and (known.dim != section.dim or known.ttl != section.ttl):
            raise places.error(path, f"dim and ttl are not those of models.{name}.tables.{table}: make them the same")


def _check_pace(model: ServerModelSection, *, refuse_at: tuple[str, ...], places: Places) -> None:
    def refuse(key: str, message: str) -> NoReturn:
        raise places.error((*refuse_at, key), message)

    waits = model.mode != "async"
    if not (1 if waits else 0) <= model.workers <= WORKERS_MAX:
        refuse("workers", f"expected how many there are in mode {model.mode!r}, 1 to {WORKERS_MAX}, got {model.workers}")
    if not waits and "workers" in model.model_fields_set and model.workers:
        refuse("workers", "in mode 'async' nobody waits for anybody, and as many as come may: leave this out")
    if model.mode != "bounded" and model.staleness:
        refuse("staleness", f"only mode 'bounded' has one, and this is {model.mode!r}: leave this out")
    if not 0 <= model.staleness <= STALENESS_MAX:
        refuse("staleness", f"expected a whole number from 0 to {STALENESS_MAX}, got {model.staleness}")
    if not 0 <= model.worker_timeout <= WORKER_TIMEOUT_S_MAX or 0 < model.worker_timeout < 1:
        refuse(
            "worker_timeout",
            f'expected a time such as "60s", from 1 s to 30 days, or 0 to wait for ever, got {model.worker_timeout:g} s',
        )


def _check_table(
    path: tuple[str, ...], table: str, section: ServerTableSection, model: ServerModelSection, places: Places
) -> None:
    from ekko.train.admission import TOUCHES_MAX
    from ekko.train.optimizers import initializer_of, optimizer_of

    try:
        if table == DENSE_TABLE:
            raise ModelError(f"table name {DENSE_TABLE!r} is reserved for dense tensors: use another name")
        rows_of = table.removesuffix(STATE_SUFFIX)
        if table.startswith("_") or (rows_of != table and rows_of in model.tables):
            raise ModelError(f"table name {table!r} is one that servers use themselves: use another name")
        section.spec(table)
        check_name("table", table + STATE_SUFFIX)
    except ModelError as error:
        raise places.error(path, str(error)) from None
    if not 1 <= section.admission <= TOUCHES_MAX:
        raise places.error((*path, "admission"), f"expected a whole number from 1 to {TOUCHES_MAX}, got {section.admission}")
    try:
        optimizer_of(section.optimizer)
    except ConfigError as error:
        raise places.error((*path, "optimizer"), str(error)) from None
    try:
        initializer_of(section.initializer)
    except ConfigError as error:
        raise places.error((*path, "initializer"), str(error)) from None
