"""Uploads: what arrives is what was sent, under bounds, and nothing that a stranger names becomes a path."""

import errno
import gzip
import io
import json
import os
import random
import stat
import struct
import zipfile
import zlib

import httpx
import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seresvit.data.volume import DataError
from seresvit.serving.uploads import (
    Bounds,
    Malformed,
    Receiver,
    TooLarge,
    arrange,
    as_given,
    base_name,
    image_in,
    unpack,
)

SMALL = Bounds(most_bytes=200_000, most_unpacked=100_000, most_files=5)


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "job" / "source"
    made.mkdir(parents=True)
    return made


def body(files=(), **fields):
    request = httpx.Request("POST", "http://x", files=[("files", file) for file in files], data=fields)
    return request.headers["content-type"], request.read()


def received(folder, files, bounds=SMALL, piece=7, **fields):
    content_type, whole = body(files, **fields)
    receiver = Receiver(content_type, folder, bounds)
    for start in range(0, len(whole), piece):
        receiver.feed(whole[start : start + piece])
    receiver.finish()
    return receiver


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def everything_below(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("piece", [1, 7, 10**6])
def test_files_and_fields_arrive_whole_however_they_are_cut(folder, piece):
    contents = [b"", b"\r\n--", bytes(range(256)) * 40]
    files = [(f"IM{number}", content) for number, content in enumerate(contents)]
    receiver = received(folder, files, piece=piece, model="tiny")
    assert receiver.fields == {"model": "tiny"} and receiver.names == ["IM0", "IM1", "IM2"]
    assert [(folder / f"{number:06d}").read_bytes() for number in (1, 2, 3)] == contents


EVIL = [
    *("../../evil.dcm", "/etc/evil.dcm", "..\\..\\evil.dcm", "C:\\evil.dcm", "a/../../../evil.dcm", "....//evil.dcm"),
    *("evil\0.dcm", "../" * 40 + "evil.dcm", "evil\n.dcm", "evil.dcm/", ".", "..", "~root/evil.dcm", "x" * 5000),
]


@pytest.mark.parametrize("name", EVIL)
def test_no_name_of_an_upload_becomes_a_path(folder, name):
    try:
        receiver = received(folder, [(name, b"DICM")])
    except Malformed:
        assert len(name) > 4000  # a header is not that long
    else:
        arrange(folder, receiver.names, SMALL)
        assert all(len(one) <= 255 and "/" not in one and one.isprintable() for one in receiver.names)
    root = folder.parents[1]
    assert {path.split(".")[0] for path in everything_below(root)} <= {"job/source/000001", "job/names"}


@pytest.mark.parametrize("name", [name for name in EVIL if "\0" not in name])
def test_no_name_in_a_zip_becomes_a_path(folder, name, tmp_path):
    names = unpack(zipped(tmp_path / "a.zip", [(name, b"DICM")]), folder, Bounds())
    assert set(everything_below(tmp_path)) <= {"a.zip", "job/source/000001"} and len(names) <= 1


def test_links_folders_and_hidden_files_in_a_zip_are_left_out(folder, tmp_path):
    link = zipfile.ZipInfo("link.dcm")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path = zipped(tmp_path / "a.zip", [(link, b"/etc/passwd"), ("d/", b""), ("__MACOSX/._a", b"x"), ("d/a.dcm", b"y")])
    assert unpack(path, folder, SMALL) == ["a.dcm"] and not any(one.is_symlink() for one in folder.iterdir())


def test_a_zip_is_told_by_its_content_and_goes_when_it_is_unpacked(folder, tmp_path):
    path = zipped(tmp_path / "a", [("s/IM1", b"1"), ("s/IM2.dcm", b"2")])
    receiver = received(folder, [("study", path.read_bytes())])
    arrange(folder, receiver.names, SMALL)
    assert everything_below(folder.parent) == ["names.json", "source/000001", "source/000002.dcm"]
    assert as_given(f"{folder}/000002.dcm: is broken", folder.parent) == "IM2.dcm: is broken"


def test_bombs_are_refused_before_they_go_off(folder, tmp_path):
    with pytest.raises(TooLarge, match="at most"):
        unpack(zipped(tmp_path / "a.zip", [("a", bytes(100_001))]), folder, SMALL)
    with pytest.raises(TooLarge):
        unpack(zipped(tmp_path / "b.zip", [(f"{number}", b"") for number in range(6)]), folder, SMALL)
    assert not everything_below(folder)


def test_a_bomb_that_lies_about_its_size_is_stopped(folder, tmp_path):
    path = zipped(tmp_path / "a.zip", [("a", bytes(10**7))])
    raw = bytearray(path.read_bytes())
    for signature, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", raw, raw.index(signature) + at, 1000)
    path.write_bytes(raw)
    with pytest.raises(Malformed):
        unpack(path, folder, SMALL)
    assert sum(one.stat().st_size for one in folder.iterdir()) <= SMALL.most_unpacked


def test_a_zip_of_zips_is_unpacked_once(folder, tmp_path):
    inner = zipped(tmp_path / "inner.zip", [("a.dcm", bytes(10**8))]).read_bytes()
    names = unpack(zipped(tmp_path / "a.zip", [("inner.zip", inner)]), folder, Bounds())
    assert names == ["inner.zip"] and (folder / "000001").read_bytes() == inner


def test_entries_that_share_their_bytes_are_refused(folder, tmp_path):
    path = zipped(tmp_path / "a.zip", [("a", bytes(90_000)), ("b", bytes(90_000))])
    raw = bytearray(path.read_bytes())
    second = raw.rindex(b"PK\x01\x02")
    struct.pack_into("<I", raw, second + 42, 0)  # where its bytes start
    path.write_bytes(raw)
    with pytest.raises((Malformed, TooLarge)):
        unpack(path, folder, Bounds(most_unpacked=1_000_000))


def test_a_directory_too_long_to_read_is_not_read(folder, tmp_path):
    path = zipped(tmp_path / "a.zip", [("a", b"")])
    raw = bytearray(path.read_bytes())
    struct.pack_into("<I", raw, raw.index(b"PK\x05\x06") + 12, 2**31)
    path.write_bytes(raw)
    with pytest.raises(TooLarge, match="lists more than 5 files"):
        unpack(path, folder, SMALL)


def test_encrypted_and_oddly_packed_zips_are_refused(folder, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a", b"x" * 1000)
    with pytest.raises(Malformed, match="not deflated"):
        unpack(tmp_path / "a.zip", folder, SMALL)


def test_what_is_too_large_stops_at_once(folder):
    with pytest.raises(TooLarge, match="MiB"):
        received(folder, [("a", bytes(300_000))], piece=1000)
    assert (folder / "000001").stat().st_size <= SMALL.most_bytes
    (folder / "000001").unlink()
    with pytest.raises(TooLarge, match="more than 5 files"):
        received(folder, [(f"{n}", b"") for n in range(6)])
    with pytest.raises(Malformed, match="a field of more than"):
        received(folder.parent, [("a", b"")], model="x" * 2000)


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 999}",
    ],
)
def test_other_bodies_are_refused(folder, content_type):
    with pytest.raises(Malformed):
        Receiver(content_type, folder, SMALL)


