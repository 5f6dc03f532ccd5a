"""A recipe's typed function as its command line, with errors for people."""

import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, Namespace, auto_parser

from microtune.modules.user_error import UserError


def run(main: Callable[..., Any]) -> Any:
    """Runs a recipe's ``main`` with the arguments of the command line or of ``--config FILE``.

    A user's mistake prints one line and exits with status 2, an interruption with 130.

    Example::

        if __name__ == "__main__":
            run(main)
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", module="lightning|torchmetrics|jsonargparse")
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False  # it has a handler of its own
    advertisement = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    advertisement.addFilter(lambda record: "Tip:" not in record.getMessage())
    parser = auto_parser(main, as_positional=False, allow_abbrev=False, exit_on_error=False)
    try:
        arguments = parse(parser, sys.argv[1:])
        return main(**arguments.as_dict())
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
        print("stopped; --resume with the same arguments goes on, where the recipe has it", file=sys.stderr)
        sys.exit(130)


def parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    """The arguments that ``words`` give, with a ``UserError`` of one line where the parser's has many."""
    try:
        arguments = parser.parse_args(with_values_for_flags(parser, words))
    except ArgumentError as error:
        raise UserError(f"{readable(' '.join(str(error).split()))}; --help lists the options") from error
    except UnicodeDecodeError as error:
        raise UserError("the file of --config is binary: give YAML, such as the config.yaml of a run") from error
    arguments.pop("config", None)
    return arguments


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


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a recipe whose ``main`` ends in ``**options``: what ``locals()`` says at its beginning.

    Example::

        flat({"epochs": 3, "options": {"mcu": "rp2040"}})  # {"epochs": 3, "mcu": "rp2040"}
    """
    return {name: value for name, value in arguments.items() if name != "options"} | arguments["options"]


EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


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
