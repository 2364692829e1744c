"""Values: frozen dataclasses that cost no more than others to make.

Python keeps a frozen dataclass from changing by refusing every assignment, so that its own constructor has to go round that,
field by field: an `Envelope` takes 2.1 us to make, and 0.3 without; a batch makes a dozen values at each node. That nobody
changes one is what the type checker sees to, which reads `dataclass` of this module as Python's own; the running program does
not look again. Hash and equality are those of a frozen one.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    import dataclasses

    def dataclass(*, frozen, slots, eq=True):
        """`dataclasses.dataclass` for what does not change, without the guard at run time."""
        assert frozen, "what changes is no value: it has Python's own"
        return dataclasses.dataclass(slots=slots, eq=eq, unsafe_hash=eq)
