"""The folder that a run writes, and its loggers."""

import itertools
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any, Literal

import torch
import wandb
import yaml
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from microtune.modules.atomic_files import whole_file
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError

LoggerName = Literal["wandb", "csv", "none"]
MOST_CLASSES_SHOWN = 100  # Weights & Biases cuts off a table of more than 200,000 rows, and nobody could read it
DEFAULT_FOLDER = "MICROTUNE_RUN_FOLDER"
# what a resumed run may do differently without ending elsewhere
MAY_CHANGE = {"resume", "out_dir", "data_dir", "download", "num_workers", "logger", "allow_oversize"}
MAY_CHANGE |= {"processes", "cluster", "features", "features_limit_mib", "features_dir"}


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
        if rank_zero_only.rank == 0 and not is_empty:
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
    return out_dir


def new_folder(parent: Path) -> Path:
    """A folder that is not there yet, named by the time; several runs may start in the same second.

    Under DDP the first process chooses, and the others, which it starts, learn it from the environment.
    """
    if rank_zero_only.rank != 0 and DEFAULT_FOLDER in os.environ:
        return Path(os.environ[DEFAULT_FOLDER])
    name = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folder = next(parent / name for name in names if not (parent / name).exists())
    os.environ[DEFAULT_FOLDER] = str(folder)
    return folder


def refuse_another_run(out_dir: Path, arguments: dict[str, Any], scheme: UpdateScheme | None) -> None:
    """Raises ``UserError`` if the run in ``out_dir`` was started with other arguments or another scheme."""
    started = read_config(out_dir / "config.yaml")
    for name, value in arguments.items():
        if name not in MAY_CHANGE and name in started and started[name] != value:
            raise UserError(
                f"the run in {out_dir} was started with {name} {started[name]}, not {value}: "
                f"resume it with --config {out_dir / 'config.yaml'} --resume"
            )
    kept = out_dir / "scheme.json"
    if scheme is not None and kept.exists() and UpdateScheme.load(kept) != scheme:
        raise UserError(f"the run in {out_dir} was started with another scheme, {kept}: resume it with that one")


def read_config(path: Path) -> dict[str, Any]:
    """The arguments that a run was begun with."""
    try:
        begun = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read, it was damaged: give another folder") from error
    if not isinstance(begun, dict):
        raise UserError(f"{path} holds no arguments, it was damaged: give another folder")
    return begun


def make_loggers(name: LoggerName, out_dir: Path, recipe: str) -> list[Logger]:
    """The CSV logger, which every run has, and Weights & Biases: online where the user is logged in, else offline.

    Nothing is asked. A resumed run goes on under its Weights & Biases id, and its metrics are in the next
    ``metrics/version_<n>/metrics.csv``.
    """
    loggers: list[Logger] = [CSVLogger(out_dir, name="metrics")]
    if name == "wandb":
        logging.getLogger("wandb").setLevel(logging.ERROR)
        os.environ.setdefault("WANDB_SILENT", "true")
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled") or not wandb.login(prompt=False)
        id_file = out_dir / "wandb_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        if rank_zero_only.rank == 0:
            # not by Lightning's offline=True, which sets a variable that wandb has read by now
            run = wandb.init(
                project="microtune",
                name=f"{recipe}/{out_dir.name}",
                dir=out_dir,
                id=id_file.read_text(),
                mode="offline" if offline else "online",
                resume="allow",
                reinit="finish_previous",
            )
            run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        loggers.append(WandbLogger(experiment=wandb.run))
    return loggers


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as values that YAML and Weights & Biases take."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}


def write_config(out_dir: Path, arguments: dict[str, Any]) -> None:
    """Writes a recipe's arguments as a file for its ``--config``."""
    with whole_file(out_dir / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(plain(arguments), sort_keys=False), encoding="utf-8")


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, so that a killed run always has one to go on from.

    Lightning's own writes to the system's temporary folder, and a move from there to another disk is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with whole_file(path) as partial:
            torch.save(checkpoint, partial)


def checkpoint_to_resume(out_dir: Path) -> Path | None:
    """The run's last checkpoint, if it has one yet.

    Raises:
        UserError: It cannot be read.
    """
    path = out_dir / "last.ckpt"
    if not path.exists():
        return None
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling raises on bytes that are no pickle is not bounded
        raise UserError(f"{path} cannot be read, it was damaged: remove it to begin the run again") from error
    return path


def wandb_run(loggers: list[Logger]) -> "wandb.Run | None":
    """The open Weights & Biases run, in the process that logs; else none."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and rank_zero_only.rank == 0:
            return logger.experiment
    return None


def log_run_start(
    run: "wandb.Run | None",
    arguments: dict[str, Any],
    scheme: UpdateScheme | None,
    memory: dict[str, Any],
    out_dir: Path,
) -> None:
    """Logs the arguments, the scheme, the MCU and the memory figures as config, and the scheme as an artifact."""
    if run is None:
        return
    run.config.update({"arguments": arguments, "memory": memory}, allow_val_change=True)
    if scheme is not None:
        run.config.update({"scheme": scheme.to_dict()}, allow_val_change=True)
        artifact = wandb.Artifact(f"update-scheme-{run.id}", type="update-scheme", metadata=scheme.to_dict())
        # immutable: taken from the run's folder when it is synced, not copied elsewhere first
        artifact.add_file(str(out_dir / "scheme.json"), policy="immutable", skip_cache=True)
        run.log_artifact(artifact)
        run.log({"memory": wandb.Image(str(out_dir / "memory.png"))})


def log_run_end(
    run: "wandb.Run | None", report: dict[str, Any], confusion: torch.Tensor, class_names: list[str]
) -> None:
    """Logs the results as the run's summary, and the confusion matrix."""
    if run is None:
        return
    run.summary.update({key: value for key, value in report.items() if isinstance(value, int | float)})
    if len(class_names) <= MOST_CLASSES_SHOWN:
        run.log({"test/confusion_matrix": confusion_matrix(confusion, class_names)})
    wandb.finish()


def confusion_matrix(confusion: torch.Tensor, class_names: list[str]) -> Any:
    """The counts (true class, predicted class) as a picture of Weights & Biases."""
    rows = [
        [class_names[actual], class_names[predicted], int(count)]
        for actual, counts in enumerate(confusion)
        for predicted, count in enumerate(counts)
    ]
    columns = ["Actual", "Predicted", "nPredictions"]
    table = wandb.Table(columns=columns, data=rows)
    return wandb.plot_table("wandb/confusion_matrix/v1", table, dict(zip(columns, columns, strict=True)))
