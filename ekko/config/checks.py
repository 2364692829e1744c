"""What the values of a configuration must be beyond their types: names, addresses, bounds, and what goes together."""

import re
from collections.abc import Iterator
from typing import NoReturn

from ekko.addresses import check_endpoint, is_loopback, is_wildcard, split_host_port
from ekko.config.places import Places
from ekko.config.sections import HealthSection, ModelSection, NodeConfig, NodeSection, PrioritySection, SnapshotsSection
from ekko.config.server_checks import check_server
from ekko.config.sink_checks import check_sinks
from ekko.delayed.limits import LOG_BYTES_MIN
from ekko.errors import ConfigError, ModelError
from ekko.model import DENSE_TABLE, TableSpec, check_name, ttl_seconds
from ekko.priority.functions import formula_of
from ekko.rates import RATE_MBPS_MAX, RATE_MBPS_MIN
from p2p.replica import PARTITIONS_MAX

CAPACITY_ROWS_MAX = 1 << 40
CAPACITY_BYTES_MIN = 1 << 20  # anything near is the number of something else
PERCENT_MIN, PERCENT_MAX = 1.0, 99.999
PRIORITY_S_MAX = 30 * 86_400.0
FRESH_WEIGHT_MAX = 1e6
DELAY_MS_MAX = 60_000.0  # emulation of a link longer than this would look like a dead peer
SNAPSHOT_S_MIN, SNAPSHOT_S_MAX = 1.0, 366 * 86_400.0
SNAPSHOTS_KEPT_MAX = 100
WINDOW_S_MIN, WINDOW_S_MAX = 1.0, 3_600.0  # verdicts are by the second; and nobody waits for longer ones
LATENESS_S_MAX = 3_600.0
WINDOWS_LATE_MAX = 360  # `ekko.health.windows.WINDOWS_OPEN_MAX` has room for them
HORIZON_S_MAX = 31 * 86_400.0
FIGURES = ("auc", "log_loss", "ctr", "calibration", "own")
DEVICE_NAME = re.compile(r"host-twin|cuda:\d{1,3}")
CACHE_ROWS_MAX = 1 << 36  # 2 TB of the shortest rows
CACHE_BYTES_MIN = 1 << 20  # as CAPACITY_BYTES_MIN
DELAY_S_MAX = 7 * 86_400.0  # a log of a week is a mistake


def check(config: NodeConfig, places: Places) -> None:
    """Everything that the types cannot say.

    Raises:
        ConfigError: with one line: file, line, setting, what is wrong, what to do.
    """
    _check_node(config.node, places)
    _check_addresses(config.node, places, encrypted=config.security is not None)
    for name, model in config.models.items():
        _check_model(name, model, places)
        _check_eviction(name, model, config.node.role, places)
        _check_priority(name, model.priority, places)
    _check_links(config, places)
    if config.snapshots is not None:
        _check_snapshots(config.snapshots, places)
        if config.node.role == "baseline":
            message = "a baseline's state is behind on purpose, and nobody is to begin with it: take snapshots of another node"
            raise places.error(("snapshots",), message)
    if config.health is not None:
        _check_health(config.health, config.node.role, places)
    _check_device(config, places)
    check_server(config, places)
    check_sinks(config, places)


def _check_device(config: NodeConfig, places: Places) -> None:
    if config.device is not None:
        if not DEVICE_NAME.fullmatch(config.device.name):
            message = f'expected "cuda:0", the number of a GPU of this machine, or "host-twin", got {config.device.name!r}'
            raise places.error(("device", "name"), message)
        if not 0 <= config.device.rows <= CACHE_ROWS_MAX:
            message = f"expected 0 to {CACHE_ROWS_MAX} rows of each table, got {config.device.rows}"
            raise places.error(("device", "rows"), message)
    for name, model in config.models.items():
        if (cache := model.device) is None:
            continue
        at = ("models", name, "device")
        if config.device is None:
            raise places.error(at, "the node has no device: add [device] with its name, or leave this out")
        if cache.rows is not None and cache.bytes is not None:
            raise places.error((*at, "bytes"), "rows and bytes both say how large its caches are: keep one")
        if cache.rows is not None and not 0 <= cache.rows <= CACHE_ROWS_MAX:
            raise places.error((*at, "rows"), f"expected 0 to {CACHE_ROWS_MAX} rows of each table, got {cache.rows}")
        if cache.bytes is not None and cache.bytes < CACHE_BYTES_MIN:
            raise places.error((*at, "bytes"), f"expected at least {CACHE_BYTES_MIN} bytes for each table, got {cache.bytes}")


