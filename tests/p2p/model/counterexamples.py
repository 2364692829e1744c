"""For each rule: the shortest walk to a false claim without it that was found. Read one to see what it is for."""

from tests.p2p.model.walks import Walk, read_walk

COUNTEREXAMPLES: dict[str, Walk] = {
    rule: read_walk(walk)
    for rule, walk in {
        "due_is_what_the_child_lacks": "congest 0 1, write 0 1, deliver 0 full, deliver 0, notice 0 1, send 0 1 0, deliver 1",
        "pulled_rows_are_due": (
            "write 0 1, turn 2, congest 2 1, deliver 0, deliver 0, send 2 1 0, deliver 0, pull 2 0, send 2 1 0, deliver 0"
        ),
        "chunk_rows_are_due": (
            "congest 2 1, deliver 0, deliver 0, write 2 0, congest 1 0, deliver 0, send 2 1 0, deliver 0, deliver 0, "
            "send 1 0 0, deliver 0, pull 1 2, send 1 0 1, deliver 0"
        ),
        "rows_of_all_writers_are_due": (
            "congest 0 2, deliver 0, deliver 0, send 0 2 0, deliver 0, congest 2 1, deliver 0, deliver 0, write 0 2, "
            "write 2 2, send 2 1 0, send 0 2 0, deliver 0, deliver 0, send 2 1 0, deliver 0"
        ),
        "vector_is_recorded_with_due": "write 0 2, congest 0 1, deliver 0, deliver 0, write 0 0, send 0 1 0, deliver 0",
        "all_recorded_rows_leave_first": "congest 2 1, deliver 0, write 2 0, deliver 0, write 2 1, send 2 1 1, deliver 0",
        "rows_are_due_again": (
            "write 2 0, write 2 1, congest 0 1, deliver 0, pull 0 2, deliver 0, send 0 1 1, write 0 1, deliver 0, send 0 1 0, "
            "deliver 0, send 0 1 0, deliver 0"
        ),
        "claims_stop_at_a_hole": (
            "congest 2 1, notice 2 1, deliver 0, deliver 1, congest 0 1, write 2 0, send 2 1 0, send 2 1 0, send 2 1 0, "
            "deliver 4"
        ),
        "sessions_that_end_select_again": (
            "congest 2 1, deliver 0 full, write 2 2, write 2 0, deliver 0, send 2 1 1, stall 2 1, send 2 1 0, lose 0, deliver 0"
        ),
        "lives_are_told_apart": (
            "congest 0 1, deliver 0, notice 0 1, deliver 0, deliver 0, send 0 1 0, write 0 1, send 0 1 0, crash 1 keep, "
            "send 0 1 0, deliver 0, send 0 1 0, deliver 0, deliver 0, notice 0 1, lose 1, deliver 1, deliver 0 keep"
        ),
        "refused_chunks_spoil": (
            "congest 2 0, congest 2 1, calm 2 0, congest 1 2, deliver 0, deliver 0, deliver 0, congest 0 1, deliver 0 full, "
            "write 0 0, deliver 0, congest 2 0, deliver 0, deliver 0, deliver 0, deliver 0, send 0 1 0, deliver 0, "
            "deliver 0 full"
        ),
        "batches_without_room_spoil": (
            "congest 1 0, deliver 0, deliver 0, write 2 0, congest 2 1, deliver 0, deliver 0, send 2 1 0, pass_on 2 1 0 0, "
            "deliver 1, deliver 0, send 1 0 0, send 1 0 0, deliver 0, deliver 0"
        ),
        "who_has_no_room_waits": (
            "congest 1 0, deliver 0, deliver 0, write 2 0, congest 2 1, deliver 0, deliver 0, send 2 1 0, pass_on 2 1 0 0, "
            "notice 1 0, deliver 2, deliver 2, deliver 1, deliver 0, send 1 0 0, send 1 0 0, deliver 0, deliver 0"
        ),
        "claims_answer_the_last_question": (
            "write 0 2, congest 0 1, deliver 0, write 0 1, deliver 0 full, send 0 1 0, send 0 1 1, send 0 1 2, deliver 0, "
            "deliver 0 full, deliver 0"
        ),
        "shards_of_the_pairs_only": "write 2 0, congest 2 0, drop 2 0, deliver 0, deliver 0, send 2 0 0, deliver 0",
        "other_pairs_select_again": "congest 2 0, turn 2, write 2 0, deliver 0, deliver 0, send 2 0 0, send 2 0 0, deliver 0",
        "claims_need_the_floor_covered": "write 0 0, drop 0 0, congest 0 1, deliver 0, deliver 0, send 0 1 0, deliver 0 full",
        "what_is_dropped_raises_the_floor": "write 2 1, drop 2 1, pull 1 2",
        "both_agree_who_is_retired": (
            "write 2 2, write 0 2, pull 0 2, pull 1 0, pull 2 0, crash 0, pull 0 1, retire 0, crash 1, hear 0 1, congest 0 1, "
            "deliver 0, deliver 0, send 0 1 0, deliver 0"
        ),
        "told_is_not_assumed": (
            "write 2 2, write 0 2, pull 0 2, pull 1 0, pull 2 0, crash 0, pull 0 1, retire 0, drop 0 2, crash 1, "
            "tell_retired 1 2, hear 0 1, congest 0 1, deliver 0, deliver 0, send 0 1 0, deliver 0"
        ),
        "a_frontier_waits_for_the_rest": "write 0 2, congest 0 1, deliver 0, deliver 0, send 0 1 0, deliver 0",
    }.items()
}
