"""What a node says over HTTP: is it alive, is it ready, what it knows, and its metrics.

`/healthz` answers as soon as the process runs, `/readyz` says 200 once the node serves, `/status` is JSON for people and
tools, `/metrics` is for Prometheus, `/delays?since=N` has the exact delay of every applied batch since the N-th,
`/hot?model=NAME` what readers ask for most. The server runs on the node's own event loop: what it reads is never half-
changed, and whatever takes long here holds up the node, so every answer is bounded. Only `POST` changes anything, and only for
callers on this machine.
"""

import asyncio
import contextlib
import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ekko.addresses import is_loopback
from ekko.errors import ConfigError, EkkoError, ModelError
from ekko.health.traffic import ONLINE
from ekko.health.verdicts import State
from ekko.health.wire import REPORT_EVENTS_MAX, Report, Reported, events_of
from ekko.loading import LoadRequest
from ekko.model import check_name
from ekko.rates import Word, parse_pair, parse_word
from ekko.rollback.request import RollbackRequest, rollback_request

# Requests at once; scrapers and scripts, on loopback.
REQUESTS_MAX = 64
BACKLOG = 64
KEEP_ALIVE_S = 30
SHUTDOWN_S_MAX = 1
# What the commands of an operator expect.
COMMANDS = {
    "/expel": '{"node": NODE}',
    "/snapshot": '{"kind": "auto"} or {"kind": "full"}',
    "/load": '{"model": NAME, "file": PATH, "tables": {TENSOR: TABLE}, "codec": CODEC or null}, and "keys": {TABLE: KEYS}',
    "/alias": '{"alias": NAME, "model": MODEL}, or "model": null and one of "back": true, "remove": true; and "force": true',
    "/fence": '{"model": MODEL}, and "epoch": NUMBER, "note": TEXT, "expel_after_ms": NUMBER or null',
    "/lift": '{"model": MODEL}, and "epoch": NUMBER',
    "/rate": '{"pair": "REGION/REGION", "rate": MBPS, "none" or "configured", as text}',
    "/health": '{"model": MODEL, "state": "healthy" or "uncertain" or "corrupted", "from_ms": UNIX_MS or null, "why": TEXT}',
    "/report": '{"model": MODEL, "prediction": [...], "label": [...]}, and "weight", "segment", "arm", "at_ms": one or a list',
    "/drop": '{"model": MODEL or "MODEL/TABLE"}, and "force": true',
    "/rollback": '{"model": MODEL, "to_ms": UNIX_MS or 0, "tables": [NAME], "writer": NODE, "keys": ["A", "B"] or null}, and '
    '"dry_run": true, "force": true; or {"model": MODEL, "finish": true}',
}


class Source(Protocol):
    """Where the answers come from. Called on the event loop; must not block."""

    def waiting_for(self) -> list[str]:
        """What the node still waits for before it is ready; empty: ready."""

    def status(self) -> dict[str, object]:
        """The node as JSON."""

    def expel(self, node: str) -> dict[str, object]:
        """Expel a member for good.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    def snapshot(self, kind: Literal["auto", "full"]) -> dict[str, object]:
        """Take a snapshot now; returns what is to be said of snapshots before it.

        Raises:
            EkkoError: why not.
        """

    def load(self, request: LoadRequest) -> dict[str, object]:
        """Begin to load a file; returns what is to be said of loads before it.

        Raises:
            EkkoError: why not.
        """

    async def alias(self, name: str, model: str | None, *, back: bool, remove: bool, force: bool) -> dict[str, object]:
        """Switch an alias; may wait for others to catch up (`ekko.operations.CATCH_UP_MS`).

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    async def fence(self, model: str, epoch: int, note: str, expel_after_ms: int | None) -> dict[str, object]:
        """Stop the writers of a model; may wait a few seconds until all have stopped.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    async def lift(self, model: str, epoch: int) -> dict[str, object]:
        """Let the writers of a model go on.

        Raises:
            EkkoError: it is not fenced.
        """

    def rate(self, pair: str, word: Word) -> dict[str, object]:
        """Let updates between two regions use so much from now on.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    def drop(self, what: str, *, force: bool) -> dict[str, object]:
        """Drop a model on all nodes.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    def overrule(self, model: str, state: State, from_ms: int | None, text: str) -> dict[str, object]:
        """Say that a model was in another state than was found.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    def report(self, report: Report) -> Reported:
        """Take a scorer's events.

        Raises:
            EkkoError: why not.
        """

    def rollback(self, request: RollbackRequest) -> dict[str, object]:
        """Ask for a rollback; returns what all nodes are told of it.

        Raises:
            EkkoError: why it cannot be; nothing is changed.
        """

    def finish_rollback(self, model: str) -> dict[str, object]:
        """Let writers go on without a healthy verdict.

        Raises:
            EkkoError: nothing waits for one here.
        """

    def rollbacks(self, model: str | None, epoch: int | None) -> dict[str, object]:
        """What was taken back and is, of a model or of all; or what became of one request."""

    def rows_at_risk(self, epoch: int) -> dict[str, object]:
        """Which good rows went with the bad ones when that was taken back.

        Raises:
            EkkoError: this is not known here.
        """

    def metrics_text(self) -> bytes:
        """The node in Prometheus' text format."""

    def hot(self, model: str, table: str | None, count: int) -> dict[str, object]:
        """What readers ask for most.

        Raises:
            EkkoError: there is no such model or table.
        """

    def delays(self, since: int) -> dict[str, object]:
        """Exact delays of applied batches, from the `since`-th on."""


