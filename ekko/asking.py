"""Asking a node of this machine over HTTP, as the commands do (`ekko.http` is what answers)."""

import json
import urllib.error
import urllib.request
from typing import Any

from ekko.addresses import split_host_port
from ekko.errors import ConfigError, EkkoError, NodeUnreachable

# Who is not there refuses at once; who is there may be busy, on a machine that is.
ANSWER_S_MAX = 30.0
ANSWER_BYTES_MAX = 64 << 20


def fetch_status(http: str) -> dict[str, Any]:
    """GET /status of the node at `HOST:PORT`.

    Raises:
        ConfigError: `http` is not HOST:PORT.
        NodeUnreachable: nobody answers there, or somebody who is no node of ekko.
    """
    return ask_node(http, "/status")


def ask_node(http: str, path: str, body: dict[str, object] | None = None) -> dict[str, Any]:
    """GET `path` of the node at `HOST:PORT`, or POST `body` to it.

    Raises:
        ConfigError: `http` is not HOST:PORT.
        EkkoError: the node refuses; its reason.
        NodeUnreachable: nobody answers there, or somebody who is no node of ekko.
    """
    data = None if body is None else json.dumps(body).encode()
    try:
        split_host_port(http)
    except ValueError as error:
        raise ConfigError(f"--http: {error}") from None
    try:
        # A proxy of the environment is for other hosts.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(f"http://{http}{path}", data, {"Content-Type": "application/json"})
        with opener.open(request, timeout=ANSWER_S_MAX) as response:
            answer = json.loads(response.read(ANSWER_BYTES_MAX))
    except urllib.error.HTTPError as error:
        raise _refused(http, error) from None
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise NodeUnreachable(
            f"no node answers at http://{http}: {reason}: start it, or check [node].http in its configuration"
        ) from None
    if not isinstance(answer, dict):
        raise NodeUnreachable(f"what answers at http://{http} is not a node of ekko")
    return answer


def _refused(http: str, error: urllib.error.HTTPError) -> EkkoError:
    try:
        return EkkoError(str(json.loads(error.read(ANSWER_BYTES_MAX))["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return NodeUnreachable(f"http://{http} answers {error.code} {error.reason}: is it a node of this version of ekko?")
