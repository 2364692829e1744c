"""Real nodes on one machine: each a process of its own, started, watched, killed and cleaned up after.

A `LocalCluster` writes a node.toml for each node and runs `ekko node` on it. Leaving its `with` block ends every process and
removes every file in shared memory, whatever happened inside; a child also dies with the process that started it (the kernel
sees to that), so that a killed test leaves no daemons behind.
"""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ekko.errors import EkkoError
from ekko.model import CODEC_DEFAULT
from ekko.store.manifest import MANIFEST_NAME, prefix_of

# Below the range from which the kernel takes ports for outgoing connections: none of those can take a port we chose.
PORT_FIRST: Final = 10_240
PORT_LAST: Final = 32_000
PORT_TRIES_MAX: Final = 1_000
GIVEN_MAX: Final = 256
# Ports in the order in which this process gave them, and what keeps them from all other processes: an open descriptor.
_given: Final[dict[int, int]] = {}

# All with a machine that is very busy, or stands still for seconds.
READY_S_MAX: Final = 120.0  # a cold kernel cache included
STOP_S_MAX: Final = 60.0
HTTP_S_MAX: Final = 30.0
POLL_S: Final = 0.02
LOG_TAIL_LINES: Final = 5
MEMORY_DIR: Final = Path("/dev/shm")  # noqa: S108 - the tmpfs that the nodes use

# Runs the arguments as a child that is killed when its parent ends. PR_SET_PDEATHSIG (1) survives exec; the parent may have
# ended before it was set. The kernel means the thread that started the child: start nodes from a thread that stays.
_LAUNCH: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this node is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class NodeProcessError(EkkoError):
    """A node did not start, did not stop or ended by itself; the message has the end of its log."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node is to be."""

    id: str
    region: str
    role: str = "serve"  # "train" | "serve" | "baseline" | "witness"
    hold: Mapping[str, Sequence[int]] = field(default_factory=dict)  # partitions of a model; not named: all of them
    settings: Mapping[str, str] = field(default_factory=dict)  # more of [node]
    device: Mapping[str, str | int] = field(default_factory=dict)  # [device]; empty: none


@dataclass(frozen=True, slots=True)
class ModelTables:
    """A model that nodes know from the start: tables name -> dim."""

    tables: Mapping[str, int]
    shards: int = 64
    capacity_rows: int = 100_000
    codec: str = CODEC_DEFAULT
    partitions: int = 1


@dataclass(frozen=True, slots=True)
class Delays:
    """Exact delays of applied batches, milliseconds; `next` is where the following call continues."""

    next: int
    delays_ms: list[float] = field(default_factory=list)


def free_ports(count: int, rng: random.Random | None = None) -> list[int]:
    """Different ports of the loopback interface on which nobody listens, and that no call before has given.

    Who is to listen on them may not have started yet, or starts again: they look free until then. So a port is given again, by
    this or any other process of the machine, only when this one has ended, or has given `GIVEN_MAX` others after it.
    """
    rng = rng or random.Random()
    ports: list[int] = []
    for _ in range(PORT_TRIES_MAX):
        if len(ports) == count:
            return ports
        port = rng.randint(PORT_FIRST, PORT_LAST)
        with socket.socket() as probe, socket.socket(socket.AF_UNIX) as claim, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            claim.bind(f"\0ekko-port-{port}")  # a name that is gone with the last process that has it open
            ports.append(port)
            _given[port] = claim.detach()
            if len(_given) > GIVEN_MAX:
                os.close(_given.pop(next(iter(_given))))
    raise NodeProcessError(f"no {count} free ports between {PORT_FIRST} and {PORT_LAST} on 127.0.0.1")


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> float:
    """Wait for `condition()` to hold; returns the seconds it took.

    Raises:
        TimeoutError: it did not hold in time; says `what` was waited for.
    """
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout_s:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(POLL_S)
    return time.monotonic() - begin


