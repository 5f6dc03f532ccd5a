"""The folder that a run writes."""

import itertools
import os
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import yaml
from lightning_utilities.core.rank_zero import rank_zero_only  # Lightning's own, without the seconds of its import

from microtune.modules.atomic_files import whole_file
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.training.command_line import say_how_to_go_on

DEFAULT_FOLDER = "MICROTUNE_RUN_FOLDER"
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them
# what a resumed run may do differently without ending elsewhere
MAY_CHANGE = {"resume", "out_dir", "data_dir", "download", "num_workers", "logger", "allow_oversize"}
MAY_CHANGE |= {"processes", "cluster", "features", "features_limit_mib", "features_dir"}


def is_first_process() -> bool:
    """Whether this is the process that writes: as the Trainer says, or before there is one the environment."""
    rank = getattr(rank_zero_only, "rank", None)
    if rank is None:
        rank = next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)
    return rank == 0


def check_run_folder(out_dir: Path | None, resume: bool) -> None:
    """Raises ``UserError`` where ``open_run_folder`` would, and makes nothing: to be asked before long work begins."""
    if resume:
        if out_dir is None:
            raise UserError("--resume goes on with the run in a folder: give it with --out_dir")
        if (out_dir / "report.json").exists():
            raise UserError(f"the run in {out_dir} is finished: its results are in {out_dir / 'report.json'}")
        if not (out_dir / "config.yaml").exists():
            raise UserError(f"there is no run in {out_dir}: start it without --resume")
    elif out_dir is not None:
        try:
            is_empty = not out_dir.exists() or not any(out_dir.iterdir())
        except OSError as error:
            raise UserError(f"{out_dir} cannot be a run's folder: {error.strerror}: give another --out_dir") from error
        # under DDP the other processes start when the first has already written
        if is_first_process() and not is_empty:
            raise UserError(f"{out_dir} is not empty: give another --out_dir, or --resume to go on with the run in it")


def open_run_folder(out_dir: Path | None, recipe: str, resume: bool) -> Path:
    """Makes the folder of a new run, or finds that of a run to go on with.

    Args:
        out_dir: The folder; by default a new one ``runs/<recipe>/<date-time>``.
        recipe: Name of the recipe.
        resume: Whether to go on with the run in ``out_dir``.

    Raises:
        UserError: A new run's folder is not empty, or there is nothing to resume, or it is finished.
    """
    check_run_folder(out_dir, resume)
    out_dir = out_dir or new_folder(Path("runs") / recipe)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out_dir} cannot be a run's folder: {error.strerror}: give another --out_dir") from error
    say_how_to_go_on(f"go on with {resuming(out_dir)}")
    return out_dir


def resuming(out_dir: Path) -> str:
    """The words that resume the run in a folder, whose arguments need not say which it is."""
    return f"--config {out_dir / 'config.yaml'} --out_dir {out_dir} --resume"


def new_folder(parent: Path) -> Path:
    """A folder that is not there yet, named by the time; several runs may start in the same second.

    Under DDP the first process chooses, and the others, which it starts, learn it from the environment.
    """
    if not is_first_process() and DEFAULT_FOLDER in os.environ:
        return Path(os.environ[DEFAULT_FOLDER])
    name = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folder = next(parent / name for name in names if not (parent / name).exists())
    os.environ[DEFAULT_FOLDER] = str(folder)
    return folder


def refuse_another_run(out_dir: Path, arguments: dict[str, Any], scheme: UpdateScheme | None) -> None:
    """Raises ``UserError`` if the run in ``out_dir`` was started with other arguments or another scheme."""
    if changed := changed_argument(out_dir, arguments, MAY_CHANGE):
        raise UserError(f"the run in {out_dir} was started with {changed}: resume it with {resuming(out_dir)}")
    kept = out_dir / "scheme.json"
    if scheme is not None and kept.exists() and UpdateScheme.load(kept) != scheme:
        raise UserError(f"the run in {out_dir} was started with another scheme, {kept}: resume it with that one")


def changed_argument(out_dir: Path, arguments: dict[str, Any], may_change: Container[str]) -> str | None:
    """The first argument that is another than what the work in the folder was begun with, in words; None if all are.

    Args:
        out_dir: Folder with a ``config.yaml``.
        arguments: Flat and plain.
        may_change: Arguments that may differ.

    Example::

        changed_argument(Path("runs/x"), {"epochs": 4}, may_change=())  # "epochs 3, not 4"
    """
    begun = read_config(out_dir / "config.yaml")
    for name, value in arguments.items():
        if name not in may_change and name in begun and begun[name] != value:
            return f"{name} {begun[name]}, not {value}"
    return None


def read_config(path: Path) -> dict[str, Any]:
    """The arguments that a run was begun with."""
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read, it was damaged: give another folder") from error
    if not isinstance(begun, dict):
        raise UserError(f"{path} holds no arguments, it was damaged: give another folder")
    return begun


def write_config(out_dir: Path, arguments: dict[str, Any]) -> None:
    """Writes a recipe's arguments, flat and plain, as a file for its ``--config``."""
    with whole_file(out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(arguments, sort_keys=False), encoding="utf-8")
