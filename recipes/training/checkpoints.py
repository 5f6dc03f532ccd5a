"""The checkpoint that a run goes on from."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from microtune.modules.atomic_files import whole_file
from microtune.modules.user_error import UserError


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
