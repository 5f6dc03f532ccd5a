"""Ways to train: where a way's update scheme comes from, and what differs in its training."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from microtune.modules.search.short_training import Choice, Int8Update
from microtune.modules.sparse_update.channel_importance import Criterion
from microtune.modules.sparse_update.int8_update import WeightStorage
from microtune.modules.user_error import UserError
from microtune.recipes.search.options import Level
from microtune.recipes.studies.named_json import checked, read_named
from microtune.recipes.training.command_line import listed

Numbers = Literal["fp32", "int8"]
RULES = ("last_layers", "biases", "expanding", "random")  # fill a budget
WHOLE = ("full", "classifier")  # whatever the budget
SEARCHES = ("gradient", "accuracy")
# which schemes a field is for; any scheme, where it does not stand here
OF_SCHEMES = {
    "ratio": ("expanding",),
    "deepest": ("last_layers", "biases", "expanding"),
    "level": SEARCHES,
    "channel_multiple": SEARCHES,
    "evaluations": ("accuracy",),
    "search_numbers": SEARCHES,
    "open_channels": SEARCHES,
}


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Way:
    """A way to train.

    Args:
        scheme: A scheme's JSON file; last_layers, biases, expanding (as many of the last expanding convolutions as
            fit) or random (another for each seed), which fill the budget; classifier or full; or gradient or accuracy:
            by which a scheme is searched. None for the scheme that a study gives to all.
        ratio: Fraction of each layer's input channels, of expanding.
        deepest: Bias depth beyond which a rule does not go.
        level: sub_tensor or layer: whether a search may update parts of layers.
        channel_multiple: Numbers of channels that a search chooses are multiples of it.
        evaluations: Schemes that a search by accuracy trains.
        search_numbers: What the network computes in while a scheme is searched; by default as in training.
        open_channels: Take of what a search found how many channels of each layer, but not which.
        numbers: What the network computes in: fp32 or int8; by default each that the study asks for.
        weight_storage: Of an int8 network, in_place or latent.
        gradient_scaling: Of an int8 network, whether its gradients are scaled.
        criterion: By which score the channels that the scheme leaves open are chosen.
        rechoose_every: Steps after which they are chosen anew; 0 for once, at the start.
        choice_samples: Training samples that they are chosen by.
        batch_size: Samples per step; by default the study's. With another a way sees as many samples in as many more
            or fewer steps, and its learning rate is in proportion.
        learning_rate: At its highest; by default as the study says.
        rate_of: Name of the way whose learning rate is taken, where the study chooses the best of some.

    Example::

        Way("expanding", ratio=0.25, criterion="taylor", rechoose_every=25)
    """

    scheme: str | None = None
    ratio: Annotated[float, Field(gt=0, le=1)] = 1.0
    deepest: Annotated[int, Field(ge=0)] | None = None
    level: Level = "sub_tensor"
    channel_multiple: Annotated[int, Field(ge=1)] = 1
    evaluations: Annotated[int, Field(ge=1)] = 32
    search_numbers: Numbers | None = None
    open_channels: bool = False
    numbers: Numbers | None = None
    weight_storage: WeightStorage = "in_place"
    gradient_scaling: bool = True
    criterion: Criterion = "weight_norm"
    rechoose_every: Annotated[int, Field(ge=0)] = 0
    choice_samples: Annotated[int, Field(ge=1)] = 256
    batch_size: Annotated[int, Field(ge=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    rate_of: str | None = None

    @property
    def choice(self) -> Choice:
        """How the channels that the scheme leaves open are chosen."""
        return Choice(self.criterion, self.rechoose_every, self.choice_samples)

    @property
    def int8_update(self) -> Int8Update:
        """How an int8 network is updated."""
        return Int8Update(self.weight_storage, self.gradient_scaling)

    @property
    def source(self) -> "Way":
        """What of the way decides its scheme: ways that share it share the scheme."""
        return replace(Way(), **{name: getattr(self, name) for name in ("scheme", *OF_SCHEMES)})

    @property
    def has_budget(self) -> bool:
        """Whether the scheme depends on the budget, or must be within it."""
        return self.scheme not in WHOLE


def load_ways(words: str | None, file: Path | str | None = None, scheme: str | None = None) -> dict[str, Way]:
    """The ways of the command line, by name.

    Args:
        words: Ways separated by commas: names of ways in the file, or schemes with or without a name and fields, as in
            ``evolved=scheme.json,biases,quarter=expanding:ratio=0.25``. By default all of the file.
        file: JSON with an object from the name of a way to its fields.
        scheme: Of the ways that do not say theirs.

    Raises:
        UserError: There is no way, two have the same name, or one is wrong.

    Example::

        load_ways("evolved=scheme.json,biases:learning_rate=0.05")
        # {"evolved": Way("scheme.json"), "biases": Way("biases", learning_rate=0.05)}
    """
    of_file = {} if file is None else read_named(file, Way, "ways")
    if words is None:
        ways = of_file
    else:
        pairs = [(word, of_file[word]) if word in of_file else _of_word(word) for word in listed(words)]
        if doubled := [name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1]:
            raise UserError(f"two ways have the name {doubled[0]}: give each its own")
        ways = dict(pairs)
    if not ways:
        raise UserError("there is nothing to compare: give --ways such as evolved=scheme.json,last_layers,biases")
    ways = {name: way if way.scheme is not None else replace(way, scheme=scheme) for name, way in ways.items()}
    for name, way in ways.items():
        _check(name, way, ways)
    return ways


def _of_word(word: str) -> tuple[str, Way]:
    """A name and a way such as ``quarter=expanding:ratio=0.25``; without a name that of the scheme."""
    found = re.fullmatch(r"(?:(?P<name>\w*)=)?(?P<scheme>.*?)(?P<fields>(?::\w+=[^:]*)*)", word)
    scheme, name = found["scheme"], found["name"]
    if name is None:
        name = scheme
    if not scheme or (name == scheme and scheme not in (*RULES, *WHOLE, *SEARCHES)):
        raise UserError(
            f"way {word!r} is none: give name=FILE.json, or one of {', '.join((*RULES, *WHOLE, *SEARCHES))}, each with "
            "fields if need be, as in quarter=expanding:ratio=0.25"
        )
    fields = dict(part.split("=", 1) for part in found["fields"].split(":")[1:])
    return name, checked(name, {"scheme": scheme, **fields}, Way)


def _check(name: str, way: Way, ways: dict[str, Way]) -> None:
    """Raises ``UserError`` where fields of a way make no sense together."""
    if way.scheme is None:
        raise UserError(f"way {name} has no scheme: give it one, or --scheme for all that have none")
    plain = Way()
    for field, schemes in OF_SCHEMES.items():
        if getattr(way, field) != getattr(plain, field) and way.scheme not in schemes:
            raise UserError(
                f"way {name}: {field} is of the scheme {' or '.join(schemes)}, not {way.scheme}: leave it out"
            )
    if way.numbers == "fp32" and way.int8_update != plain.int8_update:
        raise UserError(f"way {name}: weight_storage and gradient_scaling are of an int8 network: leave them out")
    if way.rate_of is not None and (way.rate_of not in ways or ways[way.rate_of].rate_of is not None):
        others = ", ".join(one for one in ways if ways[one].rate_of is None)
        raise UserError(f"way {name}: rate_of is {way.rate_of!r}: give a way with a rate of its own, one of {others}")
    if way.rate_of is not None and way.learning_rate is not None:
        raise UserError(f"way {name} has learning_rate and rate_of: leave one of them out")


def numbers_of(way: Way, asked_for: Sequence[Numbers]) -> Sequence[Numbers]:
    """What the network of a way computes in: its own, or each that the study asks for."""
    return asked_for if way.numbers is None else (way.numbers,)
