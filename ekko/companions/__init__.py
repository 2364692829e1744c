"""Companions: processes that a node starts beside itself, watches and stops with itself; a parameter server, and sinks.

The node's side is in `ekko.node`. Both are of one release: one starts the other.
"""
