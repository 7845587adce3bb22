"""Documents out of archives: the files within tar (webdataset) and zip, the pages within WARC."""

from __future__ import annotations

import dataclasses
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from stablelm_jax.preparation import streams
from stablelm_jax.preparation.formats import Reading
from stablelm_jax.preparation.streams import Blocks, Damaged, Meter, Rejected, as_file
from stablelm_jax.preparation.texts import read_html, read_text

# Reads one file of an archive, (its name, the open file), to documents.
ReadMember = Callable[[str, BinaryIO], Iterator[str | Rejected]]

_MEMBER_ERRORS = (zipfile.BadZipFile, RuntimeError, zlib.error, lzma.LZMAError, EOFError)


def read_tar(blocks: Blocks, read_member: ReadMember) -> Iterator[str | Rejected]:
    """The documents of every file of a tar archive, which is read from its start to its end."""
    end = [b""]
    with as_file(_watched(blocks, end)) as file, tarfile.TarFile.open(None, "r|", file) as archive:
        for member in archive:
            if member.isfile():
                opened = archive.extractfile(member)
                yield from _placed(f"member {member.name}", read_member(member.name, opened))
            elif not member.isdir():
                yield Rejected(f"a link or device in an archive (member {member.name})")
    if end[0].strip(b"\0"):
        raise Damaged("tar archive cut short, the rest of the file is lost")


def _watched(blocks: Blocks, end: list[bytes]) -> Blocks:
    """The same blocks; `end` holds the last bytes seen: zeros end an archive that is whole."""
    for block in blocks:
        end[0] = (end[0] + block)[-1024:]
        yield block


def read_zip(file: BinaryIO, read_member: ReadMember, meter: Meter) -> Iterator[str | Rejected]:
    """The documents of every file of an open zip archive."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        if isinstance(error.__context__, OSError):  # a disk that failed, not the archive
            raise error.__context__ from None
        raise Damaged(f"zip archive damaged or without its ending: {error}") from None
    members = [member for member in archive.infolist() if not member.is_dir()]
    sizes = [sum(m.compress_size for m in members), sum(m.file_size for m in members)]
    if streams.expands_without_measure(*sizes):
        raise Damaged("grows without measure when decompressed, the rest of the file is lost")
    for member in members:
        meter.consumed += member.compress_size
        place = f"member {member.filename}"
        try:
            with archive.open(member) as opened:
                yield from _placed(place, read_member(member.filename, opened))
        except _MEMBER_ERRORS as error:
            yield Rejected(f"damaged in its archive: {error} ({place})")


def _placed(place: str, records: Iterator[str | Rejected]) -> Iterator[str | Rejected]:
    """The same records; what is rejected says where in the archive it lies."""
    try:
        for record in records:
            if isinstance(record, Rejected):
                record = dataclasses.replace(record, reason=f"{record.reason} ({place})")
            yield record
    except Damaged as error:
        yield Rejected(f"{error} ({place})")


def read_warc(blocks: Blocks, reading: Reading) -> Iterator[str | Rejected]:
    """The text of every page of a web archive: its responses, resources and conversions."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    head, blocks = streams.peek(blocks, 5)
    if head != b"WARC/":
        raise Damaged("web archive damaged from its beginning")
    try:
        with as_file(blocks) as file:
            for page in ArchiveIterator(file):
                if page.rec_type in ("response", "resource", "conversion"):
                    place = page.rec_headers.get_header("WARC-Target-URI", "no address")
                    yield from _placed(place, _page(page, reading))
                while page.raw_stream.read(1 << 16):  # what no page was made of
                    pass
                if page.raw_stream.limit:
                    raise Damaged("web archive cut short, the rest of the file is lost")
    except ArchiveLoadFailed as error:
        text = str(error).partition("\n")[0]
        raise Damaged(f"web archive damaged, the rest of the file is lost: {text}") from None


def _page(page, reading: Reading) -> Iterator[str | Rejected]:
    """The text of one record of a web archive."""
    http = page.http_headers
    status = http.get_statuscode() if http else "200"
    kind = (http or page.rec_headers).get_header("Content-Type", "no type").split(";")[0].strip()
    content = streams.blocks_of(page.content_stream(), Meter())
    if status != "200":
        yield Rejected(f"a page of HTTP status {status}")
    elif kind in ("text/html", "application/xhtml+xml"):
        yield from read_html(content, reading)
    elif kind.startswith("text/"):
        yield from read_text(content, reading)
    else:
        yield Rejected(f"a page of {kind}, not text")
