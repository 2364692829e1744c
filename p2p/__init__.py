"""Moves stamped rows between nodes; knows no model, table or tensor library.

Everything here except `runtime` and `transport` is pure: no sockets, no clock, no randomness of its own.
`docs/ARCHITECTURE.md` shows how the modules compose.
"""
