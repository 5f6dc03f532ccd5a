"""Update schemes of many kinds within one budget: what a search may come upon, and what it has to be ahead of."""

import random
from collections.abc import Callable
from dataclasses import replace

from microtune.modules.search.integer_program import Genome
from microtune.modules.search.search_problem import SearchProblem
from microtune.modules.sparse_update.update_scheme import UpdateScheme
from microtune.modules.user_error import UserError
from microtune.recipes.search.budget import Budget
from microtune.recipes.search.genetic_algorithm import FILLING_NOISE, rules_of_thumb
from microtune.recipes.search.gradient_search import MeasuredGradient, gradient_search
from microtune.recipes.search.options import Level
from microtune.recipes.search.table_search import Search
from microtune.recipes.training.networks import DescribedNetwork

MOST_TRIES = 100  # in a row, to draw one that is not among the others
# kinds that are drawn, with their share of the schemes: by level, with repair by gain, blindly, or beside the one-pass
DRAWN = {"random": 0.35, "random_layers": 0.25, "random_blind": 0.15, "neighbour": 0.15, "neighbour_layers": 0.1}


def sampled_schemes(
    described: DescribedNetwork, measured: MeasuredGradient, budget: Budget, base_depth: int, count: int, seed: int
) -> dict[str, UpdateScheme]:
    """Distinct schemes within a budget, by name; the name without its number is the kind.

    - ``one_pass``, ``one_pass_layers``: the best by the gradient, of sub-tensors and of whole layers.
    - ``last_layers``, ``rule``: as many of the last layers as fit, each with a fraction of its channels.
    - ``random``, ``random_layers``: drawn at random, then repaired and filled by gain per byte as a search does it.
    - ``random_blind``: drawn at random, of which updates are thrown out at random until it fits.
    - ``neighbour``, ``neighbour_layers``: one move away from the best by the gradient.

    Args:
        described: The network.
        measured: Its gradient.
        budget: What a scheme may take.
        base_depth: Deepest bias depth.
        count: Number of schemes.
        seed: Of what is drawn.

    Raises:
        UserError: There are not so many schemes.
    """
    searches: dict[Level, Search] = {
        level: gradient_search(described, measured, budget, base_depth, level, 1, is_coarse=True)
        for level in ("sub_tensor", "layer")
    }
    sub_tensor, layer = searches["sub_tensor"], searches["layer"]
    found: dict[str, UpdateScheme] = {}

    def keep(kind: str, of: Search, genome: Genome) -> bool:
        scheme = of.problem.scheme(genome)
        if len(found) == count or any(is_like(scheme, other) for other in found.values()):
            return False
        number = sum(kind_of(name) == kind for name in found)
        found[f"{kind}_{number}"] = replace(scheme, provenance={"kind": kind, "seed": seed})
        return True

    keep("one_pass", sub_tensor, sub_tensor.optimum.genome)
    keep("one_pass_layers", layer, layer.optimum.genome)
    keep("last_layers", layer, rules_of_thumb(layer.problem)[0])
    for genome in rules_of_thumb(sub_tensor.problem)[1::2]:
        keep("rule", sub_tensor, genome)
    rng = random.Random(seed)
    neighbours = {level: of.problem.neighbours(of.optimum.genome) for level, of in searches.items()}
    draw: dict[str, tuple[Search, Callable[[], Genome]]] = {
        "random": (sub_tensor, lambda: repaired(sub_tensor.problem, rng)),
        "random_layers": (layer, lambda: repaired(layer.problem, rng)),
        "random_blind": (sub_tensor, lambda: blindly_repaired(sub_tensor.problem, rng)),
        "neighbour": (sub_tensor, lambda: rng.choice(neighbours["sub_tensor"])),
        "neighbour_layers": (layer, lambda: rng.choice(neighbours["layer"])),
    }

    def keep_drawn(kind: str, wanted: int) -> None:
        of, drawn = draw[kind]
        failures = 0
        while wanted and failures < MOST_TRIES:
            is_kept = keep(kind, of, drawn())
            wanted, failures = (wanted - 1, 0) if is_kept else (wanted, failures + 1)

    left = count - len(found)
    for kind, share in DRAWN.items():
        keep_drawn(kind, round(share * left))
    keep_drawn("random", count - len(found))
    if len(found) < count:
        raise UserError(f"there are only {len(found)} of {count} schemes within {budget}: give fewer --schemes")
    return found


def kind_of(name: str) -> str:
    """The kind of a scheme by its name.

    Example::

        kind_of("random_layers_3")  # "random_layers"
    """
    return name.rpartition("_")[0]


def is_like(scheme: UpdateScheme, other: UpdateScheme) -> bool:
    """Whether two schemes update the same."""
    return replace(scheme, provenance={}) == replace(other, provenance={})


def repaired(problem: SearchProblem, rng: random.Random) -> Genome:
    """One as a search's immigrants are."""
    return problem.repair(problem.random_genome(rng), rng, FILLING_NOISE)


def blindly_repaired(problem: SearchProblem, rng: random.Random) -> Genome:
    """One whose choice the gains have no part in."""
    return problem.blind_repair(problem.random_genome(rng), rng)
