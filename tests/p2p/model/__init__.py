"""An executable model of links in state mode (decision 0042): why a claim is true, with each part of the argument on a switch.

`rules` are the parts of the argument, `state_mode` is the model; `search` looks for the shortest walk to a false claim, and
`counterexamples` keeps what it found, as `walks` writes it down.
"""
