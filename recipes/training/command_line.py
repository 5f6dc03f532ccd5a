"""A recipe's typed function as its command line, with errors for people."""

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from microtune.modules.memory.microcontrollers import MICROCONTROLLERS
from microtune.modules.user_error import UserError


def run_recipe(main: Callable[..., Any]) -> Any:
    """Runs a recipe's ``main`` with the arguments of the command line or of ``--config FILE``.

    A user's mistake prints one line and exits with status 2, an interruption with 130.

    Example::

        if __name__ == "__main__":
            run_recipe(main)
    """
    say_how_to_go_on(None)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module="lightning|torchmetrics|jsonargparse")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False  # it has a handler of its own
    advertisement = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisement.addFilter(lambda record: "Tip:" not in record.getMessage())
    try:
        return called_with(main, parse(parser_of(main), sys.argv[1:]))
    except UserError as error:
        message = str(error)
        if "Original Traceback" in message:  # a data loader's process sends its traceback along
            message = message.strip().rpartition("UserError: ")[2]
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns an interruption of its Trainer into status 1
        if not isinstance(error, KeyboardInterrupt) and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print(f"stopped; {_how_to_go_on or 'the same command starts anew'}", file=sys.stderr)
        sys.exit(130)


_how_to_go_on: str | None = None  # of this process's work


def say_how_to_go_on(text: str | None) -> None:
    """Says what a recipe prints where it is interrupted from now on.

    Example::

        say_how_to_go_on("the same command goes on")
    """
    global _how_to_go_on
    _how_to_go_on = text


def option_groups(main: Callable[..., Any]) -> dict[str, type]:
    """The parameters of a recipe that are a dataclass of options, each field of which is a flag of its own."""
    return {name: kind for name, kind in get_type_hints(main).items() if name != "return" and is_dataclass(kind)}


def own_parameters(main: Callable[..., Any]) -> set[str]:
    """The other parameters of a recipe; each stands in the place of a group's field of its name."""
    return set(signature(main).parameters) - set(option_groups(main))


def parser_of(main: Callable[..., Any]) -> ArgumentParser:
    """The command line of a recipe: a flag for each parameter, and for each field of those that are dataclasses."""
    groups = option_groups(main)
    description = main.__doc__.partition("\n")[0] if main.__doc__ else None
    parser = ArgumentParser(description=description, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="config", help="File of arguments in YAML, such as a run's config.yaml.")
    parser.add_function_arguments(main, as_group=False, skip=set(groups))
    for kind in groups.values():
        parser.add_class_arguments(kind, skip=own_parameters(main))
    for action in parser._actions:
        if action.dest == "mcu":  # named here, so that the table of microcontrollers is all that there is to change
            action.help += f" Known are {', '.join(MICROCONTROLLERS)}."
    return parser


def called_with(main: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Calls a recipe with flat arguments, as the command line and ``config.yaml`` have them.

    Example::

        called_with(train_cifar.main, {"epochs": 3, "mcu": "rp2040"})
    """
    own = {name: arguments[name] for name in own_parameters(main) & arguments.keys()}
    others = {name: value for name, value in arguments.items() if name not in own}
    groups = {
        name: kind(**{field.name: others.pop(field.name) for field in fields(kind) if field.name in others})
        for name, kind in option_groups(main).items()
    }
    return main(**own, **others, **groups)


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arguments as ``config.yaml`` keeps them: the fields of dataclasses of options beside all others.

    Example::

        flat({"epochs": 3, "int8": Int8Options()})  # {"epochs": 3, "gradient_scaling": True, ...}
    """
    own = {name: value for name, value in arguments.items() if not is_dataclass(value)}
    result = {}
    for name, value in arguments.items():
        result |= {name: value} if name in own else asdict(value) | own
    return {name: str(value) if isinstance(value, Path) else value for name, value in result.items()}


def parse(parser: ArgumentParser, words: list[str]) -> dict[str, Any]:
    """The flat arguments that ``words`` give, with a ``UserError`` of one line where the parser's has many."""
    try:
        arguments = parser.parse_args(with_values_for_flags(parser, words))
    except ArgumentError as error:
        raise UserError(f"{readable(' '.join(str(error).split()))}; --help lists the options") from error
    except UnicodeDecodeError as error:
        raise UserError("the file of --config is binary: give YAML, such as the config.yaml of a run") from error
    arguments.pop("config", None)
    return arguments.as_dict()


def listed(text: str | None) -> list[str] | None:
    """The parts of a list that the command line gives as ``a,b,c``, or None for None; blanks are an error.

    Example::

        listed("en, ar")  # ["en", "ar"]
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if " " in part:
            raise UserError(f"{part!r} has blanks in it: separate by commas, as in {part.replace(' ', ',')}")
    return parts


def numbers(text: str, kind: type) -> list[Any]:
    """The numbers of a list such as ``0.25,0.5``.

    Example::

        numbers("1,2", int)  # [1, 2]
    """
    try:
        return [kind(part) for part in listed(text)]
    except ValueError as error:
        raise UserError(f"{text!r} is no list of numbers: separate them by commas, as in 0.25,0.5") from error


EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
EXPECTED["dict"] = """JSON such as '{"languages": ["ar"]}'"""


def readable(error: str) -> str:
    """The parser's error about the type of a value, in words; any other as it is.

    Example::

        readable("Parser key \"epochs\": Expected a <class 'int'>. Got value: x")
        # "epochs is x: give a whole number"
    """
    key, value = re.search(r'Parser key "([^"]+)"', error), re.search(r"(?:Got|Given) value: (.*)", error)
    types = re.findall(r"Expected an? (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", error)
    wanted = [EXPECTED.get(name) if name else f"one of {choices}" for name, choices in types if name != "NoneType"]
    if key is None or value is None or not wanted or None in wanted:
        return error
    return f"{key[1]} is {value[1]}: give {' or '.join(wanted)}"


def with_values_for_flags(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Lets ``--json`` stand for ``--json true``."""
    switches = {f"--{name}" for name, value in parser.get_defaults().items() if isinstance(value, bool)}
    result = []
    for word, following in zip(words, [*words, "--"][1:], strict=True):
        result += [word, "true"] if word in switches and following.startswith("-") else [word]
    return result


def check_at_least_one(**values: int | None) -> None:
    """Raises ``UserError`` if a number is below 1; None stands for a default.

    Example::

        check_at_least_one(rounds=rounds, threads=threads)
    """
    for name, value in values.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")
