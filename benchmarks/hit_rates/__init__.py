"""Hit rates of row caches on ids that go together: the traces, the ideal policies, and replays of real caches."""