def test_a_body_that_ends_too_early_is_refused(folder):
    content_type, whole = body([("a.dcm", b"pixels")])
    for end in range(0, len(whole) - 3, 5):
        receiver = Receiver(content_type, folder, SMALL)
        for path in folder.iterdir():
            path.unlink()
        with pytest.raises(Malformed):
            receiver.feed(whole[:end])
            receiver.finish()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 4))
def test_a_damaged_body_is_refused_or_taken_and_stays_in_its_folder(folder, seed, cuts):
    for path in folder.parent.rglob("*.*"):
        path.unlink()
    for path in folder.iterdir():
        path.unlink()
    dice = random.Random(seed)
    content_type, whole = body([("a.dcm", b"pixels"), ("../b", bytes(50))], model="m")
    damaged = bytearray(whole)
    for _ in range(cuts):
        at = dice.randrange(len(damaged))
        damaged[at : at + dice.randrange(3)] = dice.choice([b"", b"\r\n", b"\0", b"--", dice.randbytes(3)])
    try:
        receiver = Receiver(content_type, folder, SMALL)
        receiver.feed(bytes(damaged))
        receiver.finish()
        arrange(folder, receiver.names, SMALL)
    except DataError:
        receiver.stop()
    root = folder.parents[1]
    assert all(path.startswith(("job/source/", "job/names.json", "job/upload.zip")) for path in everything_below(root))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_zip_is_refused_or_unpacked_within_bounds(folder, tmp_path, seed):
    for path in folder.iterdir():
        path.unlink()
    dice = random.Random(seed)
    raw = bytearray(zipped(tmp_path / "a.zip", [("a.dcm", b"x" * 5000), ("b/c.dcm", os.urandom(50))]).read_bytes())
    for _ in range(dice.randrange(1, 6)):
        raw[dice.randrange(len(raw))] = dice.randrange(256)
    (tmp_path / "a.zip").write_bytes(raw[: dice.choice([len(raw), dice.randrange(len(raw))])])
    try:
        unpack(tmp_path / "a.zip", folder, SMALL)
    except DataError as error:
        assert str(tmp_path) not in str(error)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= SMALL.most_unpacked
    assert len(everything_below(tmp_path)) == 1 + len(everything_below(folder))


