"""Files of a stranger → a folder, under bounds: total size, unpacked size, number, names.

No name that is given ever becomes a path: files are numbered as they come, keep at most a suffix that tells the reader
what they are, and `names.json` beside their folder says what they were called.
"""

import errno
import gzip
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from seresvit.data.nifti import ITK, NIFTI
from seresvit.data.volume import DataError

DICOM = (".dcm", ".ima")
NAMES = "names.json"
PIECE = 2**20
MOST_FIELD = 1024
MOST_NAME = 255
# What an entry of a zip's directory takes at most, on average; it is read whole before anything can be checked.
MOST_ENTRY = 512
# NIfTI keeps its extensions before the voxels, and readers take them whole.
MOST_EXTENSIONS = 2**20
MIB = 2**20
# What may be the name under which a file is stored.
STORED = re.compile(r"\w+(?:\.\w+)*", re.ASCII)


class Malformed(DataError):  # noqa: N818
    """An upload that is not what its header says."""


class TooLarge(DataError):  # noqa: N818
    """An upload beyond the bounds."""


@dataclass(frozen=True)
class Bounds:
    """What an upload may be: bytes as sent, bytes unpacked, files."""

    most_bytes: int = 2048 * MIB
    most_unpacked: int = 8192 * MIB
    most_files: int = 20_000


class Receiver:
    """Takes a multipart body piece by piece and writes its files, numbered, into `folder`.

    `names` are what the files were called, `fields` the other parts. Each method raises Malformed for a body that
    breaks the format, TooLarge for one beyond the bounds, and OSError when the disk is full.
    """

    def __init__(self, content_type: str, folder: Path, bounds: Bounds):
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if kind != b"multipart/form-data" or not boundary:
            raise Malformed("expected multipart/form-data with a boundary")
        self.folder, self.bounds = folder, bounds
        self.fields: dict[str, str] = {}
        self.names: list[str] = []
        self._size = 0
        self._header, self._value, self._headers = b"", b"", dict[bytes, bytes]()
        self._field, self._text, self._file = "", b"", None  # type: tuple[str, bytes, IO[bytes] | None]
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._open,
                    "on_part_data": self._write,
                    "on_part_end": self._close,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise Malformed("the multipart boundary is not one") from None

    def feed(self, piece: bytes) -> None:
        """Takes the next bytes of the body."""
        self._size += len(piece)
        if self._size > self.bounds.most_bytes:
            raise TooLarge(f"larger than {self.bounds.most_bytes // MIB} MiB, the most that is taken at once")
        try:
            self._parser.write(piece)
        except FormParserError:
            raise Malformed("the multipart body is damaged; send it again") from None

    def finish(self) -> None:
        """The body has ended; raises Malformed where it should go on."""
        self.stop()
        if not self._ended:
            raise Malformed("the multipart body ends too early; send it again")

    def stop(self) -> None:
        """Nothing more will come."""
        if self._file:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._headers, self._field, self._text = {}, "", b""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header, self._value = b"", b""

    def _open(self) -> None:
        kind, options = parse_options_header(self._headers.get(b"content-disposition", b"").decode("latin-1"))
        if kind != b"form-data" or b"name" not in options:
            raise Malformed("a part of the multipart body has no name")
        self._field = options[b"name"].decode("utf-8", "replace")
        if not options.get(b"filename"):  # empty in forms whose file was not chosen
            return
        if len(self.names) >= self.bounds.most_files:
            raise TooLarge(f"more than {self.bounds.most_files} files, the most that are taken at once")
        self.names.append(base_name(options[b"filename"].decode("utf-8", "replace")))
        self._file = open(self.folder / numbered(len(self.names)), "xb")  # noqa: SIM115

    def _write(self, data: bytes, start: int, end: int) -> None:
        if self._file:
            self._file.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > MOST_FIELD or len(self.fields) > 16:
            raise Malformed(f"a field of more than {MOST_FIELD} bytes, or too many; send images as files")

    def _close(self) -> None:
        if self._file is None:
            self.fields[self._field] = self._text.decode("utf-8", "replace")
        self.stop()

    def _end(self) -> None:
        self._ended = True


