"""What else carries rows from one publisher to many replicas, as honest opponents for the benchmarks.

    raw_zmq          ZeroMQ PUB/SUB and a NumPy scatter by position: no keys to find, no versions, no checksum, no repair.
                     The limit of this machine
    redis_streams    one XADD a batch, of a blob; each replica reads the stream and scatters
    redis_mset_mget  MSET of every row by the publisher, MGET of the changed keys by each replica, as parameter servers on
                     Redis do
    nats             NATS core, a message a batch

All replicas are processes of their own with a table in their own memory. None may lose a batch in silence: the publisher is
held back while the slowest replica is `WINDOW` batches behind, by counters in shared memory that cost the opponents nothing,
and a round counts only when every replica has applied everything.
"""