def _check_health(health: HealthSection, role: str, places: Places) -> None:
    def refuse(key: str, message: str) -> NoReturn:
        raise places.error(("health", key), message)

    if not WINDOW_S_MIN <= health.window <= WINDOW_S_MAX:
        refuse("window", f'expected a time such as "10s", from 1 s to an hour, got {health.window:g} s')
    if not 0 <= health.lateness <= LATENESS_S_MAX or health.lateness > WINDOWS_LATE_MAX * health.window:
        refuse(
            "lateness",
            f"expected up to an hour and up to {WINDOWS_LATE_MAX} windows, got {health.lateness:g} s: make windows longer",
        )
    if not health.window <= health.horizon <= HORIZON_S_MAX:
        refuse("horizon", f'expected a time such as "24h", from one window to a month, got {health.horizon:g} s')
    for key, value, low, high in (
        ("level", health.level, 1e-12, 0.5),
        ("tolerance", health.tolerance, 0.0, 1.0),
        ("precision", health.precision, 1e-6, 1.0),
        ("baseline_share", health.baseline_share, 0.0, 0.5),
        ("probe_share", health.probe_share, 0.001, 1.0),
    ):
        if not low <= value <= high:
            refuse(key, f"expected a number from {low:g} to {high:g}, got {value:g}")
    if not 0 <= health.auto_rollback_every <= HORIZON_S_MAX:
        refuse("auto_rollback_every", f'expected a time such as "60s", up to a month, got {health.auto_rollback_every:g} s')
    if not health.detectors:
        refuse("detectors", 'expected some of "sequential", "watermarks", "drift": leave [health] out to judge nothing')
    if len(set(health.detectors)) != len(health.detectors):
        refuse("detectors", f"one is there twice: {health.detectors}")
    if health.auto_rollback and role != "witness":
        refuse("auto_rollback", f"this node has role {role!r}, and only a witness rolls back: set it in a witness's file")
    if health.metric == "own" and health.own_metric is None:
        refuse("metric", "it is 'own', and own_metric does not say which")
    unknown = [name for name in health.watermarks if name not in FIGURES]
    if unknown:
        refuse("watermarks", f"there is no figure {unknown[0]!r}: there are {', '.join(FIGURES)}")


def check_formulas(config: NodeConfig, places: Places) -> None:
    """That there are the formulas which rows are weighed by, once their paths are absolute.

    Raises:
        ConfigError: as above.
    """
    if config.node.role != "train":
        return  # weighs nothing, and need not have what a formula is made of
    for name, model in config.models.items():
        try:
            formula_of(model.priority.formula)
        except ConfigError as error:
            raise places.error(("models", name, "priority", "formula"), str(error)) from None


def _check_snapshots(snapshots: SnapshotsSection, places: Places) -> None:
    for key, seconds in (("every", snapshots.every), ("full_every", snapshots.full_every)):
        if not SNAPSHOT_S_MIN <= seconds <= SNAPSHOT_S_MAX:
            raise places.error(
                ("snapshots", key), f'expected a time such as "10m" or "24h", from 1 s to a year, got {seconds:g} s'
            )
    if not 1 <= snapshots.keep <= SNAPSHOTS_KEPT_MAX:
        raise places.error(("snapshots", "keep"), f"expected 1 to {SNAPSHOTS_KEPT_MAX} full snapshots, got {snapshots.keep}")
    for key, url in (("url", snapshots.url), ("seed", snapshots.seed)):
        if url == "":
            raise places.error(("snapshots", key), 'expected a folder or a URL such as "s3://bucket/ekko"')


