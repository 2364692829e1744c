"""Keys in files: this node's own, and the folder of those that may take part.

A key file is one line, `ekko-public-key Z85` or `ekko-secret-key Z85`; lines that begin with `#` are comments. The allow folder
has one public key a file, and the file's name says whose it is: `eu-1.pub`, or `eu-1@ANYTHING.pub` where a node has more than
one, while a key is being replaced. Both are looked at every `WATCH_S`; a change needs no restart. A file that is wrong is left
out and reported; a folder or a key file that cannot be read at all leaves things as they were.

Tools that deploy a folder may empty it, or truncate a file, before they write it anew. So a key whose file is there and wrong,
and all keys of a folder in which there is none any more, stay allowed for `GRACE_LOOKS`; what is gone while others are there is
gone at once.
"""

import os
import re
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.utils import z85

from ekko.errors import ConfigError
from p2p.transport.curve import KeyPair

PUBLIC_SUFFIX = ".pub"
PUBLIC_WORD, SECRET_WORD = "ekko-public-key", "ekko-secret-key"
KEY_FILE_BYTES_MAX = 4_096  # one line and comments
KEYS_MAX = 8_192  # as many as there can be members, twice over for replacements
SECRET_MODE = 0o600
WATCH_S = 1.0  # a change of key files takes effect within this, and the moment that reading takes
# A deployment that takes longer than so many looks has failed, or the keys are meant to be gone.
GRACE_LOOKS = 60
PROBLEMS_MAX = 16  # told at once; more are of the same kind

_LINE = re.compile(rf"({PUBLIC_WORD}|{SECRET_WORD})[ \t]+(\S{{40}})")

Signature = tuple[int, int, int]  # modification time, size, inode
Files = dict[str, tuple[Signature, str | None]]  # file name -> the public key in it, None for a wrong one
_LOST = "there is no key in it any more, or no file with a key in the whole folder"
_UNREADABLE: tuple[Signature, str | None] = ((0, 0, 0), None)


@dataclass(frozen=True, slots=True)
class KeyChange:
    """What a look at the files found."""

    renewed: bool = False  # our own key is another one
    added: tuple[str, ...] = ()  # names of files
    removed: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()  # lines for the log

    def __bool__(self) -> bool:
        return bool(self.renewed or self.added or self.removed or self.problems)


class NodeKeys:
    """This node's key and those of the members; fulfils `p2p.transport.curve.Keys`.

    Args:
        node: our own id; our own key is always among the allowed ones.
        key_file: our secret key.
        allow: folder of public keys.
        node_at: the node that peers dial at an address, where it is known.
    """

    def __init__(self, node: str, key_file: Path, allow: Path, node_at: Callable[[str], str | None] = lambda _: None) -> None:
        self.node_at = node_at
        self._node = node
        self._key_file = key_file
        self._allow = allow
        self._own = read_secret(key_file)
        self._own_signature = _signature(key_file.stat())
        self._files: Files = {}
        self._owners: dict[str, str] = {}  # public key -> node
        self._told: frozenset[str] = frozenset()
        self._lost: dict[str, int] = {}  # file name -> looks since its key could be read last, while it stays allowed
        self.kept = 0  # looks in which keys stayed allowed that could not be read
        try:
            self._install(self._read_folder())
        except OSError as error:
            raise ConfigError(
                f"security.allow: {allow} cannot be read: {error.strerror}: make this folder of public keys"
            ) from None

    @property
    def own(self) -> KeyPair:
        return self._own

    def owner(self, public: str) -> str | None:
        return self._owners.get(public)

    def candidates(self, address: str) -> Sequence[str]:
        node = self.node_at(address)
        return sorted((key for key in self._owners if key != self._own.public), key=lambda key: self._owners[key] != node)

    def look(self) -> "Look":
        """Read what has changed. Blocks; from any thread. Hand the result to `adopt`."""
        problems: list[str] = []
        own: tuple[KeyPair, Signature] | None = None
        files: Files | None = None
        try:
            signature = _signature(self._key_file.stat())
            if signature != self._own_signature:
                own = read_secret(self._key_file), signature
        except (OSError, ConfigError) as error:
            problems.append(f"{self._key_file}: {error}: the key of before stays in use")
        try:
            files = self._read_folder()
        except OSError as error:
            problems.append(f"{self._allow}: {error.strerror}: the keys of before stay allowed")
        return Look(own, files, tuple(problems))

    def adopt(self, look: "Look") -> KeyChange:
        """Put what `look` found into use. On the thread that uses the keys."""
        renewed = look.own is not None and look.own[0] != self._own
        if look.own is not None:
            self._own, self._own_signature = look.own
        before = {name: key for name, (_, key) in self._files.items() if key is not None}
        self._install(self._files if look.files is None else self._with_lost(look.files))
        after = {name: key for name, (_, key) in self._files.items() if key is not None}
        problems = (
            *look.problems,
            *(f"{name}: not a public key of a node: ignored" for name in self._wrong()),
            *(f"{name}: {_LOST}: its key stays allowed for {GRACE_LOOKS * WATCH_S:.0f} s" for name in self._lost),
        )
        new = frozenset(problems) - self._told
        self._told = frozenset(problems)
        return KeyChange(
            renewed,
            tuple(sorted(name for name in after if before.get(name) != after[name])),
            tuple(sorted(name for name in before if before[name] != after.get(name))),
            tuple(sorted(new)[:PROBLEMS_MAX]),
        )

    def _with_lost(self, files: Files) -> Files:
        """These files, and of those that were read before and may be on their way back what they were."""
        none_left = all(key is None for _, key in files.values())
        lost = {
            name: self._lost.get(name, 0) + 1
            for name, (_, key) in self._files.items()
            if key is not None and (none_left or name in files) and files.get(name, _UNREADABLE)[1] is None
        }
        self._lost = {name: looks for name, looks in lost.items() if looks <= GRACE_LOOKS}
        self.kept += bool(self._lost)
        # Under no signature: a file that is back is read again.
        return files | {name: ((0, 0, 0), self._files[name][1]) for name in self._lost}

    def _wrong(self) -> list[str]:
        return [name for name, (_, key) in self._files.items() if key is None]

    def _install(self, files: Files) -> None:
        self._files = files
        owners = {key: owner_of(name) for name, (_, key) in files.items() if key is not None}
        self._owners = {**owners, self._own.public: self._node}

    def _read_folder(self) -> Files:
        """Every public key file by name; unchanged ones are not opened.

        Raises:
            OSError: the folder cannot be read.
        """
        with os.scandir(self._allow) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(PUBLIC_SUFFIX))[:KEYS_MAX]
        found: Files = {}
        for name in names:
            path = self._allow / name
            try:
                signature = _signature(path.stat())
                known = self._files.get(name)
                found[name] = known if known is not None and known[0] == signature else (signature, read_public(path))
            except FileNotFoundError:
                continue  # removed just now
            except (OSError, ConfigError):
                found[name] = _UNREADABLE
        return found


