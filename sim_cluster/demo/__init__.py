"""The main job on real data: one trainer, three serving regions, and what fresh rows are worth.

`cli` is the command, `run` the order of events; `cluster` describes the nodes, `trainer` and `scorer` are the two kinds of
worker process, which meet on the `board`. `learning`, `scoring` and `history` are what live scoring and its replays share.
`evaluation` computes the figures, `report` and `plots` write them down, and `data` fetches the events.
"""
