"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path | str) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and puts it in place when the block ends without an error.

    The temporary path keeps the suffix, since writers of pictures choose their format by it.

    Example::

        with whole_file("report.png") as partial:
            figure.savefig(partial)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
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