@dataclass(frozen=True, slots=True)
class Look:
    """What `NodeKeys.look` read: None where nothing changed, or nothing could be read."""

    own: tuple[KeyPair, Signature] | None
    files: Files | None
    problems: tuple[str, ...]


def owner_of(name: str) -> str:
    """Whose key the file `name` of an allow folder holds: all before `@`, or before the suffix."""
    return name.removesuffix(PUBLIC_SUFFIX).partition("@")[0]


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_key(path: Path, word: str) -> str:
    """The key in the file.

    Raises:
        ConfigError: it is not a key file of this kind.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        text = file.read(KEY_FILE_BYTES_MAX + 1).decode("ascii", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    match = _LINE.fullmatch(lines[0]) if len(lines) == 1 and len(text) <= KEY_FILE_BYTES_MAX else None
    if match is None or match[1] != word:
        raise ConfigError(f"{path}: expected one line `{word} ...`, as `ekko keygen` writes it")
    try:
        z85.decode(match[2].encode())
    except (ValueError, LookupError, struct.error):  # a wrong length, letter, or number: one kind of mistake to us
        raise ConfigError(f"{path}: not a key: make one with `ekko keygen`") from None
    return match[2]


def read_public(path: Path) -> str:
    """The public key in a file.

    Raises:
        ConfigError: it is something else.
        OSError: it cannot be read.
    """
    return _read_key(path, PUBLIC_WORD)


def read_secret(path: Path) -> KeyPair:
    """The pair of the secret key in a file.

    Raises:
        ConfigError: it is something else, cannot be read, or others than its owner and group can read it.
    """
    try:
        if path.stat().st_mode & (stat.S_IRWXO | stat.S_IWGRP):
            raise ConfigError(f"security.key_file: {path} is open to others: run `chmod 600 {path}`")
        secret = _read_key(path, SECRET_WORD)
        return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    except OSError as error:
        raise ConfigError(f"security.key_file: {path} cannot be read: {error.strerror}: make it with `ekko keygen`") from None
    except zmq.ZMQError:
        raise ConfigError(f"security.key_file: {path}: not a key: make one with `ekko keygen`") from None


def generate(path: Path) -> Path:
    """Write a new secret key to `path` and its public key beside it; returns the path of the latter.

    Raises:
        ConfigError: one of the files exists, or cannot be written.
    """
    public_path = path.with_name((path.name.removesuffix(".key") or path.name) + PUBLIC_SUFFIX)
    public, secret = (key.decode() for key in zmq.curve_keypair())
    if public_path.exists():
        raise ConfigError(f"{public_path} exists: move it away, or choose another name")
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, SECRET_MODE)
        with open(descriptor, "w", encoding="ascii") as file:  # noqa: PTH123 - a descriptor, so that the mode is there first
            file.write(f"# Keep this on its machine, readable by the node alone.\n{SECRET_WORD} {secret}\n")
        public_path.write_text(f"# Copy this into the allow folder of every node.\n{PUBLIC_WORD} {public}\n", encoding="ascii")
    except FileExistsError:
        raise ConfigError(f"{path} exists: a key is never overwritten; move it away, or choose another name") from None
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be written: {error.strerror}") from None
    return public_path
