"""Runs many nodes on one machine: in virtual time, and as real processes."""
