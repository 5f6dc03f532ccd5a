"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microtune.modules.user_error import UserError


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and puts it in place when the block ends without an error.

    The temporary path keeps the suffix, since writers of pictures choose their format by it.

    Raises:
        UserError: There can be no folder of that name.

    Example::

        with whole_file("report.png") as partial:
            figure.savefig(partial)
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): give another folder") from error
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Writes ``value`` as indented JSON; not-a-number and infinity are refused, since JSON has neither."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def whole_folder(path: Path | str) -> Iterator[Path]:
    """Gives an empty temporary folder beside ``path``, and puts it in place when the block ends without an error.

    What is there under the name is whole: a later run need not look inside. Of two processes the first one's stays.

    Raises:
        UserError: There can be no folder beside ``path``.

    Example::

        with whole_folder("data/train") as partial:
            unpack(archive, partial)
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise UserError(f"{path.parent} cannot be written to ({error.strerror}): give another folder") from error
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())  # mkdtemp's is for its owner only
        try:
            partial.rename(path)
        except OSError:
            if not path.is_dir():  # else another process was first, with the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
