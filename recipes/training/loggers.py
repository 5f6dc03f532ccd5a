"""The loggers of a run: its CSV, and Weights & Biases."""

import logging
import os
import uuid
from pathlib import Path
from typing import Any

import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.recipes.training.options import LoggerName

MOST_CLASSES_SHOWN = 100  # Weights & Biases cuts off a table of more than 200,000 rows, and nobody could read it


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
