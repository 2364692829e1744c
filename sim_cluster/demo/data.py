"""The demo's events: MovieLens-100K in time order, or a synthetic stream where that cannot be had.

MovieLens-100K (GroupLens; Harper and Konstan, "The MovieLens Datasets", 2015) comes out of the wheel of a Python package that
ships it as its example data, so that the demo needs nothing beyond the package index it was itself installed from. Each file
is checked against its SHA-256 and kept in the user's cache folder; it is never part of this repository.

An event is one rating: ids of the user, the film, its genres and the user's occupation, three dense features (age, gender,
release year), and the label "rated 4 or better".
"""

import argparse
import csv
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer
from numpy.typing import ArrayLike, NDArray

REQUIREMENT = "recbole==1.2.1"
MEMBERS = {  # file -> SHA-256
    "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
    "ml-100k.user": "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972",
}
FOLDER_IN_WHEEL = "recbole/dataset_example/ml-100k"
MEMBER_BYTES_MAX = 16 << 20  # the largest of them has 2 MB; a wheel that claims more is not the one we know
DOWNLOAD_TIMEOUT_S = 120
POSITIVE_RATING = 4.0

SYNTHETIC_EVENTS = 100_000  # as many events, users and items as the real data has, so that sizes and times carry over
SYNTHETIC_USERS = 950
SYNTHETIC_ITEMS = 1_700
SYNTHETIC_SESSION = 55  # mean events in a row by one user; MovieLens users too rate in one go
LATENT = 6


class DataUnavailableError(Exception):
    """MovieLens cannot be had here; the message says why, in one line."""


@dataclass(frozen=True, slots=True, eq=False)
class Events:
    """Labelled events in time order.

    Args:
        name: the data set, for people.
        note: why this is not the real data; empty when it is.
        rows: id feature -> how many different ids it has.
        ids: id feature -> int64[n], each in [0, rows).
        dense: float32[n, d], roughly in [-2, 2].
        labels: float32[n], 0 or 1.
    """

    name: str
    note: str
    rows: Mapping[str, int]
    ids: Mapping[str, NDArray[np.int64]]
    dense: NDArray[np.float32]
    labels: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def synthetic(self) -> bool:
        """Whether the events were made up."""
        return bool(self.note)

    def first(self, count: int) -> "Events":
        """The first `count` of them; views."""
        ids = {name: column[:count] for name, column in self.ids.items()}
        return replace(self, ids=ids, dense=self.dense[:count], labels=self.labels[:count])

    def save(self, path: Path) -> None:
        """Write everything to one `.npz` file."""
        columns: dict[str, ArrayLike] = {f"ids.{name}": ids for name, ids in self.ids.items()}
        columns |= {f"rows.{name}": count for name, count in self.rows.items()}
        columns |= {"name": self.name, "note": self.note, "dense": self.dense, "labels": self.labels}
        np.savez(path, allow_pickle=False, **columns)

    @classmethod
    def load(cls, path: Path) -> "Events":
        """Read what `save` wrote."""
        with np.load(path) as saved:
            features = [key.removeprefix("rows.") for key in saved if key.startswith("rows.")]
            return cls(
                name=str(saved["name"]),
                note=str(saved["note"]),
                rows={feature: int(saved[f"rows.{feature}"]) for feature in features},
                ids={feature: saved[f"ids.{feature}"] for feature in features},
                dense=saved["dense"],
                labels=saved["labels"],
            )


def load(*, synthetic: bool = False, seed: int = 0) -> Events:
    """MovieLens from the cache or the package index; else, or where `synthetic` asks for it, generated events."""
    if synthetic:
        return generate(seed, "asked for on the command line")
    try:
        folder = fetch()
    except DataUnavailableError as error:
        return generate(seed, f"MovieLens-100K cannot be had: {error}")
    return parse({name: (folder / name).read_text(encoding="utf-8") for name in MEMBERS})


