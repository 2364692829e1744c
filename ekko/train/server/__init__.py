"""The parameter server: rows with optimiser state, held by the overlay, changed by whoever is their partition's primary.

Think of a shop with several branches and one ledger that all of them copy. One branch at a time may write on a page; before
another one takes the page over, the first has let go of it, or was struck off for good. A customer has his receipt only when
every branch has copied the entry, so that no fire in one of them loses it.

What decides is pure: `primaries` (who may write on which page), `machine` (in what order, and when a receipt is given).
`wire` and `coding` are what workers and servers say to each other; `events` is what goes into the machine and comes out.
"""
