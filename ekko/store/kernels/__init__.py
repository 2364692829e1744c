"""Loops over flat memory, compiled by Numba when they are imported. Nothing here knows a file or a process."""
