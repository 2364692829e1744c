"""A node's configuration: typed TOML, checked before anything starts.

Every mistake is one line that names the file, the line and the setting, says what was expected and, where there is one, the
remedy. A setting that this version cannot honour is refused, never ignored. Variables `EKKO_<SECTION>__<KEY>` of the
environment (`EKKO_NODE__HTTP=127.0.0.1:7905`) override the file; lists are written as JSON.
"""

import difflib
import grp
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from ekko.addresses import check_endpoint, is_loopback, is_wildcard, split_host_port
from ekko.errors import ConfigError, ModelError
from ekko.model import DENSE_TABLE, SHARDS_DEFAULT, ModelSpec, TableSpec, check_name, ttl_seconds
from ekko.store.access import MODES, Access
from p2p.replica import PARTITIONS_MAX

ENVIRONMENT_PREFIX = "EKKO_"
CONFIG_BYTES_MAX = 1 << 20  # a node's file has some dozens of lines; anything near this is not a configuration
CAPACITY_ROWS_MAX = 1 << 40
CAPACITY_BYTES_MIN = 1 << 20  # anything near is the number of something else
DELAY_MS_MAX = 60_000.0  # emulation of a link longer than this would look like a dead peer
SNAPSHOT_S_MIN, SNAPSHOT_S_MAX = 1.0, 366 * 86_400.0
SNAPSHOTS_KEPT_MAX = 100
NOT_BUILT = "is not available in this version"
ROLES = ("train", "serve", "baseline", "witness")
ROLES_BUILT = ("train", "serve")

KeyPath = tuple[str, ...]


def _whole_number(value: object) -> object:
    """Let digits in quotes pass for a whole number: the environment has nothing but text."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"\d[\d_]*", value) else value


def _number(value: object) -> object:
    """The same for numbers with a fraction."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?", value) else value


def _truth(value: object) -> object:
    """And for yes and no."""
    return {"true": True, "false": False}.get(value, value) if isinstance(value, str) else value


_UNITS = {"B": 1} | {f"{prefix}B": 1000**n for n, prefix in enumerate("kMGTP", 1)}
_UNITS |= {"KB": 1000} | {f"{prefix}iB": 1024**n for n, prefix in enumerate("KMGTP", 1)}


def _byte_size(value: object) -> object:
    """A number of bytes, or text with a unit: "100GB", "1.5 GiB"."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)", value)):
        factor = _UNITS.get(match[2] or "B")
        if factor is not None:
            return int(float(match[1].replace("_", "")) * factor)
    return value


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]
ByteSize = Annotated[int, BeforeValidator(_byte_size)]
Number = Annotated[float, BeforeValidator(_number)]


_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _seconds(value: object) -> object:
    """Text such as "10m" for seconds."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhd]?)", value)):
        return float(match[1]) * _SECONDS[match[2] or "s"]
    return value


Seconds = Annotated[float, BeforeValidator(_seconds)]


