"""Key files: what is read, what is refused, and what a change does. And nodes that use them, as processes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ekko
from benchmarks import flood
from ekko.errors import ConfigError
from ekko.security import GRACE_LOOKS, KEYS_MAX, NodeKeys, generate, owner_of, read_public, read_secret
from sim_cluster.processes import LocalCluster, ModelTables, NodeProcess, NodeSpec, wait_until
from tests.everywhere import PATIENCE_S, everywhere


def make(folder: Path, node: str = "a") -> tuple[NodeKeys, Path]:
    allow = folder / "allow"
    allow.mkdir(exist_ok=True)
    generate(folder / f"{node}.key")
    return NodeKeys(node, folder / f"{node}.key", allow), allow


def test_keygen_writes_a_pair_and_never_over_one(tmp_path: Path) -> None:
    public = generate(tmp_path / "eu-1.key")
    assert public == tmp_path / "eu-1.pub"
    assert (tmp_path / "eu-1.key").stat().st_mode & 0o777 == 0o600
    pair = read_secret(tmp_path / "eu-1.key")
    assert read_public(public) == pair.public
    assert pair.secret not in public.read_text()
    with pytest.raises(ConfigError, match="exists"):
        generate(tmp_path / "eu-1.key")
    public.unlink()
    with pytest.raises(ConfigError, match="never overwritten"):
        generate(tmp_path / "eu-1.key")
    with pytest.raises(ConfigError, match="cannot be written"):
        generate(tmp_path / "absent" / "x.key")


def test_the_command_line_makes_keys(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ekko.cli", "keygen", "--out", str(tmp_path / "n.key")]
    assert "n.pub" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.count("\n") == 1


def test_a_secret_that_others_can_read_is_refused(tmp_path: Path) -> None:
    generate(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)  # the group may: mounted secrets belong to one
    read_secret(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_secret(tmp_path / "a.key")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "junk",
        "ekko-secret-key " + "x" * 39,
        "ekko-secret-key a b",
        "ekko-secret-key " + '"' * 40,
        "ekko-secret-key " + "#" * 40,
    ],
)
def test_what_is_no_secret_key_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"a\.key"):
        read_secret(path)
    generate(tmp_path / "b.key")
    with pytest.raises(ConfigError, match="ekko-public-key"):
        read_public(tmp_path / "b.key")


def test_names_of_files_say_whose_keys_they_are() -> None:
    assert [owner_of(name) for name in ("eu-1.pub", "eu-1@2.pub", "eu.1@x@y.pub")] == ["eu-1", "eu-1", "eu.1"]


def test_the_folder_is_followed(tmp_path: Path) -> None:
    keys, allow = make(tmp_path)
    assert keys.owner(keys.own.public) == "a"
    assert not keys.adopt(keys.look())
    b, b2 = generate(tmp_path / "b.key"), generate(tmp_path / "b2.key")
    shutil.copy(b, allow / "b.pub")
    shutil.copy(b2, allow / "b@2.pub")
    (allow / "README").write_text("not a key, and not called like one")
    change = keys.adopt(keys.look())
    assert (change.added, change.removed, change.problems) == (("b.pub", "b@2.pub"), (), ())
    assert {keys.owner(read_public(b)), keys.owner(read_public(b2))} == {"b"}
    shutil.copy(tmp_path / "b.key", allow / "oops.pub")  # a secret key in the wrong place lets nobody in, and is told once
    change = keys.adopt(keys.look())
    assert len(change.problems) == 1
    assert "oops.pub" in change.problems[0]
    assert not keys.adopt(keys.look())
    (allow / "b.pub").unlink()
    assert keys.adopt(keys.look()).removed == ("b.pub",)
    assert keys.owner(read_public(b)) is None
    assert keys.owner(read_public(b2)) == "b"
    allow.rename(tmp_path / "gone")  # a mount that is away for a moment
    assert "stay allowed" in keys.adopt(keys.look()).problems[0]
    assert keys.owner(read_public(b2)) == "b"


def test_a_folder_that_is_being_deployed_keeps_its_keys(tmp_path: Path) -> None:
    """Emptied, or with a file truncated, and written anew a moment later."""
    keys, allow = make(tmp_path)
    b, c = generate(tmp_path / "b.key"), generate(tmp_path / "c.key")
    shutil.copy(b, allow / "b.pub")
    shutil.copy(c, allow / "c.pub")
    keys.adopt(keys.look())
    for name in ("b.pub", "c.pub"):
        (allow / name).unlink()
    change = keys.adopt(keys.look())
    assert (change.removed, len(change.problems)) == ((), 2)
    assert not keys.adopt(keys.look()), "told once"
    assert [keys.owner(read_public(path)) for path in (b, c)] == ["b", "c"]
    assert keys.kept == 2
    (allow / "b.pub").write_text("")  # the tool has opened the first file: c may follow
    keys.adopt(keys.look())
    assert [keys.owner(read_public(path)) for path in (b, c)] == ["b", "c"]
    shutil.copy(b, allow / "b.pub")
    shutil.copy(c, allow / "c.pub")
    keys.adopt(keys.look())
    (allow / "c.pub").write_text("")
    keys.adopt(keys.look())
    assert keys.owner(read_public(c)) == "c"
    shutil.copy(b, allow / "c.pub")  # another key, not an absent one
    keys.adopt(keys.look())
    assert keys.owner(read_public(c)) is None
    assert not keys.adopt(keys.look())


def test_the_last_key_can_be_removed(tmp_path: Path) -> None:
    keys, allow = make(tmp_path)
    b = generate(tmp_path / "b.key")
    shutil.copy(b, allow / "b.pub")
    keys.adopt(keys.look())
    (allow / "b.pub").unlink()
    shutil.copy(tmp_path / "a.pub", allow / "a.pub")  # somebody is in the folder, if only we: it is meant
    assert keys.adopt(keys.look()).removed == ("b.pub",)
    shutil.copy(b, allow / "b.pub")
    (allow / "a.pub").unlink()
    keys.adopt(keys.look())
    (allow / "b.pub").unlink()
    for _ in range(GRACE_LOOKS):
        assert not keys.adopt(keys.look()).removed
    assert keys.adopt(keys.look()).removed == ("b.pub",)
    assert keys.owner(read_public(b)) is None
    assert keys.owner(keys.own.public) == "a"


def test_our_own_key_is_followed_and_a_broken_one_changes_nothing(tmp_path: Path) -> None:
    keys, _ = make(tmp_path)
    old = keys.own
    generate(tmp_path / "new.key")
    (tmp_path / "new.key").replace(tmp_path / "a.key")
    assert keys.adopt(keys.look()).renewed
    assert keys.own != old
    assert keys.owner(old.public) is None
    (tmp_path / "a.key").write_text("junk")
    new = keys.own
    assert keys.adopt(keys.look()).problems
    assert keys.own == new
    (tmp_path / "a.key").unlink()
    assert keys.adopt(keys.look()).problems
    assert keys.own == new


def test_likely_keys_come_first_and_their_number_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, allow = make(tmp_path)
    for name in "bcdef":
        shutil.copy(generate(tmp_path / f"{name}.key"), allow / f"{name}.pub")
    keys.adopt(keys.look())
    keys.node_at = {"tcp://x:1": "e"}.get
    assert next(keys.owner(key) for key in keys.candidates("tcp://x:1")) == "e"
    assert len(keys.candidates("tcp://y:1")) == 5
    monkeypatch.setattr("ekko.security.KEYS_MAX", 3)
    keys.adopt(keys.look())
    assert len(keys.candidates("tcp://y:1")) == 3
    assert KEYS_MAX >= 4_096


# --- nodes ----------------------------------------------------------------------------------------------------------------

MODELS = {"ctr": ModelTables({"item": 4}, capacity_rows=1_000)}


def secure(node: NodeProcess, allowed: list[Path]) -> Path:
    """Give `node` a key of its own and the folder of those it allows; returns its public key."""
    key = node.folder / "node.key"
    public = generate(key)
    (node.folder / "allow").mkdir()
    for path in allowed:
        shutil.copy(path, node.folder / "allow")
    with node.config_path.open("a") as file:
        file.write('[security]\nkey_file = "node.key"\nallow = "allow"\n')
    return public.rename(node.folder / f"{node.id}.pub")


def rows(value: float) -> np.ndarray[Any, Any]:
    return np.full((1, 4), value, np.float32)


def counters(node: NodeProcess) -> dict[str, int]:
    return dict(node.status()["counters"])


def keys_removed(node: NodeProcess) -> set[str]:
    """What its log says; several files may have gone between two looks."""
    whole = [
        line for line in node.log_path.read_text().splitlines(keepends=True) if line.startswith("{") and line.endswith("\n")
    ]
    return {name for line in whole for name in json.loads(line).get("removed", ())}


@pytest.mark.processes
def test_nodes_with_keys_replace_them_and_cut_one_off_while_they_run(tmp_path: Path) -> None:
    specs = [NodeSpec("t", "us", "train"), NodeSpec("s1", "us"), NodeSpec("s2", "eu"), NodeSpec("out", "eu")]
    with LocalCluster(tmp_path, specs, models=MODELS) as cluster:
        nodes = cluster.nodes
        publics = {name: secure(node, []) for name, node in nodes.items()}
        for name in ("t", "s1", "s2"):
            for other in ("t", "s1", "s2"):
                shutil.copy(publics[other], nodes[name].folder / "allow")
        for other in ("t", "s1", "s2"):  # it knows all of them, and none knows it
            shutil.copy(publics[other], nodes["out"].folder / "allow")
        for name in ("t", "s1", "s2"):
            nodes[name].start()
        for name in ("t", "s1", "s2"):
            nodes[name].wait_ready()
        cluster.wait_members()
        nodes["out"].start()
        with ekko.Publisher(nodes["t"].local, model="ctr", timeout=PATIENCE_S) as publisher:
            everywhere(publisher, publisher.publish("item", [1], rows(1)))
            wait_until(lambda: counters(nodes["t"])["transport_strangers"] >= 2, "the stranger tries", PATIENCE_S)
            assert not any('"out"' in json.dumps(nodes[name].status()) for name in ("t", "s1", "s2"))
            # s1 gets another key; the steps go on meanwhile.
            new = generate(tmp_path / "s1@2.key")
            for name in ("t", "s2"):
                shutil.copy(new, nodes[name].folder / "allow")
            wait_until(
                lambda: all("s1@2.pub" in nodes[name].log_path.read_text() for name in ("t", "s2")),
                "the key is seen",
                PATIENCE_S,
            )
            (tmp_path / "s1@2.key").replace(nodes["s1"].folder / "node.key")
            wait_until(lambda: '"own_renewed": true' in nodes["s1"].log_path.read_text(), "it has its new key", PATIENCE_S)
            for name in ("t", "s2"):
                (nodes[name].folder / "allow" / "s1.pub").unlink()
            everywhere(publisher, publisher.publish("item", [2], rows(2)))
            # s2 is cut off.
            for name in ("t", "s1"):
                (nodes[name].folder / "allow" / "s2.pub").unlink()
            wait_until(
                lambda: all("s2.pub" in keys_removed(nodes[name]) for name in ("t", "s1")),
                "the key is gone",
                PATIENCE_S,
            )
            publisher.publish("item", [3], rows(3))
            reader = ekko.Reader("ctr", run_dir=nodes["s1"].run_dir)
            wait_until(lambda: reader.lookup("item", np.array([3], np.uint64))[0, 0] == 3, "the others go on", PATIENCE_S)
            reader.close()
            lost = ekko.Reader("ctr", run_dir=nodes["s2"].run_dir)
            assert lost.lookup("item", np.array([2, 3], np.uint64))[:, 0].tolist() == [2, 0]
            for name in ("t", "s1"):  # and let in again
                shutil.copy(publics["s2"], nodes[name].folder / "allow")
            wait_until(lambda: lost.lookup("item", np.array([3], np.uint64))[0, 0] == 3, "it catches up", PATIENCE_S)
            lost.close()
        out = json.loads(json.dumps(nodes["out"].status()))
        assert not [peer for peer in out.get("peers", []) if peer["linked"]]


@pytest.mark.processes
@pytest.mark.long
def test_random_bytes_cost_little() -> None:
    figures = flood.measure(24, calm_s=1.0)
    assert figures["rss_growth_mb"] <= 64
    assert figures["connections"] >= 10
    assert figures["batches_during"] > 5
    # The 3 x of a quiet machine (`scripts/bench flood`), with room for a busy one.
    assert figures["p99_during_ms"] <= 3 * figures["p99_before_ms"] + 50
