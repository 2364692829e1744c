"""Which users of this machine may read a store: permissions and group of its files.

Readers map files read-only, so all they need is to read them, and to enter the folder of the manifest.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ekko.errors import StoreError

# Nobody but the node writes, and nothing is a program.
MODES: Final = {"0600": 0o600, "0640": 0o640, "0644": 0o644}


@dataclass(frozen=True, slots=True)
class Access:
    """What the files of a store are made with, whatever the umask says.

    Rows are the operator's data: by default readable by the group of the daemon, not by everybody.
    """

    mode: int = MODES["0640"]
    group: int | None = None  # id; None: the daemon's own

    @staticmethod
    def of(path: Path) -> "Access":
        """What a file has."""
        status = path.stat()
        return Access(status.st_mode & 0o7777, status.st_gid)

    def apply(self, descriptor: int, path: Path) -> None:
        """Give an open file its group and permissions.

        Raises:
            StoreError: we may not give files to this group.
        """
        if self.group is not None and os.fstat(descriptor).st_gid != self.group:
            try:
                os.fchown(descriptor, -1, self.group)
            except OSError as error:
                raise StoreError(
                    f"{path} cannot be given to group {self.group} ({error.strerror}): make the daemon's user a member of the "
                    "group that node.shm_group names"
                ) from error
        os.fchmod(descriptor, self.mode)

    def apply_to(self, path: Path) -> None:
        """The same to a file that is there."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.apply(descriptor, path)
        finally:
            os.close(descriptor)

    def open_folder(self, folder: Path) -> None:
        """Let those who may read the files pass through their folder. What they may do there already stays.

        Raises:
            StoreError: as `apply`.
        """
        enter = (self.mode & 0o044) >> 2
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if status.st_uid == os.geteuid() and (status.st_mode & enter != enter or self.group not in (None, status.st_gid)):
                Access(status.st_mode & 0o7777 | enter, self.group).apply(descriptor, folder)
        finally:
            os.close(descriptor)


DEFAULT_ACCESS: Final = Access()
