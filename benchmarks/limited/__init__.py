"""Real nodes whose regions are joined by links of a given rate: network namespaces, or the nodes' own budget without them."""
