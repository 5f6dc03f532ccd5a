"""Pictures, which are written whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from microtune.modules.atomic_files import whole_file


@contextmanager
def drawn(path: Path | str, *shape: int, **options: Any) -> Iterator[Any]:
    """Gives the axes of a new figure, and writes it as a PNG when the block ends without an error.

    Args:
        path: File of the picture.
        shape: Number of rows and of columns, where there are several axes.
        options: As ``matplotlib.pyplot.subplots`` takes them.

    Example::

        with drawn("runs/front.png", figsize=(8, 4.5)) as axes:
            axes.plot(memory_kib, accuracy)
    """
    import matplotlib  # a second, which figures in numbers need not wait for

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*shape, layout="constrained", **options)
    try:
        yield axes
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=120)
    finally:
        pyplot.close(figure)
