"""Every setting there is, its type and its default: one class for each section of the file."""

import grp
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ekko.addresses import split_host_port
from ekko.config.values import ByteSize, Number, Seconds, WholeNumber, truth
from ekko.delayed.limits import LOG_BYTES_DEFAULT
from ekko.device.settings import POLICY_DEFAULT, ROWS_DEFAULT, CacheSettings, DeviceSettings
from ekko.model import CODEC_DEFAULT, SHARDS_DEFAULT, ModelSpec, TableSpec, ttl_seconds
from ekko.priority.settings import DEFAULTS, PrioritySettings
from ekko.rates import pair_of
from ekko.sinks.target import PREFIX_DEFAULT
from ekko.store.access import MODES, Access

ENVIRONMENT_PREFIX = "EKKO_"
# Roles that keep an older state, and how old it is: a few minutes of samples, as in the paper; for a witness, how far back one
# can go by hand though the model was judged healthy since. A rollback reads what the log has between the two.
SERVER_PARTITIONS_DEFAULT = 8
DELAYS_S = {"baseline": 300.0, "witness": 60.0}


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
    http_public: Annotated[bool, BeforeValidator(truth)] = False
    compression: Literal["auto", "always", "never"] = "auto"
    expel_after_s: Number = 86_400.0
    hot_half_life_s: Number = 600.0
    shm_mode: Literal["0600", "0640", "0644"] = "0640"
    shm_group: str | None = None
    delay: Seconds | None = None
    log_bytes: ByteSize | None = None

    @property
    def keeps_older_state(self) -> bool:
        """Whether it has one beside its own (`ekko.delayed`)."""
        return self.role in DELAYS_S

    @property
    def delay_s(self) -> float:
        """How far, at least, the older state of a baseline or witness is behind."""
        return DELAYS_S.get(self.role, 0.0) if self.delay is None else self.delay

    @property
    def log_bytes_max(self) -> int:
        """What the log of a baseline or witness may take."""
        return LOG_BYTES_DEFAULT if self.log_bytes is None else self.log_bytes

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


class PrioritySection(Section):
    """`[models.NAME.priority]`: how urgent its rows are; see docs/reference/priorities.md."""

    k: Number = DEFAULTS.k
    window: Seconds = DEFAULTS.window_s
    formula: str = DEFAULTS.formula
    fresh_weight: Number = DEFAULTS.fresh_weight
    fresh_half_life: Seconds = DEFAULTS.fresh_half_life_s

    @property
    def settings(self) -> PrioritySettings:
        """As `ekko.priority` takes them."""
        return PrioritySettings(self.k, self.window, self.formula, self.fresh_weight, self.fresh_half_life)


class CacheSection(Section):
    """`[models.NAME.device]`: the caches of its tables on the node's device; see docs/reference/gpu-caches.md."""

    rows: WholeNumber | None = None
    bytes: ByteSize | None = None
    policy: Literal["lru", "lfu", "priority"] | None = None


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
    priority: PrioritySection = PrioritySection()
    device: CacheSection | None = None

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


class DeviceSection(Section):
    """`[device]`: rows in the memory of a GPU, or of its twin on the host; what is said of rows is said of each table."""

    name: str
    rows: WholeNumber = ROWS_DEFAULT
    policy: Literal["lru", "lfu", "priority"] = POLICY_DEFAULT


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


class BoundSection(Section):
    """`[health.watermarks]`, one figure: what it may not go below, or above."""

    min: Number | None = None
    max: Number | None = None


class HealthSection(Section):
    """`[health]`: whether and how this node judges models by the quality of their answers."""

    metric: Literal["auc", "log_loss", "ctr", "own"] = "auc"
    own_metric: str | None = None
    window: Seconds = 10.0
    lateness: Seconds = 30.0
    detectors: list[str] = ["sequential", "watermarks"]
    level: Number = 0.001
    horizon: Seconds = 86_400.0
    tolerance: Number = 0.005
    precision: Number = 0.02
    baseline_share: Number = 0.005
    auto_rollback: Annotated[bool, BeforeValidator(truth)] = False
    auto_rollback_every: Seconds = 60.0
    probe_share: Number = 0.01
    drift_method: Literal["adwin", "page_hinkley", "kswin"] = "adwin"
    events_min: WholeNumber = 100
    watermarks: dict[str, BoundSection] = {}

    @property
    def window_ms(self) -> int:
        """Milliseconds of a window."""
        return round(self.window * 1000)

    @property
    def auto_rollback_every_ms(self) -> int:
        """How soon after a rollback a verdict may begin the next one."""
        return round(self.auto_rollback_every * 1000)

    @property
    def lateness_ms(self) -> int:
        """How long after the answer a label may come."""
        return round(self.lateness * 1000)


