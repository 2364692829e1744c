"""A second, older state of a node's models, and the log of what came since: how a node can serve, or give back, what was.

`store.DelayedStore` is what others use. `log.py` keeps what arrives, in files of `records.py`; `history.py` says of which
moments the state is known exactly; `comparing.py` begins anew where a part of the log is lost; `limits.py` is for
configurations.
"""
