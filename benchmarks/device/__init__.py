"""What `scripts/bench gpu` measures: on a device, on the host twin, and on paper."""
