"""The demo's second chapter: a feed goes bad in mid-stream, and the model is taken back.

`faults` says what can go wrong with a feed, `plan` when it does, `replay` what would become of the model if nobody looked.
"""
