"""Zip files: the same content as the standard library reads, and errors for truncated and compressed ones."""

import os
import zipfile
from pathlib import Path

import pytest

from mmdistill.data.readers import zip_file
from mmdistill.data.readers.zip_file import ZipError, read_zip, write_zip, zip_names


def _write_files(folder: Path, names: list[str]) -> list[Path]:
    folder.mkdir()
    paths = [folder / name for name in names]
    for k, path in enumerate(paths):
        path.write_bytes(os.urandom(10 + k))
    return paths


@pytest.mark.parametrize(
    "names", [[f"{k:06d}.jpg" for k in range(20)], ["1.jpg", "2.jpg", "10.jpg", "11.jpg", "ä.jpg"]]
)
def test_files_are_those_of_the_standard_library(tmp_path: Path, names: list[str]) -> None:
    paths = _write_files(tmp_path / "v", names)
    write_zip(tmp_path / "a.zip", paths)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        assert set(archive.namelist()) == zip_names(str(tmp_path / "a.zip")) == set(names)
    wanted = [paths[3], paths[0], paths[3]]
    assert read_zip(str(tmp_path / "a.zip"), [p.name for p in wanted]) == [p.read_bytes() for p in wanted]
    assert read_zip(str(tmp_path / "a.zip"), ["absent", names[1]]) == [None, paths[1].read_bytes()]
    write_zip(tmp_path / "b.zip", paths[::-1])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_archives_of_other_programs_are_read(tmp_path: Path) -> None:
    """Other orders, extra fields, subfolders, comments."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(("b.jpg", "sub/a.jpg", "a.jpg", "c.jpg")):
            info = zipfile.ZipInfo(name)
            info.extra, info.comment = b"UT\x05\x00\x01" + bytes(4 * (number % 2)), b"text" * (number // 2)
            archive.writestr(info, name.encode())
        archive.comment = b"a comment"
    assert read_zip(str(path), ["a.jpg", "b.jpg", "sub/a.jpg"]) == [b"a.jpg", b"b.jpg", b"sub/a.jpg"]


def test_offsets_above_4_gib_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library writes the 64-bit fields from its limits on, which are lowered here."""
    paths = _write_files(tmp_path / "v", [f"{k:03d}.jpg" for k in range(40)])
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 900)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 30)
    write_zip(tmp_path / "a.zip", paths)
    data = (tmp_path / "a.zip").read_bytes()
    assert b"PK\x06\x06" in data
    assert data.count(b"\xff\xff\xff\xff") > 10  # of headers
    assert read_zip(str(tmp_path / "a.zip"), [p.name for p in paths]) == [p.read_bytes() for p in paths]


def test_truncated_damaged_and_compressed_archives_raise(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    write_zip(path, _write_files(tmp_path / "v", ["0.jpg", "1.jpg"]))
    data = path.read_bytes()
    for keep in range(len(data)):
        path.write_bytes(data[:keep])
        with pytest.raises(ZipError, match=r"a\.zip: truncated, or not a zip archive; write it again"):
            read_zip(str(path), ["0.jpg"])
    for content in (data[10:], data.replace(b"PK\x01\x02", b"PK\x01\x03")):
        path.write_bytes(content)
        with pytest.raises(ZipError, match=r"a\.zip: a damaged zip archive; write it again"):
            read_zip(str(path), ["0.jpg"])
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", b"0" * 100)
    with pytest.raises(ZipError, match=r"a\.zip: its files are compressed or encrypted; write it with `zip -0`"):
        read_zip(str(path), ["0.jpg"])
    with zipfile.ZipFile(path, "w"):
        pass
    with pytest.raises(ZipError, match=r"a\.zip: an empty zip archive"):
        zip_names(str(path))


def test_a_replaced_archive_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    for content in (b"old", b"newer"):
        (tmp_path / "0.jpg").write_bytes(content)
        write_zip(path, [tmp_path / "0.jpg"])
        assert read_zip(str(path), ["0.jpg"]) == [content]
    assert zip_file.CACHED_DIRECTORIES <= 16