class Section(BaseModel):
    """One table of the file: no conversions, no unknown keys, no changes afterwards."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NodeSection(Section):
    """`[node]`: who this node is and where it listens."""

    id: str
    region: str
    role: Literal["train", "serve", "baseline", "witness"]
    run_dir: Annotated[Path, Field(strict=False)]
    peers: str
    local: str
    http: str
    seeds: list[str] = []
    advertise: str | None = None
    http_public: Annotated[bool, BeforeValidator(_truth)] = False
    compression: Literal["auto", "always", "never"] = "auto"
    expel_after_s: Number = 86_400.0
    hot_half_life_s: Number = 600.0
    shm_mode: Literal["0600", "0640", "0644"] = "0640"
    shm_group: str | None = None

    @property
    def access(self) -> Access:
        """Who may read the store.

        Raises:
            KeyError: there is no such group.
        """
        return Access(MODES[self.shm_mode], None if self.shm_group is None else grp.getgrnam(self.shm_group).gr_gid)


class TableSection(Section):
    """`[models.NAME.tables]`, one table."""

    dim: WholeNumber
    ttl: Any = ""  # `ttl_seconds` says what is right


def _table_section(value: object) -> object:
    """A dim alone is a table without anything else."""
    return value if isinstance(value, dict | TableSection) else {"dim": value}


class ModelSection(Section):
    """`[models.NAME]`: what exists from the start."""

    shards: WholeNumber = SHARDS_DEFAULT
    tables: dict[str, Annotated[TableSection, BeforeValidator(_table_section)]] = {}
    capacity_rows: WholeNumber = 1_000_000
    codec: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    partitions: WholeNumber = 1
    hold: Literal["all"] | list[int] = "all"
    capacity_bytes: ByteSize | None = None
    when_full: Literal["refuse", "evict"] = "refuse"
    evict: Literal["least_recently_updated", "least_frequently_read"] = "least_recently_updated"

    def spec(self, name: str) -> ModelSpec:
        """The schema that these settings ask for.

        Raises:
            ModelError: a name or a size is out of its limits.
        """
        tables = {
            name: TableSpec(name, table.dim, self.codec, ttl_seconds(name, table.ttl)) for name, table in self.tables.items()
        }
        return ModelSpec(name, self.shards, tables, partitions=self.partitions, codec=self.codec)

    @property
    def held(self) -> tuple[int, ...]:
        """The partitions that this node is to hold."""
        return tuple(range(self.partitions)) if self.hold == "all" else tuple(self.hold)


class LinkSection(Section):
    """`[links]`, one pair of regions, both directions."""

    rate_mbps: Number | None = None
    delay_ms: Number = 0.0


class SecuritySection(Section):
    """`[security]`: CURVE on all links between nodes; relative paths are taken from the folder of the file."""

    key_file: Annotated[Path, Field(strict=False)]
    allow: Annotated[Path, Field(strict=False)]


class SnapshotsSection(Section):
    """`[snapshots]`: where to, how often; a relative path is taken from the folder of the file."""

    url: str
    every: Seconds = 600.0
    full_every: Seconds = 86_400.0
    keep: WholeNumber = 2
    seed: str | None = None


class NodeConfig(BaseSettings):
    """A whole node.toml, checked."""

    model_config = SettingsConfigDict(
        strict=True,
        extra="forbid",
        frozen=True,
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
    )

    node: NodeSection
    models: dict[str, ModelSection] = {}
    links: dict[str, LinkSection] = {}
    security: SecuritySection | None = None
    snapshots: SnapshotsSection | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment before the file; nothing else."""
        return env_settings, init_settings

    @property
    def http_address(self) -> tuple[str, int]:
        """Host and port of the HTTP server."""
        return split_host_port(self.node.http)

    def delay_s(self, region: str, other: str) -> float:
        """The one-way delay to emulate between two regions, in seconds."""
        link = self.links.get(f"{region}/{other}") or self.links.get(f"{other}/{region}")
        return link.delay_ms / 1000 if link else 0.0


def load_config(path: Path | str) -> NodeConfig:
    """Read and check one configuration file.

    Relative paths are taken from the folder of the file.

    Raises:
        ConfigError: with one line: file, line, setting, what is wrong, what to do.
    """
    path = Path(path)
    text = _read(path)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, line = _syntax_error(str(error), text)
        raise ConfigError(f"{path}:{line}: not valid TOML: {message}") from None
    places = Places(path, text)
    _check_environment_names()
    try:
        config = NodeConfig(**values)
    except ValidationError as error:
        raise places.error_of(error) from None
    except SettingsError as error:
        raise ConfigError(f"environment: {_one_line(error)}; lists and tables are written as JSON there") from None
    _check(config, places)

    def absolute(relative: Path) -> Path:
        return (path.parent / relative.expanduser()).absolute()

    changed: dict[str, object] = {"node": config.node.model_copy(update={"run_dir": absolute(config.node.run_dir)})}
    if (security := config.security) is not None:
        paths = {"key_file": absolute(security.key_file), "allow": absolute(security.allow)}
        changed["security"] = security.model_copy(update=paths)
    if (snapshots := config.snapshots) is not None:
        urls = {"url": snapshots.url, "seed": snapshots.seed}
        urls = {
            key: url if url is None or "://" in url or "::" in url else str(absolute(Path(url))) for key, url in urls.items()
        }
        changed["snapshots"] = snapshots.model_copy(update=urls)
    return config.model_copy(update=changed)


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise ConfigError(f"{path}: larger than {CONFIG_BYTES_MAX} bytes: this is not a node's configuration")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None


