"""A folder of work that goes on after a stop with the same command, and that several processes may share."""

from collections.abc import Container
from pathlib import Path
from typing import Any

from filelock import FileLock

from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import say_how_to_go_on
from microtune.recipes.training.run_folder import changed_argument, write_config

CLAIMS = ".claims"  # where processes say what they are at


def check_shared_folder(out_dir: Path, arguments: dict[str, Any], may_change: Container[str]) -> None:
    """Raises ``UserError`` if the folder holds something else than this work, and makes nothing.

    Args:
        out_dir: Folder of work that several processes share, or that goes on after a stop.
        arguments: Of the recipe.
        may_change: Those that may differ from what the work was begun with.
    """
    config = out_dir / "config.yaml"
    if config.exists():
        if changed := changed_argument(out_dir, arguments, may_change):
            raise UserError(
                f"the work in {out_dir} was begun with {changed}: go on with --config {config} --out_dir {out_dir}, or "
                "give another --out_dir"
            )
        return
    try:
        strangers = [path.name for path in out_dir.iterdir() if path.name not in (CLAIMS, "features")]
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{out_dir} cannot be a run's folder: {error.strerror}: give another --out_dir") from error
    if strangers:
        raise UserError(f"{out_dir} holds {strangers[0]}, but no config.yaml of this recipe: give another --out_dir")


def open_shared_folder(out_dir: Path, arguments: dict[str, Any], may_change: Container[str]) -> None:
    """Makes the folder and keeps the arguments in it; raises as ``check_shared_folder`` does."""
    check_shared_folder(out_dir, arguments, may_change)
    try:
        (out_dir / CLAIMS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be a run's folder: {error.strerror}: give another --out_dir") from error
    with FileLock(out_dir / CLAIMS / "folder.lock"):
        check_shared_folder(out_dir, arguments, may_change)
        if not (out_dir / "config.yaml").exists():
            write_config(out_dir, arguments)
    say_how_to_go_on(f"the same command with --out_dir {out_dir} goes on")
