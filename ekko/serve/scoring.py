"""What a scorer asks of its reader beside rows: which model a request is for, and to whom to tell how good answers were."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ekko.health.traffic import ONLINE, Arms, RequestIds, Traffic, arms_of
from ekko.health.wire import events_of
from ekko.model import check_name
from ekko.serve.following import Follower
from ekko.store import layout

if TYPE_CHECKING:
    from ekko.health.reporting import ReportCounts, Reporter

# What was reported last gets so long to reach the node when a reader is closed.
REPORTS_S_MAX = 1.0
_ONLINE_FROM, _ONLINE_UNTIL = (layout.MODEL.offset(name) // 8 for name in ("online_from", "online_until"))


class Scorer(Follower):
    """Divides requests among arms, and reports. Needs no rows."""

    _reports: "Reporter | None" = None

    def arm(self, request_ids: RequestIds) -> Arms:
        """Which requests the online model is to answer (0), and which the baseline (1), the model with delayed state.

        The same answer for the same id in every process and language, as long as the shares stay as they are; they come from
        the node, through shared memory. See `ekko.health.traffic`.

        Args:
            request_ids: integers >= 0 of any shape, or text or bytes.

        Returns:
            uint8, of their shape.

        Raises:
            ModelError: they are none of these.
        """
        attachment = self._current()
        return arms_of(attachment.model.name, request_ids, attachment.header[_ONLINE_FROM], attachment.header[_ONLINE_UNTIL])

    def traffic(self) -> Traffic:
        """The shares by which `arm` divides requests now."""
        header = self._current().header
        return Traffic.of_bounds(header[_ONLINE_FROM], header[_ONLINE_UNTIL])

    def report(
        self,
        model: str | None,
        prediction: ArrayLike,
        label: ArrayLike,
        weight: ArrayLike | None = None,
        segment: str | Sequence[str] | None = None,
        *,
        arm: ArrayLike = ONLINE,
        at: ArrayLike | None = None,
    ) -> int:
        """Tell the node how good answers were, so that it can judge the model (`ekko health`). Never waits, never fails.

        What finds no room in a queue of this process, or no node, is dropped and counted (`report_counts`).

        Args:
            model: which model answered; None: this reader's.
            prediction: the probabilities that it gave, [n].
            label: what came of it, 0 or 1, [n].
            weight: importance of each, [n] or one for all; None: 1.
            segment: what they are to be told apart by, a name for each or one for all; of a model 32 are kept.
            arm: which arm answered (see `arm`), [n] or one for all.
            at: when the model answered, Unix seconds, [n] or one for all; None: now. Labels that come late need it.

        Returns:
            How many events were queued.

        Raises:
            ModelError: predictions or labels are not from 0 to 1, or columns do not fit each other. Nothing is queued.
        """
        at_ms = time.time_ns() // 1_000_000 if at is None else np.round(np.asarray(at, np.float64) * 1000)
        name = self.model if model is None else check_name("model", model)
        parts = events_of(prediction, label, weight, segment, arm, at_ms)
        reporter = self._reporter
        return sum(len(events) for events in parts if reporter.put(name, events))

    @property
    def report_counts(self) -> "ReportCounts":
        """What became of the events that `report` was given in this process."""
        return self._reporter.counts

    def flush_reports(self, timeout: float = 5.0) -> bool:
        """Wait until what `report` queued is with the node, or dropped; False: not in time. For tests and the end of jobs."""
        return self._reporter.flush(timeout)

    @property
    def _reporter(self) -> "Reporter":
        if self._reports is None:
            from ekko.health.reporting import Reporter  # serving needs no network, reporting does

            with self._attaching:
                self._reports = self._reports or Reporter(self._run_dir)
        return self._reports

    def _end_reports(self) -> None:
        with self._attaching:
            reports, self._reports = self._reports, None
        if reports is not None:
            reports.flush(REPORTS_S_MAX)
            reports.close()
