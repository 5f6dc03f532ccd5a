"""Archives that are unpacked safely, with a bar."""

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from microtune.datamodules.progress import progress_bar
from microtune.modules.user_error import UserError


@contextmanager
def read_archive(path: Path) -> Iterator[Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]]:
    """Opens a tar archive, compressed or not, to be read once from its beginning, with a progress bar over its bytes.

    Raises:
        UserError: if it does not exist or is no tar archive, is cut short, or a member would leave the folder.

    Example::

        with read_archive(Path("en.tar.gz")) as members:
            for tar, member in members:
                tar.extract(member, folder, filter="data")
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a .tar or .tar.gz file")
    try:
        with progress_bar() as progress:
            task = progress.add_task(f"unpacking {path.name}", total=path.stat().st_size)
            with (
                progress.open(path, "rb", task_id=task) as file,
                _decompressed(path, file) as stream,
                tarfile.open(fileobj=stream, mode="r|", tarinfo=_WholeTarInfo) as tar,
            ):
                yield _members(tar, stream)
    except UserError:
        raise
    except tarfile.FilterError as error:
        raise UserError(
            f"{path} has a member that would be written outside its folder ({error}): do not trust this archive"
        ) from error
    # The last two are what tarfile raises on some headers that are damaged.
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): download it again, or make room on the disk") from error


def _members(tar: tarfile.TarFile, stream: IO[bytes]) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    for member in tar:
        yield tar, member
        tar.members.clear()  # tarfile would remember them all: 3 GB for the six million clips of English MSWC
    while stream.read(2**20):  # to the end, where the checksum of what was decompressed is
        pass


def _decompressed(path: Path, file: IO[bytes]) -> IO[bytes]:
    """The bytes of the tar archive; tarfile's own way compares no checksum and stops at the end of a first part."""
    with path.open("rb") as beginning:
        magic = beginning.read(6)
    for first_bytes, opened in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open)):
        if magic.startswith(first_bytes):
            return opened(file)
    return file


class _WholeTarInfo(tarfile.TarInfo):
    """Takes a damaged or missing header for an error, where tarfile takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_WholeTarInfo":
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a tar archive into a folder, and nothing outside it.

    Whole or not at all only together with ``whole_folder``.

    Raises:
        UserError: as ``read_archive`` does.

    Example::

        with whole_folder("data/en") as partial:
            unpack(Path("en.tar.gz"), partial)
    """
    with read_archive(path) as members:
        for tar, member in members:
            tar.extract(member, folder, filter="data")
