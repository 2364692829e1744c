"""Kernel sources (`*.cu`, `*.cuh`) and their launchers. One source runs on a device and, by `gpu.twin`, on the host."""