class ServerTableSection(Section):
    """`[server.models.NAME.tables.TABLE]`: rows, how they are trained, and what those begin with that nobody trained yet."""

    dim: WholeNumber
    optimizer: dict[str, Any]  # `ekko.train.optimizers.optimizer_of` says what is right
    initializer: dict[str, Any] = {"name": "zeros"}
    admission: WholeNumber = 1
    ttl: Any = ""  # `ttl_seconds` says what is right

    def spec(self, name: str, codec: str = CODEC_DEFAULT) -> TableSpec:
        """The table of the served model.

        Raises:
            ModelError: a name or a size is out of its limits.
        """
        return TableSpec(name, self.dim, codec, ttl_seconds(name, self.ttl))


class ServerModelSection(Section):
    """`[server.models.NAME]`: a model that workers train through servers."""

    mode: Literal["async", "bounded", "sync"] = "async"
    workers: WholeNumber = 0
    staleness: WholeNumber = 0
    partitions: WholeNumber = SERVER_PARTITIONS_DEFAULT
    hold: Literal["all"] | list[int] = "all"
    worker_timeout: Seconds = 0.0
    tables: dict[str, ServerTableSection]

    @property
    def held(self) -> tuple[int, ...]:
        """The partitions that this node is to hold."""
        return tuple(range(self.partitions)) if self.hold == "all" else tuple(self.hold)


class ServerSection(Section):
    """`[server]`: where workers connect, and the other servers."""

    listen: str
    advertise: str | None = None
    peers: dict[str, str] = {}  # node id -> where its server listens
    ack: Literal["spares", "local"] = "spares"
    models: dict[str, ServerModelSection]

    @property
    def endpoint(self) -> str:
        """What workers and other servers dial."""
        return self.advertise or self.listen


class SinkSection(Section):
    """`[sinks.NAME]`: a foreign store that a process beside the node keeps as one of its models is."""

    model: str
    target: str  # `ekko.sinks.target` says what is right
    tables: list[str] | None = None
    feed_name: str | None = None
    prefix: str = PREFIX_DEFAULT


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
    health: HealthSection | None = None
    device: DeviceSection | None = None
    server: ServerSection | None = None
    sinks: dict[str, SinkSection] = {}

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

    @property
    def device_settings(self) -> DeviceSettings | None:
        """As `ekko.device` takes them; None: the node has no device."""
        if (device := self.device) is None:
            return None
        models = {}
        for name, model in self.models.items():
            if (own := model.device) is not None:
                rows = device.rows if own.rows is None else own.rows
                models[name] = CacheSettings(rows, own.bytes, own.policy or device.policy)
        return DeviceSettings(device.name, CacheSettings(device.rows, None, device.policy), models)

    def delay_s(self, region: str, other: str) -> float:
        """The one-way delay to emulate between two regions, in seconds."""
        link = self.links.get(f"{region}/{other}") or self.links.get(f"{other}/{region}")
        return link.delay_ms / 1000 if link else 0.0

    def rates(self) -> dict[str, float]:
        """Mbit/s that updates may use, by pair of regions in the order of their names; only where there is a limit."""
        limited = ((pair_of(*pair.split("/")), link.rate_mbps) for pair, link in self.links.items())
        return {pair: rate for pair, rate in limited if rate is not None}


def names_at(path: tuple[str, ...]) -> list[str]:
    """The settings that exist under `path`."""
    if len(path) == 4 and path[0] == "models" and path[2] == "tables":
        return list(TableSection.model_fields)
    if path[:2] == ("server", "models") and len(path) in (3, 5):
        return list((ServerModelSection if len(path) == 3 else ServerTableSection).model_fields)
    if len(path) == 3 and path[:2] == ("health", "watermarks"):
        return list(BoundSection.model_fields)
    if len(path) == 3 and path[0] == "models" and path[2] in ("priority", "device"):
        return list((PrioritySection if path[2] == "priority" else CacheSection).model_fields)
    sections: dict[str, type[Section]] = {
        "node": NodeSection,
        "models": ModelSection,
        "links": LinkSection,
        "security": SecuritySection,
        "snapshots": SnapshotsSection,
        "health": HealthSection,
        "device": DeviceSection,
        "server": ServerSection,
        "sinks": SinkSection,
    }
    return list(sections[path[0]].model_fields) if path and path[0] in sections else list(NodeConfig.model_fields)
