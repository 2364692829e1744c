"""The paper's pull-only protocol: its regular pulls, shard versions and leaders, as presets of the same machine."""