def cache_folder() -> Path:
    """Where the files are kept: `$XDG_CACHE_HOME/ekko/ml-100k`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ekko" / "ml-100k"


def fetch(wheel: Path | None = None) -> Path:
    """Put the checked files into the cache, unless they are there already; returns their folder.

    Args:
        wheel: take them out of this file rather than download it.

    Raises:
        DataUnavailableError: no network, no such file, or contents that are not the ones we know. The cache is unchanged.
    """
    folder = cache_folder()
    if wheel is None and all(_matches(folder / name, digest) for name, digest in MEMBERS.items()):
        return folder
    with tempfile.TemporaryDirectory(prefix="ekko-data-") as scratch:
        contents = extract(wheel or _download(Path(scratch)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            partial = folder / f"{name}.{os.getpid()}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)  # whole or not at all, also with two runs at once
    except OSError as error:
        raise DataUnavailableError(f"cannot write to the cache {folder}: {error}") from error
    return folder


def extract(wheel: Path) -> dict[str, bytes]:
    """The three files out of a wheel, checked.

    Raises:
        DataUnavailableError: it is not the wheel we know.
    """
    contents = {}
    try:
        with zipfile.ZipFile(wheel) as archive:
            for name, digest in MEMBERS.items():
                member = archive.getinfo(f"{FOLDER_IN_WHEEL}/{name}")
                if member.file_size > MEMBER_BYTES_MAX:
                    raise DataUnavailableError(f"{name} in {wheel.name} has {member.file_size} bytes: not the file we know")
                contents[name] = archive.read(member)
                if hashlib.sha256(contents[name]).hexdigest() != digest:
                    raise DataUnavailableError(f"{name} in {wheel.name} has another SHA-256 than the one we know")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise DataUnavailableError(f"{wheel} is not the wheel of {REQUIREMENT}: {error}") from error
    return contents


def _matches(path: Path, digest: str) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _download(folder: Path) -> Path:
    """The wheel, from whichever package index pip is set up to use; nothing of it is run or installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataUnavailableError(f"pip could not download {REQUIREMENT}: {error}") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        complaint = (done.stderr.strip() or "no wheel came").splitlines()[-1]
        raise DataUnavailableError(f"pip could not download {REQUIREMENT}: {complaint}")
    return wheels[0]


def parse(files: Mapping[str, str]) -> Events:
    """Events out of the three files' text, sorted by time, then user, then film."""
    inter = np.loadtxt(io.StringIO(files["ml-100k.inter"]), skiprows=1)  # user, film, rating, seconds
    user, film, rating = inter[np.lexsort((inter[:, 1], inter[:, 0], inter[:, 3]))].T[:3]
    users = {int(row["user_id:token"]): row for row in _table(files["ml-100k.user"])}
    films = {int(row["item_id:token"]): row for row in _table(files["ml-100k.item"])}
    user_row, film_row = _rows(user, users), _rows(film, films)
    genres = _codes(row["class:token_seq"] for row in films.values())
    occupations = _codes(row["occupation:token"] for row in users.values())
    age = np.array([float(row["age:token"]) for row in users.values()])
    woman = np.array([row["gender:token"] == "F" for row in users.values()])
    year = np.array([_year(row["release_year:token"]) for row in films.values()])
    # Fixed centres and scales: fitted ones would have seen the stream.
    dense = np.stack([(age[user_row] - 33) / 12, woman[user_row] * 2.0 - 1, (year[film_row] - 1986) / 14], axis=1)
    return Events(
        name="MovieLens-100K",
        note="",
        rows={
            "user": len(users),
            "item": len(films),
            "genres": int(genres.max()) + 1,
            "occupation": int(occupations.max()) + 1,
        },
        ids={"user": user_row, "item": film_row, "genres": genres[film_row], "occupation": occupations[user_row]},
        dense=dense.astype(np.float32),
        labels=(rating >= POSITIVE_RATING).astype(np.float32),
    )


