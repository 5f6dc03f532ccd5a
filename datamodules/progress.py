"""The bar of a step that takes long: download, unpacking, decoding."""

from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without the seconds of its import
from rich.console import Console
from rich.progress import Progress


def progress_bar() -> Progress:
    """A bar on standard error, of the first process alone, that is gone afterwards; nothing where no one looks at it.

    Example::

        with progress_bar() as progress:
            for path in progress.track(paths, description="decoding"):
                ...
    """
    console = Console(stderr=True)
    is_other_process = getattr(rank_zero_only, "rank", 0) > 0  # there is a rank once Lightning is imported
    return Progress(console=console, transient=True, disable=not console.is_terminal or is_other_process)
