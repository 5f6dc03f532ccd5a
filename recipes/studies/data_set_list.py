"""The data sets that a comparison goes over: a file that says of each its place, its networks and learning rates."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from microtune.datamodules.data_sets import DataName
from microtune.modules.atomic_files import write_json
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import TrialSettings

Numbers = Literal["fp32", "int8"]


@dataclass(frozen=True)
class DataSet:
    """One data set, and the network that meets it.

    Args:
        data: Name of the data module, as in ``--data``.
        weights: The network in floating point, as in ``--weights``.
        data_dir: Folder of the data.
        data_options: Further arguments of the data module.
        int8_network: The same network in int8, as in ``--network``; without it nothing is compared in int8.
        resolution: Height and width of images, in pixels.
        learning_rates: What is tried, from low to high; searches train with the one in the middle.

    Raises:
        UserError: There is no learning rate, or one that is not positive.

    Example::

        DataSet("cifar10", "weights.npz", "data", learning_rates=(0.003, 0.0125, 0.05))
    """

    data: DataName
    weights: str
    data_dir: str | None = None
    data_options: dict[str, Any] = field(default_factory=dict)
    int8_network: str | None = None
    resolution: int = 96
    learning_rates: Sequence[float] = (0.003, 0.0125, 0.05)

    def __post_init__(self):
        rates = self.learning_rates
        if not isinstance(rates, list | tuple) or not rates or not all(_is_positive(rate) for rate in rates):
            raise UserError(f"learning_rates is {rates!r}: give positive numbers, as in [0.003, 0.0125, 0.05]")

    @property
    def middle_rate(self) -> float:
        """What searches train with, and what a comparison begins from."""
        return sorted(self.learning_rates)[len(self.learning_rates) // 2]

    def trial_settings(
        self, numbers: Numbers, base_depth: int, steps: int, batch_size: int, **further
    ) -> TrialSettings:
        """The settings of trials of the network in floating point or in int8.

        Raises:
            UserError: There is no int8 network.
        """
        if numbers == "int8" and self.int8_network is None:
            raise UserError("there is no int8_network in the list of data sets: add it, or leave int8 out")
        network = {"weights": self.weights} if numbers == "fp32" else {"network": self.int8_network}
        return TrialSettings(
            data=self.data, data_dir=self.data_dir, data_options=self.data_options, resolution=self.resolution,
            base_depth=base_depth, steps=steps, batch_size=batch_size, learning_rate=self.middle_rate,
            **network, **further,
        )  # fmt: skip


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def keep_sources(data_sets: dict[str, DataSet], out_dir: Path) -> None:
    """Writes the hashes of the networks' files into the folder, or refuses to go on with others than lie there.

    Raises:
        UserError: A file is not what it was when the work in the folder began, or cannot be read.
    """
    path = out_dir / "sources.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for data_set in data_sets.values():
        for file in (data_set.weights, data_set.int8_network):
            if file is None or file in ("none", "torchvision"):
                continue
            try:
                found = hashlib.sha256(Path(file).read_bytes()).hexdigest()
            except OSError as error:
                raise UserError(f"{file}: cannot read the network: {error.strerror}") from error
            if known.setdefault(file, found) != found:
                raise UserError(
                    f"{file} is not what it was when the work in {out_dir} began, and what was measured with either "
                    "does not compare: give another --out_dir"
                )
    write_json(path, known)


def load_data_sets(path: Path | str, names: Sequence[str] | None = None) -> dict[str, DataSet]:
    """Reads a list of data sets: a JSON object from a name to the arguments of ``DataSet``.

    Args:
        path: Of the file.
        names: Which of them, all by default.

    Raises:
        UserError: The file is missing or no such list, or there is no data set of that name.

    Example::

        load_data_sets("recipes/results/data_sets.json", ["cifar10"])["cifar10"].weights
    """
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the list of data sets: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise UserError(f"{path}: this is no list of data sets: give an object from a name to its arguments")
    if unsuited := [name for name in entries if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"{path}: the name {unsuited[0]!r} would suit no table: give letters, digits and underscores")
    if unknown := [name for name in names or () if name not in entries]:
        raise UserError(f"{path} has no data set {unknown[0]!r}: it has {', '.join(entries)}")
    return {name: _data_set(path, name, entries[name]) for name in names or entries}


def _data_set(path: Path | str, name: str, entry: dict[str, Any]) -> DataSet:
    known = [one.name for one in fields(DataSet)]
    if unknown := [key for key in entry if key not in known]:
        raise UserError(f"{path}: {name} has the unknown key {unknown[0]!r}: give some of {', '.join(known)}")
    if missing := [key for key in known[:2] if key not in entry]:
        raise UserError(f"{path}: {name} has no {missing[0]!r}: add it")
    try:
        return DataSet(**entry)
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from error