class NodeProcess:
    """One node: its folder, its addresses and, while it runs, its process."""

    def __init__(self, spec: NodeSpec, folder: Path, ports: Sequence[int]) -> None:
        peers, local, http_port = ports
        self.spec = spec
        self.folder = folder
        self.run_dir = folder / "run"
        self.config_path = folder / "node.toml"
        self.log_path = folder / "node.log"
        self.peers = f"tcp://127.0.0.1:{peers}"
        self.local = f"tcp://127.0.0.1:{local}"
        self.http = f"127.0.0.1:{http_port}"
        self.source: Path | None = None  # a folder with another release of ekko, which the next `start` runs instead of ours
        self.launcher: list[str] = []  # what its command begins with, such as one that puts it into another namespace
        self._http_port = http_port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """Of the living process.

        Raises:
            NodeProcessError: there is none.
        """
        if self._process is None or not self.running:
            raise NodeProcessError(f"node {self.id} is not running")
        return self._process.pid

    def write_config(self, seeds: Iterable[str], models: Mapping[str, ModelTables], delays_ms: Mapping[str, float]) -> None:
        """Write node.toml; `delays_ms`: "region/region" -> one-way delay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            "[node]",
            *(f"{key} = {json.dumps(value)}" for key, value in self._settings().items()),
            f"seeds = {json.dumps(list(seeds))}",
        ]
        for name, model in models.items():
            tables = ", ".join(f"{json.dumps(table)} = {dim}" for table, dim in model.tables.items())
            lines += [f"[models.{json.dumps(name)}]", f"shards = {model.shards}", f"tables = {{ {tables} }}"]
            lines += [f"capacity_rows = {model.capacity_rows}", f"codec = {json.dumps(model.codec)}"]
            hold = list(self.spec.hold[name]) if name in self.spec.hold else "all"
            lines += [f"partitions = {model.partitions}", f"hold = {json.dumps(hold)}"]
        if self.spec.device:
            lines += ["[device]", *(f"{key} = {json.dumps(value)}" for key, value in self.spec.device.items())]
        lines += ["[links]", *(f"{json.dumps(pair)} = {{ delay_ms = {delay} }}" for pair, delay in delays_ms.items())]
        self.config_path.write_text("\n".join(lines) + "\n")

    def _settings(self) -> dict[str, str]:
        return {
            "id": self.spec.id,
            "region": self.spec.region,
            "role": self.spec.role,
            "run_dir": str(self.run_dir),
            "peers": self.peers,
            "local": self.local,
            "http": self.http,
            **self.spec.settings,
        }

    def start(self) -> None:
        """Start the process; its output is appended to `log_path`. Returns at once."""
        if self.running:
            raise NodeProcessError(f"node {self.id} runs already")
        node = [sys.executable, "-m", "ekko.cli", "node", "--config", str(self.config_path)]
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *self.launcher, *node]
        place = None if self.source is None else {**os.environ, "PYTHONPATH": str(self.source)}
        with self.log_path.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for us, and we stop the nodes in order.
            self._process = subprocess.Popen(
                launch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.source,
                env=place,
            )

    def wait_ready(self, timeout_s: float = READY_S_MAX) -> float:
        """Wait until GET /readyz answers 200; returns the seconds it took.

        Raises:
            NodeProcessError: the process ended, or was not ready in time.
        """

        def ready() -> bool:
            if not self.running:
                raise NodeProcessError(f"node {self.id} ended before it was ready: {self.log_tail()}")
            with suppress(OSError, http.client.HTTPException):
                return self._get("/readyz")[0] == http.HTTPStatus.OK
            return False

        try:
            return wait_until(ready, f"node {self.id} ready", timeout_s)
        except TimeoutError as error:
            raise NodeProcessError(f"{error}: {self.log_tail()}") from None

    def kill(self) -> None:
        """SIGKILL, as a crash would be; returns when the process is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def pause(self) -> None:
        """SIGSTOP: alive, but it does nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def request_stop(self) -> None:
        """SIGTERM; does not wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)  # a paused process would not hear it
            self._process.terminate()

    def stop(self, timeout_s: float = STOP_S_MAX) -> int:
        """SIGTERM, and wait; returns the exit status (0: clean, also when it did not run).

        Raises:
            NodeProcessError: it did not end in time and was killed.
        """
        self.request_stop()
        if self._process is None:
            return 0
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise NodeProcessError(
                f"node {self.id} did not stop within {timeout_s:g} s and was killed: {self.log_tail()}"
            ) from None

    def status(self) -> dict[str, Any]:
        """GET /status.

        Raises:
            NodeProcessError: no answer.
        """
        answer: dict[str, Any] = json.loads(self._fetch("/status"))
        return answer

    def get(self, path: str) -> dict[str, Any]:
        """GET a path that answers with JSON.

        Raises:
            NodeProcessError: no answer.
        """
        answer: dict[str, Any] = json.loads(self._fetch(path))
        return answer

    def metrics(self) -> str:
        """GET /metrics, Prometheus text."""
        return self._fetch("/metrics").decode()

    def delays(self, since: int = 0) -> Delays:
        """Exact delays of the batches applied since the `since`-th (GET /delays)."""
        answer = json.loads(self._fetch(f"/delays?since={since}"))
        return Delays(int(answer["next"]), [float(delay) for delay in answer["delays_ms"]])

    def log_tail(self) -> str:
        """The last lines of the log, in one line."""
        lines = self.log_path.read_text(errors="replace").splitlines() if self.log_path.exists() else []
        return " | ".join(lines[-LOG_TAIL_LINES:]) or "its log is empty"

    def remove_memory(self, memory_dir: Path = MEMORY_DIR) -> None:
        """Remove what the node left in shared memory. It must not run."""
        # A baseline or witness has a second store, in a folder of the first one's.
        stores = {self.run_dir, *(manifest.parent for manifest in self.run_dir.glob(f"*/{MANIFEST_NAME}"))}
        for path in (path for store in stores for path in memory_dir.glob(f"{prefix_of(store)}-*")):
            path.unlink(missing_ok=True)

    def _fetch(self, path: str) -> bytes:
        try:
            status, body = self._get(path)
        except (OSError, http.client.HTTPException) as error:
            raise NodeProcessError(f"node {self.id} does not answer GET {path} at {self.http}: {error}") from None
        if status != http.HTTPStatus.OK:
            raise NodeProcessError(f"node {self.id} answers GET {path} with {status}: {body[:200].decode(errors='replace')}")
        return body

    def post(self, path: str, body: Mapping[str, object]) -> tuple[int, bytes]:
        """POST a command; status and body of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self._http_port, timeout=HTTP_S_MAX)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _get(self, path: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._http_port, timeout=HTTP_S_MAX)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


class LocalCluster:
    """Nodes on this machine, joined through the first training node. Use as a context manager.

    Args:
        folder: where each node gets a folder of its own (configuration, log, run_dir).
        nodes: what to run; the first with role "train" is the one that the others join.
        models: models that all nodes know from the start; publishers may bring more.
        delays_ms: emulated one-way delays, "region/region" -> milliseconds.
        make_node: what a node is made with, of its spec, its folder and its ports.
    """

    def __init__(
        self,
        folder: Path,
        nodes: Sequence[NodeSpec],
        *,
        models: Mapping[str, ModelTables] | None = None,
        delays_ms: Mapping[str, float] | None = None,
        make_node: Callable[[NodeSpec, Path, Sequence[int]], NodeProcess] = NodeProcess,
    ) -> None:
        ports = iter(free_ports(3 * len(nodes)))
        self.nodes: dict[str, NodeProcess] = {}
        for spec in nodes:
            if spec.id in self.nodes:
                raise NodeProcessError(f"two nodes are called {spec.id!r}")
            own = [next(ports), next(ports), next(ports)]
            self.nodes[spec.id] = make_node(spec, folder.absolute() / spec.id, own)
        founder = next((node for node in self.nodes.values() if node.spec.role == "train"), None)
        for node in self.nodes.values():
            seeds = [founder.peers] if founder is not None and founder is not node else []
            node.write_config(seeds, models or {}, delays_ms or {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __getitem__(self, node: str) -> NodeProcess:
        return self.nodes[node]

    def start(self, timeout_s: float = READY_S_MAX) -> None:
        """Start all nodes and wait until all are ready and each sees all others.

        Raises:
            NodeProcessError: one ended, or was not ready in time.
        """
        for node in self.nodes.values():
            node.start()
        for node in self.nodes.values():
            node.wait_ready(timeout_s)
        self.wait_members(timeout_s)

    def wait_members(self, timeout_s: float = READY_S_MAX) -> None:
        """Wait until every running node knows that every other one lives."""
        running = {node.id for node in self.nodes.values() if node.running}

        def all_known() -> bool:
            return all(running - {node} <= living(self.nodes[node].status()) for node in running)

        try:
            wait_until(all_known, "all nodes see each other", timeout_s)
        except TimeoutError as error:
            raise NodeProcessError(str(error)) from None

    def in_region(self, region: str) -> list[NodeProcess]:
        """The nodes of a region, in the order given."""
        return [node for node in self.nodes.values() if node.spec.region == region]

    def close(self) -> None:
        """Stop all nodes together, kill what does not stop, and remove their shared memory. Never raises for a node."""
        for node in self.nodes.values():
            node.request_stop()
        deadline = time.monotonic() + STOP_S_MAX
        for node in self.nodes.values():
            with suppress(NodeProcessError):
                node.stop(max(0.0, deadline - time.monotonic()))
            node.remove_memory()


def living(status: Mapping[str, Any]) -> set[str]:
    """From a node's /status: the ids of the members that live, as far as it can tell."""
    return {peer["node"] for peer in status["peers"] if peer["alive"]}