def _check_node(node: NodeSection, places: Places) -> None:
    for key, kind, value in (("id", "node", node.id), ("region", "region", node.region)):
        try:
            check_name(kind, value)
        except ModelError as error:
            raise places.error(("node", key), str(error)) from None
    try:
        _ = node.access
    except KeyError:
        message = f"there is no group {node.shm_group!r} on this machine: name one of which the daemon's user is a member"
        raise places.error(("node", "shm_group"), message) from None
    _check_older_state(node, places)
    if not node.hot_half_life_s >= 1:
        raise places.error(("node", "hot_half_life_s"), f"{node.hot_half_life_s:g} seconds: expected 1 or more")


def _check_older_state(node: NodeSection, places: Places) -> None:
    for key in ("delay", "log_bytes"):
        if getattr(node, key) is not None and not node.keeps_older_state:
            message = (
                f"a node with role {node.role!r} keeps no older state: leave this out, or use role 'baseline' or 'witness'"
            )
            raise places.error(("node", key), message)
    least = 1.0 if node.role == "baseline" else 0.0
    if not least <= node.delay_s <= DELAY_S_MAX:
        raise places.error(
            ("node", "delay"), f'expected a time such as "5m", from {least:g} s to 7 days, got {node.delay_s:g} s'
        )
    if node.log_bytes_max < LOG_BYTES_MIN:
        raise places.error(
            ("node", "log_bytes"), f'expected a size such as "16GB", at least {LOG_BYTES_MIN} bytes, got {node.log_bytes_max}'
        )


def _addresses(node: NodeSection) -> Iterator[tuple[str, str]]:
    yield "peers", node.peers
    yield "local", node.local
    yield from (("seeds", seed) for seed in node.seeds)
    if node.advertise is not None:
        yield "advertise", node.advertise


def _check_addresses(node: NodeSection, places: Places, *, encrypted: bool) -> None:
    for key, address in _addresses(node):
        try:
            host = check_endpoint(address, ipc=key == "local")
            if host is not None:
                _check_reach(node, key, host, encrypted=encrypted)
        except ValueError as error:
            raise places.error(("node", key), str(error)) from None
    try:
        host, port = split_host_port(node.http)
        if not is_loopback(host) and not node.http_public:
            raise ValueError(
                f"host {host!r} is not loopback, and http neither encrypts nor asks who asks: use 127.0.0.1, or set"
                " http_public = true"
            )
    except ValueError as error:
        raise places.error(("node", "http"), str(error)) from None
    bound = {"peers": node.peers, "local": node.local, "http": f"tcp://{host}:{port}"}
    for key, address in list(bound.items())[1:]:
        clash = next((other for other, taken in bound.items() if other != key and taken == address), None)
        if clash is not None:
            raise places.error(("node", key), f"uses the same address as node.{clash}: each needs a port of its own")


def _check_reach(node: NodeSection, key: str, host: str, *, encrypted: bool) -> None:
    """Refuse a host that others can reach in the clear, or that nobody can dial.

    Raises:
        ValueError: in one line, with the remedy.
    """
    if key == "local":
        if not is_loopback(host):
            raise ValueError(
                f"host {host!r} is not loopback: publishers run on the node's own machine; use 127.0.0.1 or ipc:///PATH"
            )
    elif not is_loopback(host) and not encrypted:
        raise ValueError(
            f"host {host!r} is not loopback, and links beyond this machine are encrypted: add [security] with key_file and"
            " allow (see `ekko keygen`), or use 127.0.0.1"
        )
    elif is_wildcard(host) and (key != "peers" or node.advertise is None):
        raise ValueError(f"nobody can dial host {host!r}: set advertise to an address that others reach")


