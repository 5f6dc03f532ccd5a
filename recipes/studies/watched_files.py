"""A progress bar over work of other processes, each piece of which leaves a file when it is done."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from microtune.datamodules.progress import progress_bar

log = logging.getLogger(__name__)


@contextlib.contextmanager
def watched(
    files: Sequence[Path], what: str, on_change: Callable[[], object] = lambda: None, every_seconds: float = 1
) -> Iterator[None]:
    """Shows how many of the files are there, while they are made in the block.

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
