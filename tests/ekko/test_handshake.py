"""Sockets that come and go each follow their own handshakes."""

import zmq

from ekko.train.handshake import KEYS, NO_KEYS, Handshake
from p2p.transport.curve import KeyPair, demand, guard
from sim_cluster.processes import wait_until
from tests.everywhere import PATIENCE_S


def key_pair() -> KeyPair:
    return KeyPair(*(key.decode() for key in zmq.curve_keypair()))


def test_why_there_is_no_connection_is_told_by_the_handshake() -> None:
    server, client = key_pair(), key_pair()
    with zmq.Context() as context, context.socket(zmq.ROUTER) as plain, context.socket(zmq.ROUTER) as guarded:
        guard(guarded, server)
        ports = [listener.bind_to_random_port("tcp://127.0.0.1") for listener in (plain, guarded)]
        for listens_with_keys, has_keys, expected in ((False, True, NO_KEYS), (True, False, KEYS), (False, False, None)):
            with context.socket(zmq.DEALER) as dealer:
                dealer.set(zmq.LINGER, 0)
                if has_keys:
                    demand(dealer, client, server.public)
                handshake = Handshake(dealer, with_keys=has_keys)
                dealer.connect(f"tcp://127.0.0.1:{ports[listens_with_keys]}")
                if expected is None:
                    dealer.send(b"hello")
                    assert plain.poll(int(PATIENCE_S * 1000))
                    assert handshake.refusal is None
                else:
                    wait_until(lambda h=handshake, e=expected: h.refusal == e, "the handshake to fail", PATIENCE_S)  # type: ignore[misc]
                handshake.close()


def test_many_sockets_one_after_the_other() -> None:
    with zmq.Context() as context:
        for _ in range(300):
            with context.socket(zmq.DEALER) as dealer:
                Handshake(dealer, with_keys=False).close()
