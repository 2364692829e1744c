"""The training side: what hands changed rows to the local node."""
