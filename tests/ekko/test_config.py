"""Each mistake in a configuration is one line with file, line, setting and remedy; what is right is understood."""

from pathlib import Path

import pytest

from ekko.config import load_config
from ekko.errors import ConfigError
from ekko.model import DENSE_SPEC, TableSpec

GOOD = """\
[node]
id = "eu-1"
region = "eu"
role = "serve"
run_dir = "state"
peers = "tcp://127.0.0.1:7801"
local = "tcp://127.0.0.1:7701"
http = "127.0.0.1:7901"
seeds = ["tcp://127.0.0.1:7800"]

[models.ctr]
shards = 32
tables = { item = 16, user = 8 }
capacity_rows = 1_000

[links]
"eu/us" = { delay_ms = 40 }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_the_contract_is_understood(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))
    assert (config.node.id, config.node.region, config.node.role) == ("eu-1", "eu", "serve")
    assert config.node.run_dir == tmp_path / "state"
    assert config.http_address == ("127.0.0.1", 7901)
    assert {t.name: t.dim for t in config.models["ctr"].spec("ctr").tables.values()} == {"item": 16, "user": 8}
    assert config.delay_s("us", "eu") == config.delay_s("eu", "us") == 0.04
    assert config.delay_s("eu", "ap") == 0.0


@pytest.mark.parametrize(
    ("old", "new", "place", "complaint"),
    [
        ('id = "eu-1"', "id = eu-1", ":2: ", "not valid TOML"),
        ("[models.ctr]", "[models.ctr", ":11: ", "not valid TOML"),
        ('"eu/us" = { delay_ms = 40 }', '"eu/us" = { delay_ms = 40', ":17: ", "not valid TOML"),
        ('id = "eu-1"', "id = 5", ":2: node.id: ", "expected text in quotes, got 5"),
        ('id = "eu-1"', 'id = "eu 1"', ":2: node.id: ", "is not usable"),
        ('id = "eu-1"\n', "", ":1: node.id: ", "missing; add `id = ...` to [node]"),
        ('role = "serve"', 'rolle = "serve"', ":4: node.rolle: ", "unknown setting; did you mean 'role'?"),
        ("[links]", "[link]", ":16: link: ", "unknown section; did you mean 'links'?"),
        (
            'role = "serve"',
            'role = "server"',
            ":4: node.role: ",
            "expected 'train', 'serve', 'baseline' or 'witness', got 'server'",
        ),
        ('role = "serve"', 'role = "serve"\nshm_mode = "0666"', ":5: node.shm_mode: ", "expected '0600', '0640' or '0644'"),
        ('role = "serve"', 'role = "serve"\nshm_mode = 416', ":5: node.shm_mode: ", "got 416"),
        ('role = "serve"', 'role = "serve"\nshm_group = "no-such"', ":5: node.shm_group: ", "there is no group 'no-such'"),
        ('role = "serve"', 'role = "serve"\nshm_group = 0', ":5: node.shm_group: ", "expected text in quotes, got 0"),
        ('role = "serve"', 'role = "serve"\nhot_half_life_s = 0.5', ":5: node.hot_half_life_s: ", "expected 1 or more"),
        ('role = "serve"', 'role = "serve"\nhot_half_life_s = nan', ":5: node.hot_half_life_s: ", "expected"),
        ('role = "serve"', 'role = "serve"\nhot_half_life_s = "10m"', ":5: node.hot_half_life_s: ", "expected a number"),
        ('role = "serve"', 'role = "serve"\ndelay = "5m"', ":5: node.delay: ", "keeps no older state"),
        ('role = "serve"', 'role = "train"\nlog_bytes = "1GB"', ":5: node.log_bytes: ", "keeps no older state"),
        ('role = "serve"', 'role = "baseline"\ndelay = "0.5s"', ":5: node.delay: ", "from 1 s to 7 days, got 0.5 s"),
        ('role = "serve"', 'role = "witness"\ndelay = "8d"', ":5: node.delay: ", "from 0 s to 7 days"),
        (
            'role = "serve"',
            'role = "witness"\nlog_bytes = "1MB"',
            ":5: node.log_bytes: ",
            "at least 64000000 bytes",
        ),
        ("tcp://127.0.0.1:7801", "127.0.0.1:7801", ":6: node.peers: ", "expected tcp://HOST:PORT, got"),
        ("tcp://127.0.0.1:7801", "tcp://127.0.0.1", ":6: node.peers: ", "with a port from 1 to 65535"),
        ("tcp://127.0.0.1:7801", "tcp://127.0.0.1:70000", ":6: node.peers: ", "with a port from 1 to 65535"),
        ("tcp://127.0.0.1:7801", "ipc:///tmp/x", ":6: node.peers: ", "expected tcp://HOST:PORT, got"),
        ("tcp://127.0.0.1:7801", "tcp://0.0.0.0:7801", ":6: node.peers: ", "is not loopback"),
        ("tcp://127.0.0.1:7801", "tcp://eu.example:7801", ":6: node.peers: ", "is not loopback"),
        ("tcp://127.0.0.1:7701", "ipc://relative", ":7: node.local: ", "absolute path"),
        ("tcp://127.0.0.1:7701", "tcp://127.0.0.1:7801", ":7: node.local: ", "same address as node.peers"),
        ("127.0.0.1:7901", "127.0.0.1", ":8: node.http: ", "expected HOST:PORT"),
        ("127.0.0.1:7901", "10.0.0.1:7901", ":8: node.http: ", "is not loopback"),
        ('seeds = ["tcp://127.0.0.1:7800"]', 'seeds = "tcp://127.0.0.1:7800"', ":9: node.seeds: ", "expected a list"),
        ('seeds = ["tcp://127.0.0.1:7800"]', 'seeds = ["tcp://10.0.0.1:7800"]', ":9: node.seeds: ", "is not loopback"),
        ("shards = 32", "shards = 0", ":12: models.ctr.shards: ", "expected a whole number from 1"),
        ("shards = 32", "shards = 1.5", ":12: models.ctr.shards: ", "expected a whole number, got 1.5"),
        ("shards = 32", "shards = true", ":12: models.ctr.shards: ", "expected a whole number, got True"),
        ("item = 16", "item = 0", ":13: models.ctr.tables.item: ", "has dim 0"),
        ("item = 16", "_dense = 16", ":13: models.ctr.tables._dense: ", "reserved"),
        ("item = 16", '"it em" = 16', ':13: models.ctr.tables."it em": ', "is not usable"),
        ("item = 16", 'item = "wide"', ":13: models.ctr.tables.item.dim: ", "expected a whole number"),
        ("item = 16", 'item = { dim = 16, ttl = "30 days" }', ":13: models.ctr.tables.item: ", "expected a time such as"),
        ("item = 16", 'item = { dim = 16, ttl = "101w1d" }', ":13: models.ctr.tables.item: ", "expected a time such as"),
        ("item = 16", 'item = { dim = 16, tll = "30d" }', ":13: models.ctr.tables.item.tll: ", "did you mean 'ttl'?"),
        ("capacity_rows = 1_000", "capacity_rows = 0", ":14: models.ctr.capacity_rows: ", "from 1 to"),
        ("capacity_rows = 1_000", 'capacity_bytes = "100 gigs"', ":14: models.ctr.capacity_bytes: ", 'a size such as "100GB"'),
        ("capacity_rows = 1_000", "capacity_bytes = 1.5", ":14: models.ctr.capacity_bytes: ", 'a size such as "100GB"'),
        ("capacity_rows = 1_000", "capacity_bytes = -1", ":14: models.ctr.capacity_bytes: ", "expected at least 1048576"),
        ("capacity_rows = 1_000", 'capacity_bytes = "100B"', ":14: models.ctr.capacity_bytes: ", "got 100: leave it out"),
        (
            "capacity_rows = 1_000",
            'when_full = "evict"',
            ":14: models.ctr.when_full: ",
            "there is no limit to reach: set capacity_bytes, too",
        ),
        (
            "capacity_rows = 1_000",
            'capacity_bytes = "1GB"\nevict = "least_frequently_read"',
            ":15: models.ctr.evict: ",
            'nothing is evicted: set when_full = "evict", too',
        ),
        (
            "capacity_rows = 1_000",
            'capacity_bytes = "1GB"\nwhen_full = "drop"',
            ":15: models.ctr.when_full: ",
            "expected 'refuse' or 'evict'",
        ),
        (
            "capacity_rows = 1_000",
            'codec = "int9"',
            ":14: models.ctr.codec: ",
            "expected 'float32', 'float16', 'bfloat16' or 'int8'",
        ),
        ("capacity_rows = 1_000", "partitions = 0", ":14: models.ctr.partitions: ", "expected a whole number from 1 to 64"),
        ("capacity_rows = 1_000", "partitions = 33", ":14: models.ctr.partitions: ", "no more than its 32 shards, got 33"),
        ("capacity_rows = 1_000", "partitions = 65", ":14: models.ctr.partitions: ", "from 1 to 64"),
        ("capacity_rows = 1_000", "hold = [1]", ":14: models.ctr.hold: ", "expected 'all' or partitions from 0 to 0, got [1]"),
        ("capacity_rows = 1_000", "partitions = 4\nhold = [4]", ":15: models.ctr.hold: ", "from 0 to 3, got [4]"),
        ("capacity_rows = 1_000", "partitions = 4\nhold = [-1]", ":15: models.ctr.hold: ", "from 0 to 3, got [-1]"),
        ("capacity_rows = 1_000", "partitions = 4\nhold = [1, 1]", ":15: models.ctr.hold: ", "a partition is there twice"),
        ("capacity_rows = 1_000", "hold = []", ":14: models.ctr.hold: ", "only a model of several is held by some"),
        ("capacity_rows = 1_000", 'hold = "some"', ":14: models.ctr.hold: ", "expected 'all' or a list of partitions"),
        ("capacity_rows = 1_000", "hold = 3", ":14: models.ctr.hold: ", "expected 'all' or a list of partitions"),
        ("capacity_rows = 1_000", 'hold = ["a"]', ":14: models.ctr.hold: ", "such as [0, 2], got ['a']"),
        (
            "capacity_rows = 1_000",
            "priority = { k = 100 }",
            ":14: models.ctr.priority.k: ",
            "expected 1 to 99.999 percent, got 100",
        ),
        (
            "capacity_rows = 1_000",
            "priority = { kk = 9 }",
            ":14: models.ctr.priority.kk: ",
            "unknown setting; did you mean 'k'?",
        ),
        ("capacity_rows = 1_000", 'priority = { window = "0s" }', ":14: models.ctr.priority.window: ", "from 1 s to 30 days"),
        (
            "capacity_rows = 1_000",
            "priority = { fresh_weight = -1 }",
            ":14: models.ctr.priority.fresh_weight: ",
            "expected 0 to",
        ),
        ("[models.ctr]", '[models."c t r"]', ':11: models."c t r": ', "is not usable"),
        ("delay_ms = 40", "rate_mbps = 0", ':17: links."eu/us".rate_mbps: ', "leave it out for no limit"),
        ("delay_ms = 40", "rate_mbps = 1e9", ':17: links."eu/us".rate_mbps: ', "expected 0.01 to"),
        ("delay_ms = 40", 'rate_mbps = "fast"', ':17: links."eu/us".rate_mbps: ', "expected a number, got 'fast'"),
        ('"eu/us" = { delay_ms = 40 }', '"eu/eu" = { rate_mbps = 4 }', ':17: links."eu/eu".rate_mbps: ', "name two"),
        ("delay_ms = 40", "delay_ms = -1", ':17: links."eu/us".delay_ms: ', "expected 0 to 60000"),
        ("delay_ms = 40", "delai_ms = 40", ':17: links."eu/us".delai_ms: ', "did you mean 'delay_ms'?"),
        ('"eu/us"', '"eu-us"', ":17: links.eu-us: ", "expected a pair of regions"),
        ("[links]", '[links]\n"us/eu" = {}', ':17: links."us/eu": ', "there twice"),
        (
            "[links]",
            '[security]\nkey_file = "node.key"\n[links]',
            ":16: security.allow: ",
            "missing; add `allow = ...`",
        ),
        ("tcp://127.0.0.1:7801", "tcp://::1:7801", ":6: node.peers: ", "an IPv6 address in brackets"),
        ("tcp://127.0.0.1:7701", "tcp://10.0.0.1:7701", ":7: node.local: ", "publishers run on the node's own machine"),
        ('http = "127.0.0.1:7901"', 'http = "0.0.0.0:7901"\nhttp_public = 1', ":9: node.http_public: ", "true or false"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(tmp_path: Path, old: str, new: str, place: str, complaint: str) -> None:
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert message.startswith(f"{path}{place}")
    assert complaint in message
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read: No such file"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "node.toml"
    path.write_bytes(b'[node]\nid = "\xff"')
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(path)


def test_the_environment_overrides_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKKO_NODE__HTTP", "127.0.0.1:7999")
    monkeypatch.setenv("EKKO_MODELS__CTR__SHARDS", "8")
    monkeypatch.setenv("EKKO_NODE__SEEDS", '["tcp://127.0.0.1:1"]')
    config = load_config(write(tmp_path, GOOD))
    assert config.http_address == ("127.0.0.1", 7999)
    assert config.models["ctr"].shards == 8
    assert {name: table.dim for name, table in config.models["ctr"].tables.items()} == {"item": 16, "user": 8}
    assert config.node.seeds == ["tcp://127.0.0.1:1"]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('window = "0.5s"', "from 1 s to an hour"),
        ('lateness = "2h"', "up to an hour"),
        ('window = "1s"\nlateness = "20m"', "make windows longer"),
        ('horizon = "1s"', "from one window to a month"),
        ("level = 0.0", "expected a number from 1e-12 to 0.5"),
        ("baseline_share = 0.9", "expected a number from 0 to 0.5"),
        ("precision = 0.0", "expected a number from"),
        ("detectors = []", "leave [health] out to judge nothing"),
        ('detectors = ["drift", "drift"]', "one is there twice"),
        ('metric = "own"', "own_metric does not say which"),
        ('metric = "f1"', "expected 'auc'"),
        ("watermarks = { aug = { min = 0.5 } }", "there is no figure 'aug': there are auc"),
        ("watermarks = { auc = { least = 0.5 } }", "unknown setting"),
        ("auto_rollback = true", "only a witness rolls back"),
        ('auto_rollback_every = "900d"', "up to a month"),
        ("probe_share = 0", "expected a number from 0.001 to 1"),
    ],
)
def test_what_health_cannot_be_is_refused(tmp_path: Path, line: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"{GOOD}[health]\n{line}\n"))
    assert complaint in str(caught.value)
    assert "health." in str(caught.value)


def test_health_is_understood(tmp_path: Path) -> None:
    text = f'{GOOD}[health]\nwindow = "5s"\nmetric = "log_loss"\nwatermarks = {{ auc = {{ min = 0.6 }} }}\n'
    health = load_config(write(tmp_path, text)).health
    assert health is not None
    assert (health.window_ms, health.lateness_ms, health.metric) == (5_000, 30_000, "log_loss")
    assert (health.watermarks["auc"].min, health.watermarks["auc"].max) == (0.6, None)
    assert load_config(write(tmp_path, GOOD)).health is None


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("EKKO_NODE__HTTP", "nowhere", "environment variable EKKO_NODE__HTTP: expected HOST:PORT"),
        ("EKKO_NODE__ROLLE", "serve", "environment variable EKKO_NODE__ROLLE: unknown setting; did you mean 'role'"),
        ("EKKO_NODE_HTTP", "127.0.0.1:1", "environment variable EKKO_NODE_HTTP has no effect: .* EKKO_NODE__HTTP"),
        ("EKKO_NODE__SEEDS", "[", "environment: .*written as JSON"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, complaint: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=complaint):
        load_config(write(tmp_path, GOOD))


SECURE = GOOD.replace("[links]", '[security]\nkey_file = "keys/node.key"\nallow = "/etc/ekko/allowed"\n[links]')


def test_beyond_loopback_takes_keys(tmp_path: Path) -> None:
    text = SECURE.replace('"tcp://127.0.0.1:7801"', '"tcp://[::]:7801"\nadvertise = "tcp://eu-1.example:7801"')
    config = load_config(write(tmp_path, text.replace("tcp://127.0.0.1:7800", "tcp://10.0.0.1:7800")))
    assert config.security is not None
    assert config.security.key_file == tmp_path / "keys/node.key"
    assert config.security.allow == Path("/etc/ekko/allowed")
    assert config.node.advertise == "tcp://eu-1.example:7801"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "*"])
def test_what_nobody_can_dial_is_not_advertised(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"node\.peers: nobody can dial host .*set advertise"):
        load_config(write(tmp_path, SECURE.replace("tcp://127.0.0.1:7801", f"tcp://{host}:7801")))


def test_http_beyond_loopback_is_asked_for(tmp_path: Path) -> None:
    public = GOOD.replace('http = "127.0.0.1:7901"', 'http = "0.0.0.0:7901"\nhttp_public = true')
    assert load_config(write(tmp_path, public)).http_address == ("0.0.0.0", 7901)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2_000_000", 2_000_000),
        ('"100GB"', 100_000_000_000),
        ('"64 GiB"', 64 << 30),
        ('"1.5MiB"', 3 << 19),
        ('"5000000"', 5_000_000),
        ('"2000kB"', 2_000_000),
    ],
)
def test_a_capacity_in_bytes_has_a_unit_or_none(tmp_path: Path, text: str, size: int) -> None:
    config = load_config(write(tmp_path, GOOD.replace("capacity_rows = 1_000", f"capacity_bytes = {text}")))
    assert config.models["ctr"].capacity_bytes == size


def test_a_training_node_never_evicts(tmp_path: Path) -> None:
    text = GOOD.replace("capacity_rows = 1_000", 'capacity_bytes = "1GB"\nwhen_full = "evict"\nevict = "least_frequently_read"')
    model = load_config(write(tmp_path, text)).models["ctr"]
    assert (model.when_full, model.evict) == ("evict", "least_frequently_read")
    with pytest.raises(ConfigError, match="holds what nobody else may hold yet"):
        load_config(write(tmp_path, text.replace('role = "serve"', 'role = "train"')))


def test_formulas_are_looked_for_where_they_are_used(tmp_path: Path) -> None:
    """On training nodes, in the folder of the file; others weigh nothing."""
    text = GOOD.replace("capacity_rows = 1_000", 'priority = { k = 90, formula = "weigh.wasm" }')
    config = load_config(write(tmp_path, text))
    settings = config.models["ctr"].priority.settings
    assert (settings.k, settings.window_s, settings.formula) == (90, 60, str(tmp_path / "weigh.wasm"))
    with pytest.raises(ConfigError, match=r":14: models\.ctr\.priority\.formula: .*' cannot be used: .*No such file"):
        load_config(write(tmp_path, text.replace('role = "serve"', 'role = "train"')))
    with pytest.raises(ConfigError, match="no priority formula 'signifcance': there are 'loss_impact', 'significance'"):
        load_config(write(tmp_path, text.replace('role = "serve"', 'role = "train"').replace("weigh.wasm", "signifcance")))


DEVICE = '[device]\nname = "host-twin"\nrows = 100\npolicy = "lfu"\n'


def test_what_is_cached_on_a_device_is_what_the_model_says_or_else_the_node(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, GOOD)).device_settings is None
    settings = load_config(write(tmp_path, GOOD + DEVICE)).device_settings
    assert settings is not None
    item, dense, mortal = TableSpec("item", 16, "float16"), DENSE_SPEC, TableSpec("mortal", 16, ttl_s=60)
    assert (settings.name, settings.of("any").policy) == ("host-twin", "lfu")
    assert [settings.of("any").rows_of(table) for table in (item, dense, mortal)] == [100, 0, 0]
    for device, rows, policy in (
        ('{ rows = 7, policy = "lru" }', 7, "lru"),
        ('{ bytes = "2MB" }', 2_000_000 // (1 + 32 + 32), "lfu"),
        ("{ rows = 0 }", 0, "lfu"),
    ):
        text = GOOD.replace("capacity_rows = 1_000", f"device = {device}") + DEVICE
        settings = load_config(write(tmp_path, text)).device_settings
        assert settings is not None
        assert (settings.of("ctr").rows_of(item), settings.of("ctr").policy) == (rows, policy)
        assert settings.of("other").rows_of(item) == 100


@pytest.mark.parametrize(
    ("model", "device", "complaint"),
    [
        ("", DEVICE.replace("host-twin", "gpu"), r':19: device\.name: expected "cuda:0".*, got \'gpu\''),
        ("", DEVICE.replace("rows = 100", "rows = -1"), r":20: device\.rows: expected 0 to \d+ rows of each table, got -1"),
        ("", DEVICE.replace("lfu", "fifo"), r":21: device\.policy: "),
        ("", DEVICE.replace("rows", "row"), r":20: device\.row: unknown setting; did you mean 'rows'\?"),
        ("", "[device]\nrows = 5\n", r"device\.name: missing"),
        ("device = { rows = 5 }", "", r":14: models\.ctr\.device: the node has no device: add \[device\]"),
        ('device = { rows = 5, bytes = "1GB" }', DEVICE, r":14: models\.ctr\.device\.bytes: rows and bytes both say"),
        ("device = { bytes = 5 }", DEVICE, r":14: models\.ctr\.device\.bytes: expected at least 1048576 bytes"),
        ("device = { row = 5 }", DEVICE, r":14: models\.ctr\.device\.row: unknown setting; did you mean 'rows'\?"),
    ],
)
def test_mistakes_about_a_device(tmp_path: Path, model: str, device: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(write(tmp_path, GOOD.replace("capacity_rows = 1_000", model or "capacity_rows = 1_000") + device))