def arrange(folder: Path, names: list[str], bounds: Bounds) -> None:
    """Makes what was received, `names` in order, the source of a job: see `image_in`. A zip is unpacked.

    Raises DataError: nothing in it, or images of several kinds; Malformed for a damaged zip; TooLarge.
    """
    names = list(names)
    if len(names) == 1 and _is_zip(folder / numbered(1)):
        archive = (folder / numbered(1)).rename(folder.with_name("upload.zip"))
        names = unpack(archive, folder, bounds)
        archive.unlink()
    if not names:
        raise DataError("no file in it; give the DICOM files of one series, one zip of them, or one NIfTI, MHA or NRRD")
    images = [name for name in names if name.lower().endswith(NIFTI + ITK)]
    if images and len(names) > 1:
        raise DataError(f"{len(names)} files, one of them {images[0]}; give one image file, or DICOM files alone")
    stored = []
    for number, name in enumerate(names, 1):
        lower = name.lower()
        as_image = next((f"image{suffix}" for suffix in NIFTI + ITK if lower.endswith(suffix)), None)
        stored.append(as_image or numbered(number) + next((s for s in DICOM if lower.endswith(s)), ""))
        (folder / numbered(number)).rename(folder / stored[-1])
    if images:
        _check_nifti(folder / stored[0])
    given = dict(zip(stored, names, strict=True))
    (folder.parent / NAMES).write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")


def image_in(source: Path) -> Path:
    """What `read_volume` reads of a job's source: its one image file, else the folder of its DICOM files."""
    return next((path for path in source.iterdir() if path.name.startswith("image.")), source)


def as_given(message: str, job_folder: Path) -> str:
    """A message about a job's files, in one line, without the paths of this machine, and with the names as given."""
    source = job_folder / "source"
    for path in (f"{source}/", f"{source}", f"{job_folder}/", f"{job_folder}"):
        message = message.replace(path, "")
    try:
        given = json.loads((job_folder / NAMES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        given = {}
    # At once, since one may have been given the name under which another is stored.
    message = STORED.sub(lambda found: given.get(found[0], found[0]), message)
    return " ".join(message.split()).removeprefix(": ")


def unpack(archive: Path, folder: Path, bounds: Bounds) -> list[str]:
    """Writes the files in a zip, numbered, into `folder`; their names. Folders, links and hidden files are left out."""
    names: list[str] = []
    left = bounds.most_unpacked
    try:
        _check_directory(archive, bounds)
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if _is_file(member)]
            claimed = sum(member.file_size for member in members)
            if claimed > left or len(members) > bounds.most_files:
                raise TooLarge(
                    f"{len(members)} files of {claimed} bytes in the zip; at most {bounds.most_files} of "
                    f"{left // MIB} MiB are taken"
                )
            for member in members:
                if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise Malformed("the zip is encrypted or not deflated; zip the series again")
                names.append(base_name(member.filename))
                with opened.open(member) as packed, open(folder / numbered(len(names)), "xb") as file:
                    while piece := packed.read(PIECE):
                        left -= len(piece)
                        if left < 0:
                            raise TooLarge(f"the zip unpacks to more than {bounds.most_unpacked // MIB} MiB")
                        file.write(piece)
    except (DataError, MemoryError):
        raise
    except Exception as error:  # the parser of a damaged zip raises almost anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a seek to nowhere
            raise
        raise Malformed("the zip is damaged; zip the series again") from None
    return names


def numbered(number: int) -> str:
    """The name under which the file of this number is stored."""
    return f"{number:06d}"


def base_name(name: str) -> str:
    """The last part of a path, of any system, as one line of text."""
    last = PurePosixPath(name.replace("\\", "/")).name
    return "".join(letter if letter.isprintable() else "_" for letter in last)[-MOST_NAME:]


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _is_file(member: zipfile.ZipInfo) -> bool:
    is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
    return not (member.is_dir() or is_link or base_name(member.filename).startswith("."))


def _check_directory(archive: Path, bounds: Bounds) -> None:
    with open(archive, "rb") as file:
        end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if end and end[5] > bounds.most_files * MOST_ENTRY:
        raise TooLarge(f"the zip lists more than {bounds.most_files} files")


def _check_nifti(path: Path) -> None:
    """Refuses a NIfTI header that claims more extensions than are read without harm."""
    opener: Callable[..., IO[bytes]] | None = {".nii": open, ".gz": gzip.open}.get(path.suffix)  # type: ignore[assignment]
    if opener is None:
        return
    try:
        with opener(path, "rb") as file:
            header = file.read(540)
    except (OSError, EOFError, zlib.error):
        raise Malformed("the image file is damaged; write it again") from None
    starts: list[float] = []
    for order in "<>":
        for length, (kind, at) in {348: ("f", 108), 540: ("q", 168)}.items():
            if len(header) >= length and struct.unpack(f"{order}i", header[:4])[0] == length:
                starts += struct.unpack_from(f"{order}{kind}", header, at)
    if not starts or not 0 <= starts[0] <= MOST_EXTENSIONS:
        raise Malformed("the image file is no NIfTI, or its voxels start nowhere; write it again")
