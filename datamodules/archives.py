"""Archives that are unpacked safely, with a bar."""

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

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
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"unpacking {path.name}", total=path.stat().st_size)
            with progress.open(path, "rb", task_id=task) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
                yield ((tar, member) for member in tar)
    except tarfile.FilterError as error:
        raise UserError(
            f"{path} has a member that would be written outside its folder ({error}): do not trust this archive"
        ) from error
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}): download it again, or make room on the disk") from error


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
