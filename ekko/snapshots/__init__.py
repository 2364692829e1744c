"""Snapshots: what a node holds, on disk or in an object store, so that it outlives the machine.

A snapshot is written by a process of its own while the daemon goes on writing: the vector first, then the rows, then the loss
floor (theorem T5 of the protocol). Whatever it missed is newer than its vector and is pulled again. In the order in which a
reader needs them: `format` (what is in a snapshot), `folders` (where it lies), `write`, `catalog` (which there are, and which
are removed), `load`, `service` (the daemon's side).
"""
