"""What the log of an older state may take; here, so that reading a configuration needs nothing that is compiled."""

from typing import Final

# Some minutes of what a node takes in that gets 50 MB of rows a second.
LOG_BYTES_DEFAULT: Final = 16_000_000_000
# Sixteen files of some steps each.
LOG_BYTES_MIN: Final = 64_000_000
