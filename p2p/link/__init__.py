"""One link to a peer: its sessions and credit, what it may use of the network, and the last steps out of a node."""
