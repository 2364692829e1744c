"""`python -m ekko.device RUN_DIR`: are the rows on the device those of the store? Ends with 1 if not."""

import sys
from pathlib import Path

from ekko.device.check import check_caches
from ekko.errors import EkkoError
from gpu.errors import DeviceError


def main(arguments: list[str]) -> int:
    """Compare, and say what was found."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m ekko.device RUN_DIR\n")
        return 2
    try:
        checks = check_caches(Path(arguments[0]))
    except (EkkoError, DeviceError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for check in checks:
        sys.stdout.write(f"{check.model}/{check.table}: {check.rows} rows, {check.difference or 'as in the store'}\n")
    return int(any(check.difference for check in checks))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