def _syntax_error(message: str, text: str) -> tuple[str, int]:
    """Split tomllib's "... (at line 3, column 5)" into what and where."""
    match = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", message)
    if match is None:
        return message, 1
    last_line = max(1, len(text.splitlines()))
    return message[: match.start()], int(match[1]) if match[1] else last_line


def _check_environment_names() -> None:
    """Refuse a variable that looks like a setting of ours and would have no effect."""
    for name in sorted(os.environ):
        upper = name.upper()
        for section in NodeConfig.model_fields:
            stem = f"{ENVIRONMENT_PREFIX}{section.upper()}_"
            if upper.startswith(stem) and not upper.startswith(stem + "_"):
                hint = f"{stem}_{upper.removeprefix(stem)}"
                raise ConfigError(
                    f"environment variable {name} has no effect: section and key are joined by two underscores, as in {hint}"
                )


# --- where a setting stands ---------------------------------------------------------------------------------------------

_BARE_OR_QUOTED = r"""(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')"""
_KEY = rf"{_BARE_OR_QUOTED}(?:\s*\.\s*{_BARE_OR_QUOTED})*"
_HEADER = re.compile(rf"\s*\[\[?\s*({_KEY})\s*\]\]?\s*(?:#.*)?$")
_ASSIGNMENT = re.compile(rf"\s*({_KEY})\s*=")


class Places:
    """Finds the line of a setting in a file that is valid TOML, and words the errors."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines: dict[KeyPath, int] = {}
        table: KeyPath = ()
        for number, line in enumerate(text.splitlines(), start=1):
            if header := _HEADER.match(line):
                table = _key_path(header[1])
                self._note(table, number)
            elif assignment := _ASSIGNMENT.match(line):
                self._note(table + _key_path(assignment[1]), number)

    def _note(self, path: KeyPath, number: int) -> None:
        for length in range(1, len(path) + 1):
            self._lines.setdefault(path[:length], number)

    def error(self, path: KeyPath, message: str) -> ConfigError:
        """A `ConfigError` about the setting at `path`; the nearest enclosing line stands for what is inside a line."""
        variable = _environment_variable(path)
        if variable is not None:
            return ConfigError(f"environment variable {variable}: {message}")
        line = next((self._lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._lines), None)
        place = str(self._path) if line is None else f"{self._path}:{line}"
        return ConfigError(f"{place}: {_dotted(path)}: {message}")

    def error_of(self, failure: ValidationError) -> ConfigError:
        """The first of pydantic's complaints, in our words."""
        errors = failure.errors(include_url=False)
        # An unknown key is most often the misspelling of the one that is then missing: it is told first.
        first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
        path = tuple(str(part) for part in first["loc"] if part != "[key]")
        if first["type"] in ("literal_error", "list_type") and path[-1] in ("literal['all']", "list[int]"):
            path = path[:-1]
        message = _describe(str(first["type"]), path, first.get("input"), str(first["msg"]), first.get("ctx", {}))
        more = f" ({len(errors) - 1} more to follow)" if len(errors) > 1 and first["type"] != "extra_forbidden" else ""
        return self.error(path, message + more)


def _key_path(text: str) -> KeyPath:
    """The parts of a dotted key, as tomllib understands them."""
    value: Any = tomllib.loads(f"{text} = 0")
    path: list[str] = []
    while isinstance(value, dict):
        ((key, value),) = value.items()
        path.append(key)
    return tuple(path)


def _dotted(path: KeyPath) -> str:
    return ".".join(part if re.fullmatch(r"[A-Za-z0-9_-]+", part) else f'"{part}"' for part in path)


def _environment_variable(path: KeyPath) -> str | None:
    """The variable that gave the value at `path`, if one did."""
    names = {name.upper(): name for name in os.environ}
    for length in range(len(path), 0, -1):
        variable = names.get(ENVIRONMENT_PREFIX + "__".join(path[:length]).upper())
        if variable is not None:
            return variable
    return None


