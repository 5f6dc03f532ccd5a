"""What the tests of searches share."""

import pytest

from microtune.modules.memory.peak_memory import PeakMemory
from microtune.modules.search.contributions import ContributionTable
from microtune.modules.search.search_problem import SearchProblem
from microtune.recipes.training.networks import describe_network


@pytest.fixture(scope="session")
def problem(small_table) -> SearchProblem:
    """A small one: random gains, 30 KiB of extra memory."""
    described = describe_network("none", (3, 32, 32), 10)
    table = ContributionTable.load(small_table)
    return SearchProblem(described.name, PeakMemory(described.operations), table, 30 * 1024, "extra")
