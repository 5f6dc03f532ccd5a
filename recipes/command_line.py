"""A recipe's typed function as its command line, with errors for people."""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser, auto_parser

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
    parser = auto_parser(main, as_positional=False, allow_abbrev=False)
    arguments = parser.parse_args(with_values_for_flags(parser, sys.argv[1:]))
    arguments.pop("config", None)
    try:
        return main(**parser.instantiate_classes(arguments))
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; --resume with the same arguments goes on, where the recipe has it", file=sys.stderr)
        sys.exit(130)


def with_values_for_flags(parser: ArgumentParser, words: list[str]) -> list[str]:
    """Lets ``--json`` stand for ``--json true``."""
    switches = {f"--{name}" for name, value in parser.get_defaults().items() if isinstance(value, bool)}
    result = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        result += [word, "true"] if word in switches and following.startswith("-") else [word]
    return result


def arguments_as_yaml(main: Callable[..., Any], arguments: dict[str, Any]) -> str:
    """The arguments of a recipe's ``main`` as a file for ``--config``."""
    return auto_parser(main, as_positional=False).dump(arguments)
