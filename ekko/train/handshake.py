"""Why no connection to a server comes about, as ZeroMQ tells of its handshakes."""

import itertools
from typing import Final, NamedTuple

import zmq
from zmq.utils.monitor import parse_monitor_message

# Each failure is told once a reconnect; a worker that is not called takes none of them meanwhile, and they are small.
_UNLIMITED: Final = 0
_EVENTS: Final = (
    zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_NUMBERS: Final = itertools.count()  # an address is free again some time after it was closed


class Refusal(NamedTuple):
    """Why there is no connection. `final`: nor will there be one before somebody changes something."""

    reason: str
    final: bool


STRANGER: Final = Refusal("it does not know this worker's key: put its public key into the folder [security].allow there", True)
NO_KEYS: Final = Refusal("it uses no keys: leave out key_file and allow, or give it [security]", True)
KEYS: Final = Refusal("it lets in only who has a key: pass key_file and allow", True)
OTHER_KEY: Final = Refusal("it has none of the keys in the folder `allow`, or went away", False)


class Handshake:
    """Follows those of one socket, which connects to one endpoint. Made before it connects."""

    def __init__(self, watched: "zmq.Socket[bytes]", *, with_keys: bool) -> None:
        self._watched = watched
        self._with_keys = with_keys
        self._last = 0
        address = f"inproc://handshake-{next(_NUMBERS)}"
        watched.monitor(address, _EVENTS)
        self._socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self._socket.set(zmq.RCVHWM, _UNLIMITED)  # ZeroMQ's thread would wait for room
        self._socket.connect(address)

    @property
    def refusal(self) -> Refusal | None:
        """How the last one failed; None: it did not, or there was none."""
        while self._socket.poll(0):
            self._last = int(parse_monitor_message(self._socket.recv_multipart())["event"])
        match self._last:
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                return STRANGER
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                return NO_KEYS if self._with_keys else KEYS
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if self._with_keys:
                return OTHER_KEY
        return None

    def close(self) -> None:
        """Before the socket is."""
        self._watched.disable_monitor()
        self._socket.close(0)
