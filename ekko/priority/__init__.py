"""How urgent the rows are that are published here: from what a publisher says to the class that a row carries (`p2p.classes`).

The paper's formula (section 5.2): p = (p_g + p_u) * p_m; significance of the update, freshness of the key, share of the model.
What it is above the k-th percentile of its model here is significant (`threshold`).
"""