def _describe(kind: str, path: KeyPath, value: object, message: str, context: Mapping[str, object]) -> str:
    match kind:
        case "extra_forbidden":
            near = difflib.get_close_matches(path[-1], _names_at(path[:-1]), n=1)
            known = f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(_names_at(path[:-1]))}"
            return f"unknown {'section' if len(path) == 1 else 'setting'}; {known}"
        case "missing":
            return (
                f"missing; add the section [{path[0]}]"
                if len(path) == 1
                else f"missing; add `{path[-1]} = ...` to [{_dotted(path[:-1])}]"
            )
        case "literal_error" | "list_type" | "int_type" if "hold" in path[2:3]:
            return f"expected 'all' or a list of partitions such as [0, 2], got {value!r}"
        case "literal_error":
            return f"expected {context.get('expected')}, got {value!r}"
        case "string_type":
            return f"expected text in quotes, got {value!r}"
        case "int_type" | "int_parsing" | "int_from_float" if path[-1].endswith("_bytes"):
            return f'expected a number of bytes or a size such as "100GB" or "64 GiB", got {value!r}'
        case "int_type" | "int_parsing" | "int_from_float":
            return f"expected a whole number, got {value!r}"
        case "float_type" | "float_parsing" if path[0] == "snapshots":
            return f'expected a time such as "90s", "10m" or "24h", got {value!r}'
        case "float_type" | "float_parsing":
            return f"expected a number, got {value!r}"
        case "bool_type" | "bool_parsing":
            return f"expected true or false, got {value!r}"
        case "path_type":
            return f"expected a path in quotes, got {value!r}"
        case "list_type":
            return f'expected a list such as ["tcp://127.0.0.1:7800"], got {value!r}'
        case "dict_type" | "model_type" | "model_attributes_type":
            return f"expected a table such as {{ key = value }}, got {value!r}"
        case _:
            return f"{message[:1].lower()}{message[1:]}, got {value!r}"


def _names_at(path: KeyPath) -> list[str]:
    """The settings that exist under `path`."""
    if len(path) == 4 and path[0] == "models" and path[2] == "tables":
        return list(TableSection.model_fields)
    sections: dict[str, type[Section]] = {
        "node": NodeSection,
        "models": ModelSection,
        "links": LinkSection,
        "security": SecuritySection,
        "snapshots": SnapshotsSection,
    }
    return list(sections[path[0]].model_fields) if path and path[0] in sections else list(NodeConfig.model_fields)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- what the values mean -----------------------------------------------------------------------------------------------


def _check(config: NodeConfig, places: Places) -> None:
    """Everything that the types cannot say."""
    _check_node(config.node, places)
    _check_addresses(config.node, places, encrypted=config.security is not None)
    for name, model in config.models.items():
        _check_model(name, model, places)
        _check_eviction(name, model, config.node.role, places)
    _check_links(config, places)
    if config.snapshots is not None:
        _check_snapshots(config.snapshots, places)


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
    if node.role not in ROLES_BUILT:
        raise places.error(("node", "role"), f"role {node.role!r} {NOT_BUILT}: use 'train' or 'serve'")
    if not node.hot_half_life_s >= 1:
        raise places.error(("node", "hot_half_life_s"), f"{node.hot_half_life_s:g} seconds: expected 1 or more")


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
        if not model.hold:
            refuse("hold", "expected 'all' or a list of partitions, got []: a node without any needs no entry for the model")
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
    if model.when_full == "evict" and role == "train":
        raise places.error(
            ("models", name, "when_full"),
            "a training node holds what nobody else may hold yet, so it refuses and never evicts: leave this out",
        )


def _check_links(config: NodeConfig, places: Places) -> None:
    for pair, link in config.links.items():
        regions = pair.split("/")
        if len(regions) != 2 or not all(regions):
            raise places.error(("links", pair), 'expected a pair of regions such as "eu/us"')
        if regions[0] != regions[1] and "/".join(reversed(regions)) in config.links:
            raise places.error(("links", pair), "this pair is there twice, once in each order: links are symmetric, keep one")
        if link.rate_mbps is not None:
            raise places.error(("links", pair, "rate_mbps"), f"limiting a link's rate {NOT_BUILT}: remove it")
        if not 0 <= link.delay_ms <= DELAY_MS_MAX:
            raise places.error(
                ("links", pair, "delay_ms"), f"expected 0 to {DELAY_MS_MAX:.0f} milliseconds, got {link.delay_ms}"
            )
