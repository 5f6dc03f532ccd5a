"""The folder of a study: of one process at a time, begun with the same arguments, and watched while others fill it."""

import contextlib
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from microtune.datamodules.progress import progress_bar
from microtune.modules.atomic_files import write_json
from microtune.modules.user_error import UserError
from microtune.recipes.search.shared_folder import CLAIMS, open_shared_folder

log = logging.getLogger(__name__)

# what may differ after a stop
MAY_CHANGE = {"out_dir", "logger", "processes", "data_dir", "features", "features_limit_mib"}


@contextlib.contextmanager
def opened_folder(out_dir: Path, arguments: dict[str, Any], may_change: Container[str] = MAY_CHANGE) -> Iterator[None]:
    """Makes the folder, or checks that the study in it is this one; it is this process's in the block.

    Args:
        out_dir: The folder.
        arguments: Of the study.
        may_change: Those that may differ from what it was begun with.

    Raises:
        UserError: It holds something else, or another process is at it.
    """
    open_shared_folder(out_dir, arguments, may_change)
    try:
        held = FileLock(out_dir / CLAIMS / "study.lock", timeout=0).acquire()
    except Timeout as error:
        raise UserError(f"another process is at the study in {out_dir}: wait for it") from error
    with held:
        yield


def keep_definitions(out_dir: Path, kind: str, definitions: dict[str, Any]) -> None:
    """Writes what names stand for into the folder, or refuses to go on where one has changed.

    Args:
        out_dir: Folder of the study.
        kind: Of the definitions, in the plural: the name of their file.
        definitions: Plain values by name; those of earlier starts are kept beside them.

    Raises:
        UserError: One is not what it was when the study began.
    """
    path = out_dir / f"{kind}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, definition in json.loads(json.dumps(definitions)).items():
        if known.setdefault(name, definition) != definition:
            raise UserError(
                f"{name} is not what it was when the study in {out_dir} began ({path}), and what was measured with "
                "either does not compare: give another name or --out_dir"
            )
    write_json(path, known)


def hashes_of(files: Iterable[str]) -> dict[str, str]:
    """The SHA-256 of each file; raises ``UserError`` where one cannot be read."""
    hashes = {}
    for file in files:
        try:
            hashes[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
        except OSError as error:
            raise UserError(f"{file}: cannot read the network: {error.strerror}") from error
    return hashes


@contextlib.contextmanager
def watched(
    files: Sequence[Path], what: str, on_change: Callable[[], object] = lambda: None, every_seconds: float = 1
) -> Iterator[None]:
    """Shows how many of the files are there, while they are made in the block by other processes.

    Args:
        files: One of each piece of work.
        what: The pieces are.
        on_change: Called whenever there are more than before.
        every_seconds: How often is looked.

    Example::

        with watched([Path("a.json"), Path("b.json")], "trainings"), Workers(2) as workers:
            workers.map(...)
    """
    began, known = time.monotonic(), sum(file.exists() for file in files)
    stop = threading.Event()
    with progress_bar() as progress:
        bar = progress.add_task(what, total=len(files), completed=known)

        def watch() -> None:
            shown = known
            while not stop.wait(every_seconds):
                done = sum(file.exists() for file in files)
                if done == shown:
                    continue
                shown = done
                on_change()
                progress.update(bar, completed=done)
                if progress.disable:
                    left = (time.monotonic() - began) / (done - known) * (len(files) - done)
                    log.info("%d of %d %s, %.0f s left at this pace", done, len(files), what, left)

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
