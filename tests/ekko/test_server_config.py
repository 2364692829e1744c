"""`[server]`: each mistake is one line with its place and its remedy; what is right is understood, and compared by servers."""

from pathlib import Path

import pytest

from ekko.config import load_config
from ekko.config.sections import NodeConfig
from ekko.errors import ConfigError
from ekko.train.server.schema import digest_of, own_keys, partitions_of, trained_model, training_spec
from ekko.train.server.wire import WORKERS_MAX

GOOD = """\
[node]
id = "train-1"
region = "eu"
role = "train"
run_dir = "state"
peers = "tcp://127.0.0.1:7801"
local = "tcp://127.0.0.1:7701"
http = "127.0.0.1:7901"

[models.ctr]
shards = 32
tables = { item = 16 }

[server]
listen = "tcp://127.0.0.1:7950"
peers = { train-2 = "tcp://127.0.0.1:7951" }

[server.models.ctr]
mode = "sync"
workers = 2
partitions = 8
worker_timeout = "60s"

[server.models.ctr.tables.item]
dim = 16
optimizer = { name = "adam", lr = 0.001 }
initializer = { name = "normal", std = 0.01, seed = 7 }
"""


def load(folder: Path, text: str) -> NodeConfig:
    path = folder / "node.toml"
    path.write_text(text)
    return load_config(path)


def test_what_servers_keep_follows_from_it(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.server is not None
    section = config.server.models["ctr"]
    assert section.held == tuple(range(8))
    model = trained_model("ctr", section, 32)
    assert (model.training, model.settings.workers, model.worker_timeout_ms) == ("ctr.training", 2, 60_000)
    spec = training_spec("ctr", section, 32)
    dims = {table.name: table.dim for table in spec.tables.values()}
    assert dims == {"_marks": 8, "item": 16, "item.state": 32, "item.steps": 4}
    assert (spec.name, spec.shards, spec.partitions) == ("ctr.training", 32, 8)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr = 0.001", "lr = 0.002"),
        ("std = 0.01", "std = 0.02"),
        ("seed = 7", "seed = 8"),
        ("workers = 2", "workers = 3"),
        ('worker_timeout = "60s"', 'worker_timeout = "61s"'),
        ("dim = 16\n", "dim = 16\nadmission = 2\n"),
        ("partitions = 8", "partitions = 4"),
        ('mode = "sync"', 'mode = "bounded"'),
    ],
)
def test_servers_tell_settings_apart(tmp_path: Path, old: str, new: str) -> None:
    def digest(text: str) -> int:
        config = load(tmp_path, text)
        assert config.server is not None
        return trained_model("ctr", config.server.models["ctr"], 32).settings.digest

    assert old in GOOD
    assert digest(GOOD) == digest(GOOD.replace("peers = { train-2", 'ack = "local"\npeers = { train-2'))
    assert digest(GOOD) != digest(GOOD.replace(old, new))


def test_servers_that_know_of_other_servers_give_each_other_nothing(tmp_path: Path) -> None:
    """A node that is no peer any more, and was not expelled, may act still: who does not know of it would be a second one."""
    config = load(tmp_path, GOOD)
    assert config.server is not None
    settings = trained_model("ctr", config.server.models["ctr"], 32).settings
    digests = {digest_of(settings, servers) for servers in (("a", "b", "c"), ("a", "c"), ("a", "b"), ("a",))}
    assert len(digests) == 4
    assert digest_of(settings, ("b", "a")) == digest_of(settings, ("a", "b"))


def test_each_partition_has_keys_of_its_own() -> None:
    keys = own_keys(32, 8)
    assert keys.shape == (8, WORKERS_MAX)
    for partition in range(8):
        assert (partitions_of(keys[partition], 32, 8) == partition).all()
        assert len(set(keys[partition].tolist())) == WORKERS_MAX


@pytest.mark.parametrize(
    ("old", "new", "place", "complaint"),
    [
        ('role = "train"', 'role = "serve"', ":14: server: ", "a server runs beside a training node"),
        ('listen = "tcp://127.0.0.1:7950"', 'listen = "127.0.0.1:7950"', ":15: server.listen: ", "expected tcp://HOST:PORT"),
        ("127.0.0.1:7950", "10.0.0.1:7950", ":15: server.listen: ", "add [security] with key_file"),
        ("127.0.0.1:7950", "127.0.0.1:7801", ":15: server.listen: ", "same address as node.peers"),
        ("127.0.0.1:7950", "127.0.0.1:7901", ":15: server.listen: ", "same address as node.http"),
        ("127.0.0.1:7951", "127.0.0.1:7950", ":16: server.peers.train-", "each server has one of its own"),
        ("train-2 =", "train-1 =", ":16: server.peers.train-1: ", "correct it, or leave it out"),
        ('mode = "sync"', 'mode = "lazy"', ":19: server.models.ctr.mode: ", "expected 'async', 'bounded' or 'sync'"),
        ("workers = 2", "workers = 0", ":20: server.models.ctr.workers: ", "expected how many there are in mode 'sync'"),
        ('mode = "sync"', 'mode = "async"', ":20: server.models.ctr.workers: ", "leave this out"),
        ("workers = 2", "workers = 2\nstaleness = 3", ":21: server.models.ctr.staleness: ", "only mode 'bounded' has one"),
        ("partitions = 8", "partitions = 1", ":21: server.models.ctr.partitions: ", "from 2 to 64"),
        ("partitions = 8", "partitions = 33", ":21: server.models.ctr.partitions: ", "no more than the model's 32 shards"),
        ("partitions = 8", "partitions = 8\nhold = []", ":22: server.models.ctr.hold: ", "partitions from 0 to 7"),
        ('"60s"', '"0.1s"', ":22: server.models.ctr.worker_timeout: ", "or 0 to wait for ever"),
        ("dim = 16\n", "dim = 8\n", ":24: server.models.ctr.tables.item: ", "dim and ttl are not those of models.ctr"),
        ("dim = 16\n", 'dim = 16\nttl = "30d"\n', ":24: server.models.ctr.tables.item: ", "dim and ttl are not those"),
        ("dim = 16\n", "dim = 16\nadmission = 0\n", ":26: server.models.ctr.tables.item.admission: ", "from 1 to 255"),
        ("dim = 16\n", "dim = 16\nadmision = 2\n", ":26: server.models.ctr.tables.item.admision: ", "'admission'?"),
        ('"adam"', '"adamw"', ":26: server.models.ctr.tables.item.optimizer: ", "expected one of"),
        ("lr = 0.001", "lr = -1", ":26: server.models.ctr.tables.item.optimizer: ", "lr is -1"),
        ('"normal"', '"norm"', ":27: server.models.ctr.tables.item.initializer: ", "expected one of"),
        ("tables.item]", "tables._dense]", ":24: server.models.ctr.tables._dense: ", "reserved for dense tensors"),
        ("tables.item]", "tables._marks]", ":24: server.models.ctr.tables._marks: ", "one that servers use themselves"),
        ("[models.ctr]", '[models."ctr.training"]', ':10: models."ctr.training": ', "leave this section out"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, old: str, new: str, place: str, complaint: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    text = str(caught.value)
    assert f"node.toml{place}" in text, text
    assert complaint in text, text
    assert "\n" not in text
