"""Benchmarks, each a module with `run(quick)`; `scripts/bench NAME` runs one. Their quick sizes run under test."""
