"""What dropping a model and switching an alias may get wrong: each is planted on purpose, and must be noticed."""

from typing import Any

import pytest

from ekko.generations import DROPPED, DROPPED_TABLE, Alias, Registers
from ekko.model import ModelSpec, TableSpec, table_id
from ekko.store import schema
from ekko.store.model_store import ModelStore
from p2p import messages as m
from p2p.paper.rounds import Rounds
from p2p.paper.sync import PRESETS
from p2p.pulling.pull_answers import PullAnswers
from p2p.reach import Reach
from p2p.replica import SchemaEntry
from tests.p2p.chaos import form
from tests.p2p.generations_chaos import (
    OLD,
    add,
    away_while_it_was_dropped,
    both_sides_of_a_split,
    come_and_go,
    drop,
    dropped_in_the_middle_of_a_pull,
    publish,
    tables_come_and_go,
)
from tests.p2p.plants import Plant, Scenario, expect_caught

SEEDS = 6


def a_waiter_is_told(seed: int) -> None:
    """A wait that nobody can end any more is answered."""
    cluster = form(seed)
    cluster.run(5_000)
    add(cluster, "t1", OLD)
    cluster.run(1_000)
    cluster.pause("us3")
    stamp = publish(cluster, "t1", "gen-1", [1], 1.0)
    wait = cluster.ask("t1", lambda number: m.WaitRequested(number, OLD.id, stamp, m.Scope.ALL, 60_000))
    drop(cluster, "t1", "gen-1")
    assert isinstance(cluster.nodes["t1"].replies.get(wait), m.Refused)


def by_the_papers_protocol(seed: int) -> None:
    """The same by shard versions; what looks up a keyspace that is gone is noticed by that."""
    try:
        come_and_go(seed, PRESETS["leaders"])
    except KeyError as error:
        raise AssertionError(f"a keyspace is looked up that is gone: {error}") from error


def tables_that_are_gone(seed: int) -> None:
    """Tables come and go; what looks up one that is gone is noticed by that."""
    try:
        tables_come_and_go(seed)
    except KeyError as error:
        raise AssertionError(f"a table is looked up that is gone: {error}") from error


def incarnations_share_an_id(patch: pytest.MonkeyPatch) -> None:
    """A model that gets the name of a dropped one also gets its number."""
    patch.setattr(ModelSpec, "label", property(lambda self: self.name))


def drops_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """What was dropped is no fact for others: who was away brings it back."""
    original = Registers.entries

    def entries(self: Registers) -> list[SchemaEntry]:
        return [entry for entry in original(self) if not entry.name.startswith(DROPPED)]

    patch.setattr(Registers, "entries", entries)


def the_first_word_wins(patch: pytest.MonkeyPatch) -> None:
    """Of two values of an alias the one that was heard first counts."""
    patch.setattr(Alias, "rank", property(lambda _: ()))


def aliases_stand_for_what_is_gone(patch: pytest.MonkeyPatch) -> None:
    """An alias is not asked whether its model was dropped."""

    def resolve(self: Registers, alias: str, unix_ms: int | None = None) -> Any:
        return self.aliases[alias].target if alias in self.aliases else None

    patch.setattr(Registers, "resolve", resolve)


def older_ones_are_taken(patch: pytest.MonkeyPatch) -> None:
    """Any model that a peer names is taken, also one that was dropped."""
    patch.setattr(schema, "_is_current", lambda *_: True)


def answers_are_kept(patch: pytest.MonkeyPatch) -> None:
    """What is kept for who pulls a model stays when it is dropped."""
    patch.setattr(PullAnswers, "forget_keyspace", lambda *_: None)


def rounds_are_kept(patch: pytest.MonkeyPatch) -> None:
    """Neighbours' lists of a model's versions stay when it is dropped."""
    patch.setattr(Rounds, "forget_keyspace", lambda *_: None)


def waits_are_kept(patch: pytest.MonkeyPatch) -> None:
    """A wait goes on for a model that was dropped."""
    patch.setattr(Reach, "forget_keyspace", lambda *_: None)


def tables_share_an_id(patch: pytest.MonkeyPatch) -> None:
    """A table that gets the name of a dropped one also gets its number."""
    patch.setattr(TableSpec, "id", property(lambda self: table_id(self.name)))


def late_rows_are_no_exception(patch: pytest.MonkeyPatch) -> None:
    """Rows that come late of a table that was dropped are taken as all others."""
    patch.setattr(ModelStore, "_without_dropped", lambda _, columns: columns)


def drops_of_tables_are_not_told(patch: pytest.MonkeyPatch) -> None:
    """What was dropped of a model is no fact for others."""
    original = Registers.entries

    def entries(self: Registers) -> list[SchemaEntry]:
        return [entry for entry in original(self) if not entry.name.startswith(DROPPED_TABLE)]

    patch.setattr(Registers, "entries", entries)


@pytest.mark.parametrize(
    ("plant", "scenario"),
    [
        (incarnations_share_an_id, away_while_it_was_dropped),
        (drops_are_not_told, dropped_in_the_middle_of_a_pull),
        (the_first_word_wins, both_sides_of_a_split),
        (aliases_stand_for_what_is_gone, both_sides_of_a_split),
        (older_ones_are_taken, away_while_it_was_dropped),
        (answers_are_kept, dropped_in_the_middle_of_a_pull),
        (rounds_are_kept, by_the_papers_protocol),
        (waits_are_kept, a_waiter_is_told),
        (tables_share_an_id, tables_come_and_go),
        (late_rows_are_no_exception, tables_that_are_gone),
        (drops_of_tables_are_not_told, tables_come_and_go),
    ],
)
def test_a_planted_bug_is_noticed(plant: Plant, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_caught(plant, scenario, monkeypatch, SEEDS)


def test_the_scenario_of_a_wait_passes_as_it_is() -> None:
    a_waiter_is_told(0)
