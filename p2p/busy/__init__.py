"""Where the network is busy: rows that are due to a child by class instead of batches in order."""
