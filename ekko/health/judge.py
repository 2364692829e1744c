"""One model, judged: windows of all nodes in, verdicts out. Pure: time is an argument.

A window is judged once, when all who report have told of it. What a node tells later, since it was cut off, is a window of its
own, a *late* one, for those detectors to whom order does not matter. What is never told of is counted (`Account`).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ekko.errors import ModelError
from ekko.generations import Generation
from ekko.health.detectors import Detector, Finding, Window
from ekko.health.samples import Sample
from ekko.health.summaries import WINDOWS_MAX, Summaries, Told
from ekko.health.verdicts import SEVERITY, TEXT_BYTES_MAX, Verdicts

# After a window's events were due: until its nodes have closed it, and the others heard.
SETTLE_MS: Final = 1_000
# Judges take turns within this, so that the first one's verdict spares the others an entry in the log.
STAGGER_MS: Final = 1_000
# A node that is so many windows behind what others have told has stopped: nobody waits for it.
SILENT_WINDOWS: Final = 3
# And nobody waits for longer than this for anybody.
WAIT_MS_MAX: Final = 60_000
# Nodes whose events are counted; a cluster has fewer that report on one model.
ACCOUNTS_MAX: Final = 1_024
# Windows whose figures are kept for people.
HISTORY_MAX: Final = 60


@dataclass(slots=True)
class Account:
    """How many events a node has told of, and how many of them were judged here."""

    before: float  # what it had told of before the first window that was heard of here
    newest: int = -1  # window that was judged
    judged: float = 0.0
    total: float = 0.0  # what it has told of by the newest window
    lost: float = 0.0  # in its lives before this one

    @property
    def missed(self) -> float:
        """Events of windows that never came here, or came when they were forgotten."""
        return self.lost + max(0.0, self.total - self.before - self.judged)

    def add(self, number: int, told: Told) -> None:
        """Count a window that is judged now."""
        before = told.total - told.events
        if number > self.newest:
            if told.total < self.total:  # it was restarted, and counts from 0
                self.lost, self.before, self.judged = self.missed, before, 0.0
            self.newest, self.total = number, told.total
        elif told.total <= self.total:  # else: of a life before
            self.before = min(self.before, before)
        self.judged += told.events


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
    accounts: dict[str, Account] = field(default_factory=dict)  # by node
    _next: int = 0  # windows below it were judged; what comes of them is late
    _judged: dict[int, set[str]] = field(default_factory=dict)  # window -> nodes whose samples were, of the last windows

    @property
    def missed(self) -> float:
        """Events of all nodes that were not judged here."""
        return sum(account.missed for account in self.accounts.values())

    def judge(self, summaries: Summaries, verdicts: Verdicts, now_ms: int) -> Verdicts:
        """Look at the windows that are complete by now.

        Args:
            summaries: of all nodes.
            verdicts: what was said before.
            now_ms: Unix milliseconds.

        Returns:
            What was said before, and what is to be said now.
        """
        told = summaries.of(self.model, self.window_ms)
        newest = {node: max(windows) for node, windows in told.items()}
        for number in sorted({number for windows in told.values() for number in windows}):
            late = number < self._next
            if not late and not self._complete(newest, number, now_ms):
                break  # nor are those after it, those of the future among them
            self._next = max(self._next, number + 1)
            arms = self._take(told, number)
            if arms is not None:
                begin_ms = number * self.window_ms
                window = Window(number, begin_ms, begin_ms + self.window_ms, arms, late)
                if not late:
                    self.history.append(window)
                verdicts = self._observe(window, verdicts, now_ms)
        for number in [number for number in self._judged if number < self._next - 2 * WINDOWS_MAX]:
            del self._judged[number]
        return verdicts

    def _take(self, told: Mapping[str, Mapping[int, bytes]], number: int) -> tuple[Sample, Sample] | None:
        """What nodes told of a window and was not judged yet; None: nothing."""
        if number < self._next - 2 * WINDOWS_MAX:
            return None  # whether it was judged is not known any more
        done = self._judged.setdefault(number, set())
        new = [(node, Told.parse(windows[number])) for node, windows in told.items() if number in windows and node not in done]
        if not new:
            return None
        online, baseline = Sample(), Sample()
        for node, one in new:
            online, baseline = online + one.arms[0], baseline + one.arms[1]
            self._count(node, number, one)
            done.add(node)
        return online, baseline

    def _count(self, node: str, number: int, told: Told) -> None:
        if node not in self.accounts:
            if len(self.accounts) >= ACCOUNTS_MAX:
                return
            self.accounts[node] = Account(told.total - told.events)
        self.accounts[node].add(number, told)

    def _complete(self, newest: Mapping[str, int], number: int, now_ms: int) -> bool:
        """Whether every node that lately told of windows has told of this one or a later one; none is waited for too long."""
        wait_ms = self.lateness_ms + SETTLE_MS + self.stagger_ms
        due_ms = (number + 1) * self.window_ms + wait_ms
        if now_ms < due_ms:
            return False
        last_due = (now_ms - wait_ms) // self.window_ms - 1
        front = max(min(window, last_due) for window in newest.values())
        waited_for = [window for window in newest.values() if window >= front - SILENT_WINDOWS]
        return now_ms >= due_ms + WAIT_MS_MAX or all(window >= number for window in waited_for)

    def _observe(self, window: Window, verdicts: Verdicts, now_ms: int) -> Verdicts:
        found: list[tuple[str, Finding]] = []
        for detector in self.detectors:
            if detector.name in self.failed or (window.late and not getattr(detector, "takes_late", False)):
                continue
            try:
                found += [(detector.name, checked(finding, window)) for finding in detector.observe(window)]
            except Exception as error:  # noqa: BLE001 - a user's detector can fail in any way
                self.failed[detector.name] = repr(error)[:TEXT_BYTES_MAX]
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


def checked(finding: object, window: Window) -> Finding:
    """What a detector said, if it is something that can be said after this window.

    Raises:
        ModelError: it is not.
    """
    if not isinstance(finding, Finding) or finding.state not in SEVERITY or not isinstance(finding.text, str):
        raise ModelError(f"it said {finding!r}: expected a Finding that is one of {', '.join(SEVERITY)}")
    times = finding.from_ms, finding.until_ms
    if any(type(one) is not int for one in times) or finding.from_ms > finding.until_ms:
        raise ModelError(f"it said something from {times[0]!r} to {times[1]!r}: expected Unix milliseconds, in this order")
    if finding.until_ms > window.until_ms and not window.late:
        raise ModelError(f"it said something up to {times[1]}, of a window that ends at {window.until_ms}")
    return finding
