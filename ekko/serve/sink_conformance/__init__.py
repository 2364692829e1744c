"""What every sink must do, as tests that the tests of a sink call. None of it is about one store.

    @pytest.mark.parametrize("case", sink_conformance.CASES, ids=lambda case: case.__name__)
    def test_my_sink(case):
        case(MySubject())

A `Subject` says how to get at the store. Each case is given one of its own, empty, and raises AssertionError, which says what
the sink did wrong. Some bring a node's store with them, in shared memory, so that the feed is the real one; where the foreign
store outlives a process (`Subject.durable`), sinks and feeds are killed with batches under way, in forks of the process that
tests.
"""

from typing import Final

from ekko.serve.sink_conformance import batches, feeds, kills
from ekko.serve.sink_conformance.subject import Case, Subject

__all__ = ["CASES", "Case", "Subject"]

CASES: Final[tuple[Case, ...]] = (
    batches.rows_are_written_as_they_come,
    batches.repeats_change_nothing,
    batches.what_is_older_never_wins,
    batches.what_is_deleted_stays_deleted,
    batches.what_is_forgotten_may_come_back,
    batches.held_tells_of_all_rows,
    batches.tables_come_and_go,
    batches.the_cursor_is_kept,
    batches.a_feed_that_was_replaced_writes_no_more,
    batches.any_order_ends_the_same,
    feeds.a_feed_brings_what_the_node_has,
    feeds.a_feed_goes_on_where_another_one_ended,
    feeds.what_the_ring_lost_is_found,
    feeds.what_went_while_nobody_looked_is_found,
    feeds.a_node_that_begins_anew_is_followed,
    feeds.tables_that_come_later_are_fed,
    kills.what_was_committed_outlives_a_kill,
    kills.a_batch_that_was_cut_short_comes_again,
    kills.feeds_are_killed_in_mid_batch,
)
