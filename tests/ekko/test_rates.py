"""Rates of links as facts: whose word counts, merging in any order, junk of peers, and `ekko rate` on running nodes."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ekko
from ekko.asking import ask_node
from ekko.config import load_config
from ekko.errors import ConfigError, EkkoError
from ekko.rates import PAIRS_MAX, Rates, Said, Word, parse_pair, parse_word
from ekko.store import Store
from p2p.errors import RemoteProtocolError
from p2p.replica import SchemaEntry
from sim_cluster.processes import LocalCluster, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere

WORDS = st.one_of(st.just("none"), st.just("configured"), st.floats(0.01, 1e6))
SAIDS = st.builds(Said, st.sampled_from(["eu/us", "ap/eu"]), WORDS, st.integers(1, 3), st.integers(0, 3))


def rates_of(*said: Said) -> Rates:
    return Rates().learned([entry for one in said for entry in Rates({one.pair: one}).entries()])


@given(st.lists(SAIDS, max_size=8), st.randoms())
def test_all_who_heard_the_same_agree_whatever_the_order(said: list[Said], rng: random.Random) -> None:
    shuffled = [*said, *said]
    rng.shuffle(shuffled)
    one, other = rates_of(*said), rates_of(*shuffled)
    assert one == other
    assert one.entries() == other.entries()
    assert one.merged(other) is one
    assert Rates().learned(one.entries()) == one


@pytest.mark.parametrize(("word", "expected"), [(50.0, 50.0), ("none", None), ("configured", 200.0)])
def test_the_operators_word_counts_before_the_file(word: Word, expected: float | None) -> None:
    rates = Rates().said("eu/us", word, 1)
    configured = {"eu/us": 200.0, "ap/us": 8.0}
    assert rates.rate_of("eu/us", configured) == expected
    wanted = {"ap": 1e6} if expected is None else {"ap": 1e6, "eu": expected * 125_000}
    assert rates.of_region("us", configured) == wanted
    assert rates.of_region("ap", configured) == {"us": 1e6}


def test_the_later_word_counts_and_pairs_are_bounded() -> None:
    rates = Rates().said("eu/us", 50.0, 9).said("eu/us", 60.0, 1)
    assert rates.rate_of("eu/us", {}) == 60.0
    assert rates.merged(Rates().said("eu/us", 50.0, 9)).rate_of("eu/us", {}) == 60.0
    many = Rates().merged(Rates({f"a/r{number:05}": Said(f"a/r{number:05}", 1.0, 1, 1) for number in range(PAIRS_MAX + 9)}))
    assert len(many.by_pair) == PAIRS_MAX


@pytest.mark.parametrize(
    "entry",
    [
        SchemaEntry(0, "rate:eu/us", b"junk"),
        SchemaEntry(0, "rate:us/eu", Rates().said("eu/us", 5.0, 1).entries()[0].body),
        SchemaEntry(1, "rate:eu/us", Rates().said("eu/us", 5.0, 1).entries()[0].body),
        SchemaEntry(0, "rate:eu/eu", Rates().said("eu/us", 5.0, 1).entries()[0].body),
        Rates({"eu/us": Said("eu/us", -5.0, 1, 1)}).entries()[0],
        Rates({"eu/us": Said("eu/us", 5.0, -1, 1)}).entries()[0],
    ],
)
def test_junk_of_a_peer_is_refused_and_changes_nothing(entry: SchemaEntry) -> None:
    store = Store.anonymous()
    with pytest.raises(RemoteProtocolError):
        store.adopt([entry, *Rates().said("ap/eu", 5.0, 1).entries()])
    assert store.facts.of(Rates) == Rates()


@pytest.mark.parametrize("text", ["eu", "eu/eu", "eu/us/ap", "eu/", "e u/us"])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_pair(text)


def test_what_is_no_rate_is_refused_with_what_is_expected() -> None:
    for text in ("0", "-3", "fast", "nan", "inf", "1e9"):
        with pytest.raises(ConfigError, match=r"expected 0\.01 to"):
            parse_word(text)
    assert (parse_word("none"), parse_word("configured"), parse_word("0.5")) == ("none", "configured", 0.5)


def test_the_file_has_rates_in_either_order(tmp_path: Path) -> None:
    node = 'id = "a"\nregion = "eu"\nrole = "serve"\nrun_dir = "run"\n'
    addresses = 'peers = "tcp://127.0.0.1:7801"\nlocal = "tcp://127.0.0.1:7701"\nhttp = "127.0.0.1:7901"\nseeds = []\n'
    links = '[links]\n"us/eu" = { rate_mbps = 200 }\n"ap/eu" = { delay_ms = 4 }\n'
    path = tmp_path / "node.toml"
    path.write_text(f"[node]\n{node}{addresses}{links}")
    assert load_config(path).rates() == {"eu/us": 200.0}


# --- with real processes


def rate(node: NodeProcess, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ekko.cli", "rate", *arguments, "--http", node.http]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def shown(node: NodeProcess) -> dict[str, object]:
    rates: dict[str, dict[str, object]] = node.status()["rates"]
    return {pair: one["rate_mbps"] for pair, one in rates.items()}


@pytest.mark.processes
def test_a_rate_changes_while_nodes_run_holds_and_survives_their_restart(tmp_path: Path) -> None:
    nodes = [NodeSpec("train-1", "eu", "train"), NodeSpec("serve-1", "us")]
    with LocalCluster(tmp_path, nodes) as cluster:
        cluster.start()
        train, serve = cluster.nodes.values()
        keys = np.arange(1_000, dtype=np.uint64)
        rows = np.random.default_rng(1).standard_normal((1_000, 32)).astype(np.float32)  # which hardly compresses
        with ekko.Publisher(train.local, model="ctr", tables={"item": 32}, timeout=PATIENCE_S) as publisher:
            everywhere(publisher, publisher.publish("item", keys, rows))
            done = rate(serve, "us/eu", "1", "--json")
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"pair": "eu/us", "said": 1.0, "rate_mbps": 1.0}
            wait_until(lambda: shown(train) == {"eu/us": 1.0}, "the trainer hears of it", PATIENCE_S)
            begin, moved = time.monotonic(), train.status()["rates"]["eu/us"]["bytes_charged"]
            for number in range(4):  # each takes a second
                stamp = publisher.publish("item", keys, rows + number)
            everywhere(publisher, stamp)
            charged = train.status()["rates"]["eu/us"]
            taken_s = time.monotonic() - begin
            assert charged["bytes_charged"] - moved <= 125_000 * (taken_s + 0.2) + 150_000
            assert charged["bytes_charged"] > moved
            assert charged["waits"] > 0
        assert "our share" in rate(train).stdout
        with pytest.raises(EkkoError, match=r"expected 0\.01 to"):
            ask_node(train.http, "/rate", {"pair": "eu/us", "rate": "fast"})
        train.stop()
        train.start()
        train.wait_ready()
        assert shown(train) == {"eu/us": 1.0}
        assert ask_node(train.http, "/rate", {"pair": "eu/us", "rate": "none"})["rate_mbps"] is None
        wait_until(lambda: shown(serve) == {"eu/us": None}, "the other hears of it", PATIENCE_S)
        assert rate(train, "eu/us", "configured").stdout == "updates between eu and us have no limit\n"
        wait_until(lambda: shown(serve) == {}, "the other hears of it", PATIENCE_S)
