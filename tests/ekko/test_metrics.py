"""The ring of exact delays, and which clock a delay is measured with."""

import pytest

from ekko.metrics import DELAYS_ANSWER_MAX, REGIONS_MAX, Delays, Metrics
from p2p.messages import BatchApplied
from p2p.stamps import make_stamp

HERE, ELSEWHERE = 7, 8


def values(answer: dict[str, object]) -> object:
    return answer["delays_ms"]


def test_delays_are_read_on_from_where_the_last_answer_ended() -> None:
    delays = Delays(capacity=4)
    assert delays.since(0) == {"next": 0, "count": 0, "lost": 0, "delays_ms": []}
    for delay in (1.0, 2.0, 3.00049):
        delays.add(delay)
    assert delays.since(0) == {"next": 3, "count": 3, "lost": 0, "delays_ms": [1.0, 2.0, 3.0]}
    assert values(delays.since(2)) == [3.0]
    assert values(delays.since(3)) == []


def test_what_was_overwritten_is_told() -> None:
    delays = Delays(capacity=4)
    for delay in range(10):
        delays.add(float(delay))
    assert delays.since(3) == {"next": 10, "count": 10, "lost": 3, "delays_ms": [6.0, 7.0, 8.0, 9.0]}


def test_a_position_of_a_former_life_starts_over() -> None:
    delays = Delays(capacity=4)
    delays.add(1.0)
    assert delays.since(50) == {"next": 1, "count": 1, "lost": 0, "delays_ms": [1.0]}


def test_one_answer_is_bounded() -> None:
    delays = Delays()
    for _ in range(DELAYS_ANSWER_MAX + 5):
        delays.add(1.0)
    first = delays.since(0)
    assert first["next"] == DELAYS_ANSWER_MAX
    assert values(delays.since(DELAYS_ANSWER_MAX)) == [1.0] * 5


def applied(machine: int, published_ns: int, unix_ms: int, region: str = "eu") -> BatchApplied:
    return BatchApplied(1, region, make_stamp(unix_ms, 0, 3), published_ns, machine, 10)


@pytest.mark.parametrize(
    ("batch", "delay_ms"),
    [
        (applied(HERE, 1_000_000_000, 1_600_000_000_000), 500.0),  # one machine: the monotonic clock
        (applied(ELSEWHERE, 1_000_000_000, 1_700_000_000_000), 250.0),  # another one: wall clocks
        (applied(HERE, 0, 1_700_000_000_000), 250.0),  # not measured
        (applied(ELSEWHERE, 0, 1_700_000_001_000), 0.0),  # a clock ahead of ours is no negative delay
    ],
)
def test_which_clock_measures_a_delay(batch: BatchApplied, delay_ms: float) -> None:
    metrics = Metrics(lambda: None, HERE)
    metrics.on_applied(batch, 1_500_000_000, 1_700_000_000_250)
    assert values(metrics.delays.since(0)) == [delay_ms]
    assert f'ekko_update_delay_seconds_sum{{origin_region="eu"}} {delay_ms / 1000}' in metrics.text().decode()


def test_regions_in_the_histogram_are_bounded() -> None:
    metrics = Metrics(lambda: None, HERE)
    for number in range(REGIONS_MAX + 10):
        metrics.on_applied(applied(HERE, 1, 1_600_000_000_000, f"r{number}"), 10, 0)
    assert metrics.text().decode().count("ekko_update_delay_seconds_count{") == REGIONS_MAX
