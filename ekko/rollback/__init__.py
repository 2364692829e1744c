"""Taking back what hurt: a model goes back to how it was at a moment at which it was healthy (paper, section 5.3.2; R13, R15).

`machine.py` decides, without I/O or clock; `performer.py` does what it decides, for the daemon and for the simulator alike;
`facts.py` is what all nodes know of it. `docs/reference/rollback.md` is the operator's side.
"""
