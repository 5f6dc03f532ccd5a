"""The state of a search: what a killed one goes on from, bit-equal."""

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microtune.modules.atomic_files import write_json
from microtune.modules.search.integer_program import Genome
from microtune.modules.user_error import UserError
from microtune.recipes.search.rungs import Known, fitness_of


@dataclass
class SearchState:
    """All that the next generation depends on, as plain values.

    Args:
        generation: The last finished one.
        population: Genomes of the survivors.
        fitness: Every genome evaluated so far, in that order, with its fitness on each rung that it was on; None where
            the evaluation was lost.
        history: A record of each generation.
        random_state: Of Python's global random numbers.
        table_sha256: Of the contribution table that the search goes by.
        learning_rate: That schemes are judged at; None before it is chosen, and of a search by the table.
        rate_steps: Optimizer steps that its choice took.
    """

    generation: int = 0
    population: list[Genome] = field(default_factory=list)
    fitness: dict[Genome, Known] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    random_state: tuple | None = None
    table_sha256: str | None = None
    learning_rate: float | None = None
    rate_steps: int = 0

    def save(self, path: Path) -> None:
        """Writes the state with the random numbers as they stand now."""
        version, numbers, gauss = random.getstate()
        write_json(
            path,
            {
                "generation": self.generation,
                "population": self.population,
                "fitness": [[genome, values] for genome, values in self.fitness.items()],
                "history": self.history,
                "random_state": [version, list(numbers), gauss],
                "table_sha256": self.table_sha256,
                "learning_rate": self.learning_rate,
                "rate_steps": self.rate_steps,
            },
        )

    @classmethod
    def load(cls, path: Path) -> "SearchState":
        """Reads what ``save`` wrote; where there is no file, the state of a search that has not begun.

        Raises:
            UserError: The file is damaged.
        """
        if not path.exists():
            return cls()
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            version, numbers, gauss = values["random_state"]
            state = cls(
                values["generation"],
                [tuple(genome) for genome in values["population"]],
                {tuple(genome): tuple(known) for genome, known in values["fitness"]},
                values["history"],
                (version, tuple(numbers), gauss),
                values["table_sha256"],
                values["learning_rate"],
                values["rate_steps"],
            )
            random.Random().setstate(state.random_state)
            if any(fitness_of(state.fitness[genome]) is None for genome in state.population):
                raise ValueError("a survivor has no fitness")
            return state
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read, it was damaged: remove it to begin the search again") from error

    def refuse_another_table(self, contributions: Path) -> None:
        """Raises ``UserError`` if the table's contents are not what the search was begun with; remembers them."""
        digest = hashlib.sha256(contributions.read_bytes()).hexdigest()
        if self.table_sha256 not in (None, digest):
            raise UserError(f"{contributions} has changed since the search was begun: start it anew without --resume")
        self.table_sha256 = digest
