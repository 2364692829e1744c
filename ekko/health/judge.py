"""One model, judged: windows of all nodes in, verdicts out. Pure: time is an argument."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from ekko.generations import Generation
from ekko.health.detectors import Detector, Finding, Window
from ekko.health.samples import Sample
from ekko.health.summaries import Summaries
from ekko.health.verdicts import SEVERITY, Verdicts
from ekko.health.windows import PATIENCE_MS

# After a window's events were due: until its nodes have closed it, and the others heard.
SETTLE_MS: Final = 1_000
# Judges take turns within this, so that the first one's verdict spares the others an entry in the log.
STAGGER_MS: Final = 1_000
# A node that has told of none of so many windows has stopped: nobody waits for it.
SILENT_WINDOWS: Final = 3
# Windows whose figures are kept for people.
HISTORY_MAX: Final = 60


@dataclass(slots=True)
class Judge:
    """Judges one model on one node.

    Args:
        model: which.
        node: who.
        window_ms: length of a window.
        lateness_ms: how long after the answer labels may come.
        stagger_ms: how much later than others this node looks.
        detectors: who has a say.
    """

    model: Generation
    node: str
    window_ms: int
    lateness_ms: int
    stagger_ms: int
    detectors: Sequence[Detector]
    history: deque[Window] = field(default_factory=lambda: deque(maxlen=HISTORY_MAX))
    findings: dict[str, Finding] = field(default_factory=dict)  # the last of each detector
    failed: dict[str, str] = field(default_factory=dict)  # detectors that failed, and how: they have no say any more
    _next: int = 0  # no window below it is judged any more

    def judge(self, summaries: Summaries, numbers: Sequence[int], verdicts: Verdicts, now_ms: int) -> Verdicts:
        """Look at the windows that are complete by now.

        Args:
            summaries: of all nodes.
            numbers: windows of this model that any node has told of, ascending.
            verdicts: what was said before.
            now_ms: Unix milliseconds.

        Returns:
            What was said before, and what is to be said now.
        """
        for number in numbers:
            if number < self._next:
                continue
            if not self._complete(summaries, number, now_ms):
                break  # nor are those after it, those of the future among them
            self._next = number + 1
            arms, _ = summaries.pair(self.model, self.window_ms, number)
            begin_ms = number * self.window_ms
            window = Window(number, begin_ms, begin_ms + self.window_ms, arms)
            self.history.append(window)
            verdicts = self._observe(window, verdicts, now_ms)
        return verdicts

    def _complete(self, summaries: Summaries, number: int, now_ms: int) -> bool:
        """Whether every node that lately told of windows has told of this one or a later one; none is waited for too long."""
        due_ms = (number + 1) * self.window_ms + self.lateness_ms + SETTLE_MS + self.stagger_ms
        if now_ms < due_ms:
            return False
        if now_ms >= due_ms + PATIENCE_MS:
            return True
        newest: dict[str, int] = {}
        for model, node, window_ms, window in summaries.windows:
            if (model, window_ms) == (self.model, self.window_ms):
                newest[node] = max(newest.get(node, 0), window)
        return all(window >= number for window in newest.values() if window >= number - SILENT_WINDOWS)

    def _observe(self, window: Window, verdicts: Verdicts, now_ms: int) -> Verdicts:
        found: list[tuple[str, Finding]] = []
        for detector in self.detectors:
            try:
                found += [(detector.name, finding) for finding in detector.observe(window) if detector.name not in self.failed]
            except Exception as error:  # noqa: BLE001 - a user's detector can fail in any way
                self.failed[detector.name] = repr(error)
        # The worst first: what it says of a moment is then not said again by others.
        for name, finding in sorted(found, key=lambda one: -SEVERITY[one[1].state]):
            self.findings[name] = finding
            before = verdicts.state(self.model, now_ms)
            noted = verdicts.note(self.model, finding.state, finding.from_ms, finding.until_ms)
            if noted.state(self.model, now_ms) != before:
                text = finding.text
                noted = noted.note(
                    self.model,
                    finding.state,
                    finding.from_ms,
                    finding.until_ms,
                    now_ms=now_ms,
                    node=self.node,
                    detector=name,
                    text=text,
                )
            verdicts = noted
        return verdicts

    def why(self) -> dict[str, str]:
        """Detector -> what it said last, or how it failed."""
        said = {name: f"{one.state}: {one.text}" for name, one in self.findings.items()}
        return said | {name: f"failed, and has no say any more: {reason}" for name, reason in self.failed.items()}

    def recent(self) -> tuple[Sample, Sample]:
        """Both arms over the windows that are kept."""
        online, baseline = Sample(), Sample()
        for window in self.history:
            online, baseline = online + window.arms[0], baseline + window.arms[1]
        return online, baseline