def _check_model(name: str, model: ModelSection, places: Places) -> None:
    def refuse(key: str, message: str) -> NoReturn:
        raise places.error(("models", name, key), message)

    if not 1 <= model.partitions <= min(PARTITIONS_MAX, max(1, model.shards)):
        refuse(
            "partitions",
            f"expected a whole number from 1 to {PARTITIONS_MAX}, and no more than its {model.shards} shards, "
            f"got {model.partitions}",
        )
    if model.hold != "all":
        if not model.hold and model.partitions == 1:
            refuse("hold", "expected 'all' or a list of partitions, got []: only a model of several is held by some nodes only")
        if not set(model.hold) <= set(range(model.partitions)):
            refuse("hold", f"expected 'all' or partitions from 0 to {model.partitions - 1}, got {model.hold}")
        if len(set(model.hold)) != len(model.hold):
            refuse("hold", f"a partition is there twice: {model.hold}")
    if not 1 <= model.capacity_rows <= CAPACITY_ROWS_MAX:
        refuse("capacity_rows", f"expected a whole number from 1 to {CAPACITY_ROWS_MAX}, got {model.capacity_rows}")
    if model.capacity_bytes is not None and model.capacity_bytes < CAPACITY_BYTES_MIN:
        refuse(
            "capacity_bytes",
            f"expected at least {CAPACITY_BYTES_MIN} bytes, got {model.capacity_bytes}: leave it out for no limit",
        )
    for table, section in model.tables.items():
        try:
            if table == DENSE_TABLE:
                raise ModelError(f"table name {table!r} is reserved for dense tensors: use another name")
            TableSpec(table, section.dim, ttl_s=ttl_seconds(table, section.ttl))
        except ModelError as error:
            raise places.error(("models", name, "tables", table), str(error)) from None
    try:
        check_name("model", name)
    except ModelError as error:
        raise places.error(("models", name), str(error)) from None
    try:
        model.spec(name)
    except ModelError as error:
        refuse("shards", str(error))


def _check_eviction(name: str, model: ModelSection, role: str, places: Places) -> None:
    given = model.model_fields_set
    if "when_full" in given and model.capacity_bytes is None:
        raise places.error(("models", name, "when_full"), "there is no limit to reach: set capacity_bytes, too")
    if "evict" in given and model.when_full != "evict":
        raise places.error(("models", name, "evict"), 'nothing is evicted: set when_full = "evict", too')
    if model.when_full == "evict" and role in ("baseline", "witness"):
        raise places.error(
            ("models", name, "when_full"),
            "a node that keeps an older state holds all that comes, so it refuses and never evicts: leave this out",
        )
    if model.when_full == "evict" and role == "train":
        raise places.error(
            ("models", name, "when_full"),
            "a training node holds what nobody else may hold yet, so it refuses and never evicts: leave this out",
        )


def _check_rate(pair: str, regions: list[str], rate_mbps: float, places: Places) -> None:
    if regions[0] == regions[1]:
        message = "updates are limited between regions, and these are the same one: name two, or leave this out"
        raise places.error(("links", pair, "rate_mbps"), message)
    if not RATE_MBPS_MIN <= rate_mbps <= RATE_MBPS_MAX:
        message = f"expected {RATE_MBPS_MIN:g} to {RATE_MBPS_MAX:g} Mbit/s, got {rate_mbps:g}: leave it out for no limit"
        raise places.error(("links", pair, "rate_mbps"), message)


def _check_priority(name: str, priority: PrioritySection, places: Places) -> None:
    at = ("models", name, "priority")
    if not PERCENT_MIN <= priority.k <= PERCENT_MAX:
        raise places.error((*at, "k"), f"expected {PERCENT_MIN:g} to {PERCENT_MAX:g} percent, got {priority.k:g}")
    for key, seconds in (("window", priority.window), ("fresh_half_life", priority.fresh_half_life)):
        if not 1 <= seconds <= PRIORITY_S_MAX:
            raise places.error((*at, key), f'expected a time such as "60s" or "10m", from 1 s to 30 days, got {seconds:g} s')
    if not 0 <= priority.fresh_weight <= FRESH_WEIGHT_MAX:
        raise places.error((*at, "fresh_weight"), f"expected 0 to {FRESH_WEIGHT_MAX:g}, got {priority.fresh_weight:g}")


def _check_links(config: NodeConfig, places: Places) -> None:
    for pair, link in config.links.items():
        regions = pair.split("/")
        if len(regions) != 2 or not all(regions):
            raise places.error(("links", pair), 'expected a pair of regions such as "eu/us"')
        if regions[0] != regions[1] and "/".join(reversed(regions)) in config.links:
            raise places.error(("links", pair), "this pair is there twice, once in each order: links are symmetric, keep one")
        if link.rate_mbps is not None:
            _check_rate(pair, regions, link.rate_mbps, places)
        if not 0 <= link.delay_ms <= DELAY_MS_MAX:
            raise places.error(
                ("links", pair, "delay_ms"), f"expected 0 to {DELAY_MS_MAX:.0f} milliseconds, got {link.delay_ms}"
            )