def test_a_full_disk_is_no_fault_of_the_zip(folder, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", full)
    with pytest.raises(OSError, match="No space"):
        unpack(zipped(tmp_path / "a.zip", [("a", b"x")]), folder, SMALL)


def nifti(path, **fields):
    image = nibabel.Nifti1Image(np.zeros((8, 8, 2), np.int16), np.eye(4))
    image.to_filename(path)
    raw = bytearray(path.read_bytes() if path.suffix == ".nii" else gzip.decompress(path.read_bytes()))
    if "starts" in fields:
        struct.pack_into("<f", raw, 108, fields["starts"])
    path.write_bytes(raw if path.suffix == ".nii" else gzip.compress(bytes(raw)))
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_an_image_file_is_taken_alone(folder, tmp_path, suffix):
    content = nifti(tmp_path / f"a{suffix}").read_bytes()
    receiver = received(folder, [(f"Head{suffix.upper()}", content)])
    arrange(folder, receiver.names, SMALL)
    assert image_in(folder) == folder / f"image{suffix}"
    with pytest.raises(DataError, match="give one image file"):
        arrange(folder, ["a.nii", "b.dcm"], SMALL)


@pytest.mark.parametrize("starts", [1e30, -5.0, float("nan"), 2.0**21])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_claims_extensions_without_end_is_refused(folder, tmp_path, suffix, starts):
    content = nifti(tmp_path / f"a{suffix}", starts=starts).read_bytes()
    receiver = received(folder, [(f"a{suffix}", content)])
    with pytest.raises(Malformed):
        arrange(folder, receiver.names, SMALL)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b", zlib.compress(b"x"), gzip.compress(b"short"), b"x" * 600])
def test_what_is_no_nifti_is_refused(folder, content):
    receiver = received(folder, [("a.nii.gz", content)])
    with pytest.raises(Malformed):
        arrange(folder, receiver.names, SMALL)


def test_nothing_is_refused(folder, tmp_path):
    with pytest.raises(DataError, match="no file in it"):
        arrange(folder, [], SMALL)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    receiver = received(folder, [("a.zip", empty.getvalue())])
    with pytest.raises(DataError, match="no file in it"):
        arrange(folder, receiver.names, SMALL)


@given(st.text(max_size=400))
def test_names_are_one_line_and_no_path(name):
    shown = base_name(name)
    assert len(shown) <= 255 and "/" not in shown and "\\" not in shown and len(shown.splitlines()) <= 1


def test_a_file_that_has_the_name_under_which_another_is_stored_keeps_it(folder):
    (folder.parent / "names.json").write_text(json.dumps({"000001.dcm": "000002.dcm", "000002.dcm": "Kim.dcm"}))
    told = as_given(f"{folder}/000001.dcm: 1000001 bytes, unlike 000002.dcm", folder.parent)
    assert told == "000002.dcm: 1000001 bytes, unlike Kim.dcm"