def make_app(source: Source) -> Starlette:
    """The routes over `source`."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(_: Request) -> Response:
        waiting_for = source.waiting_for()
        return JSONResponse({"ready": not waiting_for, "waiting_for": waiting_for}, 503 if waiting_for else 200)

    async def status(_: Request) -> Response:
        return Response(json.dumps(source.status()), media_type="application/json")

    async def command(request: Request) -> Response:
        """Something that an operator wants changed."""
        name = request.url.path
        if (refusal := _refusal(request)) is not None:
            return refusal
        try:
            body = json.loads(await request.body())
        except ValueError:
            body = None
        try:
            answer = await _carry_out(source, name, body)
        except EkkoError as error:
            return JSONResponse({"error": str(error)}, 409)
        return JSONResponse({"error": f"expected {COMMANDS[name]}"}, 400) if answer is None else JSONResponse(answer)

    async def metrics(_: Request) -> Response:
        return Response(source.metrics_text(), media_type=CONTENT_TYPE_LATEST)

    async def delays(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not since.isdecimal() or len(since) > 18:
            return JSONResponse({"error": f"since is {since!r}: expected a whole number"}, 400)
        return Response(json.dumps(source.delays(int(since))), media_type="application/json")

    async def hot(request: Request) -> Response:
        ask, count = request.query_params, request.query_params.get("count", "20")
        if "model" not in ask or not count.isdecimal() or len(count) > 9:
            return JSONResponse({"error": "expected model=NAME, and optionally table=NAME and count=N"}, 400)
        try:
            return JSONResponse(source.hot(ask["model"], ask.get("table"), int(count)))
        except EkkoError as error:
            return JSONResponse({"error": str(error)}, 404)

    async def rollbacks(request: Request) -> Response:
        ask, epoch = request.query_params, request.query_params.get("epoch")
        if epoch is not None and not re.fullmatch("[0-9a-f]{1,16}", epoch):
            return JSONResponse({"error": f"epoch is {epoch!r}: expected 1 to 16 hexadecimal digits"}, 400)
        try:
            if epoch is not None and "at_risk" in ask:
                return JSONResponse(source.rows_at_risk(int(epoch, 16)))
            return JSONResponse(source.rollbacks(ask.get("model"), None if epoch is None else int(epoch, 16)))
        except EkkoError as error:
            return JSONResponse({"error": str(error)}, 404)

    handlers = {"/healthz": healthz, "/readyz": readyz, "/status": status, "/metrics": metrics, "/hot": hot, "/delays": delays}
    routes = [Route(path, handler) for path, handler in (handlers | {"/rollback": rollbacks}).items()]
    return Starlette(routes=[*routes, *(Route(path, command, methods=["POST"]) for path in COMMANDS)])


async def _carry_out(source: Source, name: str, body: Any) -> dict[str, object] | None:
    """What an operator wants changed, and the answer; None: that is not what is expected there."""
    match name, body:
        case "/expel", {"node": str(node)}:
            return source.expel(node)
        case "/snapshot", {"kind": "auto" | "full" as kind}:
            return source.snapshot(kind)
        case "/load", {
            "model": str(model),
            "file": str(file),
            "tables": dict(tables),
            "codec": None | str() as codec,
        } if isinstance(keys := body.get("keys", {}), dict):
            chosen = {str(tensor): str(table) for tensor, table in tables.items()}
            where = {str(table): str(place) for table, place in keys.items()}
            return source.load(LoadRequest(check_name("model", model), Path(file), chosen, codec, where))
        case "/fence" | "/lift", {"model": str(model)}:
            epoch, note, expel_after_ms = body.get("epoch", 0), body.get("note", ""), body.get("expel_after_ms")
            numbers = all(type(one) is int and 0 <= one < 1 << 63 for one in (epoch, expel_after_ms or 0))
            if not numbers or not isinstance(note, str):
                return None
            return await (source.fence(model, epoch, note, expel_after_ms) if name == "/fence" else source.lift(model, epoch))
        case "/rate", {"pair": str(pair), "rate": str(rate)}:
            return source.rate(parse_pair(pair), parse_word(rate))
        case "/drop", {"model": str(model)} if (flags := _flags(body, "force")) is not None:
            return source.drop(model, force=flags["force"])
        case "/health", {"model": str(model), "state": "healthy" | "uncertain" | "corrupted" as state, "why": str(why)} if (
            from_ms := body.get("from_ms")
        ) is None or type(from_ms) is int:
            return source.overrule(model, state, from_ms, why)
        case "/report", {"model": str(), "prediction": list(prediction), "label": list()} if (
            0 < len(prediction) <= REPORT_EVENTS_MAX
        ):
            return _report(source, body)
        case "/rollback", {"model": str(model), "finish": True}:
            return source.finish_rollback(check_name("model", model))
        case "/rollback", dict() if (wanted := rollback_request(body)) is not None:
            return source.rollback(wanted)
        case "/alias", {"alias": str(alias), "model": None | str() as target} if (
            flags := _flags(body, "back", "remove", "force")
        ) is not None and (target is not None) + flags["back"] + flags["remove"] == 1:
            return await source.alias(alias, target, **flags)
    return None


def _report(source: Source, body: dict[str, Any]) -> dict[str, object]:
    """A scorer's events as JSON, for those that speak nothing else."""
    at_ms = body.get("at_ms", time.time_ns() // 1_000_000)
    arm, weight, segment = body.get("arm", ONLINE), body.get("weight"), body.get("segment")
    try:
        parts = [*events_of(body["prediction"], body["label"], weight, segment, arm, at_ms)]
    except (TypeError, ValueError) as error:  # a list of lists, or words where numbers are expected
        raise ModelError(f"a report that makes no sense: {error}") from None
    answers = [source.report(Report(body["model"], events)) for events in parts]
    return {name: sum(getattr(one, name) for one in answers) for name in ("taken", "late", "ahead")}


def _refusal(request: Request) -> Response | None:
    """The answer to a request that may change nothing here; None: it may."""
    if request.client is None or not is_loopback(request.client.host):
        return JSONResponse({"error": "only from the node's own machine: log in there, and call `ekko`"}, 403)
    # A web page in somebody's browser cannot send this type without asking us first, which we do not answer.
    if request.headers.get("content-type") != "application/json":
        return JSONResponse({"error": "expected content of type application/json"}, 415)
    return None


def _load_request(body: dict[str, Any]) -> LoadRequest:
    tables, keys = ({str(of): str(to) for of, to in body.get(name, {}).items()} for name in ("tables", "keys"))
    return LoadRequest(check_name("model", body["model"]), Path(body["file"]), tables, body["codec"], keys)


def _flags(body: Mapping[str, object], *names: str) -> dict[str, bool] | None:
    """What is true of these; None where one is neither true nor false."""
    flags = {name: flag for name in names if isinstance(flag := body.get(name, False), bool)}
    return flags if len(flags) == len(names) else None


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the node, not to its HTTP server."""
        yield


class HttpServer:
    """A bound HTTP server, from the constructor to the end of `serve`."""

    def __init__(self, source: Source, host: str, port: int) -> None:
        """Bind.

        Raises:
            ConfigError: the address is taken or not of this machine.
        """
        self._app = make_app(source)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise ConfigError(
                f"node.http: cannot listen on {host}:{port}: {error.strerror}: stop what listens there, or choose another port"
            ) from None

    async def serve(self) -> None:
        """Serve until cancelled; open requests get `SHUTDOWN_S_MAX` to finish."""
        config = uvicorn.Config(
            self._app,
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            limit_concurrency=REQUESTS_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=SHUTDOWN_S_MAX,
        )
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[self._socket]))
        try:
            await asyncio.shield(serving)
        except asyncio.CancelledError:
            server.should_exit = True
            await serving
            raise

    def close(self) -> None:
        """Give the port back, where `serve` was never called."""
        self._socket.close()