def _table(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))


def _rows(ids: NDArray[np.float64], table: Mapping[int, object]) -> NDArray[np.int64]:
    """int64[n]: the position of each id in `table`, which is also its row of the embedding table."""
    known = np.array(list(table), dtype=np.float64)
    order = np.argsort(known)
    rows = order[np.searchsorted(known[order], ids)]
    assert np.array_equal(known[rows], ids), "an event names an id that its table lacks"
    return rows.astype(np.int64)


def _codes(words: Iterable[str]) -> NDArray[np.int64]:
    """int64[n]: a number for each different word, in alphabetical order."""
    return np.unique(np.array(list(words)), return_inverse=True)[1].astype(np.int64)


def _year(text: str) -> float:
    return float(text) if text.isdigit() else 1986.0  # two films have none: they get the centre


def generate(seed: int, note: str, count: int = SYNTHETIC_EVENTS) -> Events:
    """Events out of latent factors that drift.

    Users come in sessions, as they do in MovieLens, films become popular by Zipf's law, and what a film is liked for turns
    slowly with time, so that there is something for a fresh model to follow.

    Args:
        seed: one seed, one stream.
        note: why it is used instead of the real data.
        count: how many events.
    """
    rng = np.random.default_rng(seed)
    user = np.repeat(rng.integers(SYNTHETIC_USERS, size=count), rng.geometric(1 / SYNTHETIC_SESSION, size=count))[:count]
    popularity = 1 / np.arange(1, SYNTHETIC_ITEMS + 1) ** 0.8
    item = rng.choice(SYNTHETIC_ITEMS, size=count, p=popularity / popularity.sum())
    group_of_user, group_of_item = rng.integers(20, size=SYNTHETIC_USERS), rng.integers(200, size=SYNTHETIC_ITEMS)
    age = rng.normal(size=SYNTHETIC_USERS)

    taste = rng.normal(size=(SYNTHETIC_USERS, LATENT)) / LATENT**0.5
    start, end = rng.normal(size=(2, SYNTHETIC_ITEMS, LATENT))
    turn = np.linspace(0, np.pi / 2, count)[:, None]  # a quarter turn of each film's factors over the whole stream
    liked_for = np.cos(turn) * start[item] + np.sin(turn) * end[item]
    bias = rng.normal(size=SYNTHETIC_USERS)[user] + rng.normal(size=SYNTHETIC_ITEMS)[item] * 0.7
    logits = 1.2 * np.einsum("nd,nd->n", taste[user], liked_for) + bias + 0.3 * age[user]
    dense = np.stack([age[user], np.ones(count)], axis=1)
    return Events(
        name="synthetic",
        note=note,
        rows={"user": SYNTHETIC_USERS, "item": SYNTHETIC_ITEMS, "genres": 200, "occupation": 20},
        ids={"user": user, "item": item, "genres": group_of_item[item], "occupation": group_of_user[user]},
        dense=dense.astype(np.float32),
        labels=(rng.random(count) < 1 / (1 + np.exp(-logits))).astype(np.float32),
    )


def main() -> None:
    """`scripts/data`: fetch the data into the cache and say where it is."""
    parser = argparse.ArgumentParser(prog="scripts/data", description="Fetch MovieLens-100K into the user's cache folder.")
    parser.add_argument(
        "--wheel", type=Path, help=f"take it out of this file, the wheel of {REQUIREMENT}, rather than download it"
    )
    try:
        folder = fetch(parser.parse_args().wheel)
    except DataUnavailableError as error:
        typer.echo(f"MovieLens-100K cannot be had: {error}. The demo will run on synthetic events, and say so.", err=True)
        raise SystemExit(1) from None
    typer.echo(f"MovieLens-100K is in {folder}; every file has the expected SHA-256.")


if __name__ == "__main__":
    main()
