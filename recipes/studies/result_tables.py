"""Markdown tables of measured accuracies: one cell is a mean over seeds, and differences are paired."""

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product

from microtune.modules.memory.microcontrollers import KIB
from microtune.recipes.studies.result_rows import (
    BUDGETS,
    CRITERIA,
    DATA,
    METHODS,
    NUMBERS,
    SEEDS,
    Result,
    budget_name,
    data_sets_of,
    sorted_budgets,
    title_of,
)
from microtune.recipes.studies.student_interval import interval

COLUMNS = 120  # of a line of Markdown
DASH = "-"
ASIDE = ("one_pass_4",)  # shown where it is measured
WITH_BUDGET = [method for method in METHODS if method != "full"]
# of differences: what is measured against what
PAIRS = (
    ("sub_tensor", "layers"),
    ("sub_tensor", "biases"),
    ("sub_tensor", "last_layers"),
    ("one_pass", "sub_tensor"),
    ("one_pass_4", "one_pass"),
    ("dynamic", "sub_tensor"),
)
SHORT = {
    "sub_tensor": "sub-tensors",
    "one_pass": "one pass",
    "one_pass_4": "multiples of 4",
    "last_layers": "last layers",
    "dynamic": "dynamic",
    "layers": "layers",
    "biases": "biases",
}
REFERENCE = ("weight_norm", 0)  # criterion and steps between choices: the paper's, chosen once


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers.

    Example::

        markdown_table(["method", "top-1, %"], [["biases only", "79.8"]])
    """
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (header, rule, *rows))


def paragraph(text: str) -> str:
    """The text, broken into lines."""
    return textwrap.fill(text, COLUMNS, break_long_words=False, break_on_hyphens=False) + "\n"


def accuracy_cell(top1: Collection[float], usual: int) -> str:
    """Mean and standard deviation in per cent; a dash without values.

    Args:
        top1: Fractions, one for each seed.
        usual: How many there are in other cells; a cell with fewer says how many it has.

    Example::

        accuracy_cell([0.81, 0.82, 0.83], 3)  # "82.0 ± 1.0"
        accuracy_cell([0.81], 3)  # "81.0 (1)"
    """
    if not top1:
        return DASH
    spread = f" ± {statistics.stdev(top1) * 100:.1f}" if len(top1) > 1 else ""
    return f"{statistics.mean(top1) * 100:.1f}{spread}{_count(len(top1), usual)}"


def difference_cell(differences: Sequence[float], usual: int) -> str:
    """Mean and 95 % interval in points, with a star where the interval excludes zero; a dash without values.

    Args:
        differences: Fractions, paired.
        usual: As in ``accuracy_cell``.

    Example::

        difference_cell([0.01, 0.02, 0.03], 3)  # "+2.0 [-0.5, 4.5]"
    """
    if not differences:
        return DASH
    text, low_and_high = _points(statistics.mean(differences), "+"), interval(differences)
    if low_and_high:
        low, high = low_and_high
        text += f" [{_points(low)}, {_points(high)}]{'*' if low > 0 or high < 0 else ''}"
    return text + _count(len(differences), usual)


def with_best_bold(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """The cells with the highest mean of each column, as it is shown, in bold.

    Example::

        with_best_bold([["81.0 ± 0.2"], ["82.0 ± 0.3"]])  # [["81.0 ± 0.2"], ["**82.0 ± 0.3**"]]
    """
    best = [max((_mean_of(cell) for cell in column), default=0.0) for column in zip(*lines, strict=True)]
    return [
        [
            f"**{cell}**" if cell != DASH and _mean_of(cell) == top else cell
            for cell, top in zip(line, best, strict=True)
        ]
        for line in lines
    ]


def paired_differences(
    rows: Iterable[Result], other: Iterable[Result], pair: Callable[[Result], tuple[str | int, ...]]
) -> list[float]:
    """By how much the top-1 of the first rows is higher, for each pair.

    Args:
        rows: What is measured.
        other: What it is measured against.
        pair: What both rows of a pair have in common, such as their seed; those without another are left out.

    Example::

        paired_differences(sub_tensor, biases, lambda row: (row.budget, row.seed))
    """
    top1, of_other = ({pair(row): row.top1 for row in some} for some in (rows, other))
    return [top1[key] - of_other[key] for key in sorted(top1.keys() & of_other.keys())]


def most_seeds(rows: Sequence[Result]) -> int:
    """How many seeds the cell that has most of them has."""
    return max(Counter(row.key[:-1] for row in rows).values())


def how_to_read(rows: Sequence[Result]) -> str:
    """What the tables of ``results_section`` show.

    Args:
        rows: Of all data sets, at least one.
    """
    return paragraph(
        f"Top-1 on the test split in %, {_spread(most_seeds(rows))}; in bold the best within each budget. The budgets "
        "are KiB of extra memory, and an STM32F746 by the peak of a training step. Below each table are differences in "
        "points, paired over the seeds, with their 95 % interval; * marks those that exclude zero, as one in twenty "
        "would by chance."
    )


def results_section(rows: Sequence[Result]) -> str:
    """The tables of one data set: accuracy by method and budget, and the differences, for each kind of numbers.

    Args:
        rows: Of one data set, at least one, in any order.
    """
    first, usual = rows[0], most_seeds(rows)
    told = f"Every method was trained for {first.steps:,} steps of batch size {first.batch_size}."
    parts = [f"### {title_of(first.data)}\n", paragraph(told)]
    for numbers in NUMBERS:
        of_numbers = [row for row in rows if row.numbers == numbers]
        if of_numbers:
            parts += [accuracy_table(of_numbers, usual), full_update(of_numbers, usual)]
            parts.append(differences_table(of_numbers, usual))
    return "\n".join(part for part in parts if part)


def accuracy_table(rows: Sequence[Result], usual: int) -> str:
    """Methods by budgets.

    Args:
        rows: Of one data set and one kind of numbers.
        usual: As in ``accuracy_cell``.
    """
    top1: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        top1.setdefault((row.way, row.budget), []).append(row.top1)
    methods = [method for method in WITH_BUDGET if _is_shown(method, rows)]
    lines = [[accuracy_cell(top1.get((method, budget), []), usual) for budget in BUDGETS] for method in methods]
    header = [f"{rows[0].numbers}, top-1 in %", *map(budget_name, BUDGETS)]
    named = zip(methods, with_best_bold(lines), strict=True)
    return markdown_table(header, [[METHODS[method], *cells] for method, cells in named])


def full_update(rows: Sequence[Result], usual: int) -> str:
    """A line about full update, which has no budget, and what it takes; empty without its rows."""
    full = [row for row in rows if row.way == "full"]
    if not full:
        return ""
    extra, peak = (
        statistics.mean(getattr(row, name) for row in full) / KIB
        for name in ("extra_memory_bytes", "peak_memory_bytes")
    )
    return paragraph(
        f"Full update in {full[0].numbers}: {accuracy_cell([row.top1 for row in full], usual)} %, with {extra:,.1f} "
        f"KiB of extra memory and {peak:,.1f} KiB at its peak."
    )


def _is_shown(method: str, rows: Iterable[Result]) -> bool:
    return method not in ASIDE or any(row.way == method for row in rows)


def differences_table(rows: Sequence[Result], usual: int) -> str:
    """Paired differences over the seeds, by budget; empty where there are none.

    Args:
        rows: Of one data set and one kind of numbers.
        usual: As in ``accuracy_cell``.
    """
    lines = []
    for method, other in PAIRS:
        if not _is_shown(method, rows):
            continue
        cells = []
        for budget in BUDGETS:
            of_budget = [row for row in rows if row.budget == budget]
            differences = paired_differences(
                (row for row in of_budget if row.way == method),
                (row for row in of_budget if row.way == other),
                lambda row: (row.seed,),
            )
            cells.append(difference_cell(differences, usual))
        lines.append([f"{SHORT[method]} minus {SHORT[other]}", *cells])
    if all(cell == DASH for _, *cells in lines for cell in cells):
        return ""
    return markdown_table([f"{rows[0].numbers}, points", *map(budget_name, BUDGETS)], lines)


def search_time_section(rows: Sequence[Result]) -> str:
    """Seconds to get a scheme from one backward pass and by a search, and what they are worth; empty without either.

    Args:
        rows: Of all data sets.
    """
    methods = ("one_pass", "layers", "sub_tensor")
    seconds: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row.way in methods:
            seconds.setdefault((row.way, row.numbers), []).append(row.search_seconds)
    present = [numbers for numbers in NUMBERS if any(numbers == of for _, of in seconds)]
    if not present:
        return ""
    lines = []
    for method in methods:
        cells = []
        for numbers in present:
            taken = seconds.get((method, numbers))
            cells.append(_seconds(statistics.mean(taken)) if taken else DASH)
            cells.append("" if method == "one_pass" else _one_pass_minus(method, numbers, rows))
        lines.append([METHODS[method], *cells])
    header = ["scheme", *(text for numbers in present for text in (f"{numbers}, seconds", "one pass minus this"))]
    told = paragraph(
        "Seconds to get a scheme, mean over data sets, budgets and seeds, from the start of the program on, with two "
        "searches at a time; schemes of whole layers and of sub-tensors are searched in floating point, and int8 takes "
        "the same. And by how many points of top-1 the scheme from one backward pass is better, paired over data sets, "
        "budgets and seeds, with the 95 % interval over these pairs, taken as independent; * where it excludes zero; "
        "in parentheses, how many pairs."
    )
    return "\n".join(["### Time to get a scheme\n", told, markdown_table(header, lines)])


def _one_pass_minus(method: str, numbers: str, rows: Iterable[Result]) -> str:
    of_numbers = [row for row in rows if row.numbers == numbers]
    differences = paired_differences(
        (row for row in of_numbers if row.way == "one_pass"),
        (row for row in of_numbers if row.way == method),
        lambda row: (row.data, row.budget, row.seed),
    )
    return difference_cell(differences, usual=0)


def missing_rows(rows: Iterable[Result]) -> list[str]:
    """What is not measured yet, in words, one line for each method and budget, or for more where more is missing.

    CIFAR-100, which is not in everybody's hands, is missed only where some row of it is there, and what is measured
    aside never.

    Example::

        missing_rows(rows)[0]  # "int8 dynamic at stm32f746 on mswc_arabic, seeds 1, 2"
    """
    rows = list(rows)
    found = {row.key for row in rows}
    some = {key[:length] for key in found for length in (1, 2, 3)}
    lines = []
    for data in dict.fromkeys([*DATA, *data_sets_of(rows)]):
        if (data,) not in some:
            if data != "cifar100":
                lines.append(f"{data}, all rows")
            continue
        for numbers in NUMBERS:
            if (data, numbers) not in some:
                lines.append(f"{numbers} on {data}, all rows")
                continue
            for method in METHODS:
                if method not in ASIDE:
                    lines += _missing_of(data, numbers, method, found)
    return lines


def _missing_of(data: str, numbers: str, method: str, found: Collection[tuple[str | int, ...]]) -> list[str]:
    budgets = ("none",) if method == "full" else BUDGETS
    seeds_of = {budget: [s for s in SEEDS if (data, numbers, method, budget, s) not in found] for budget in budgets}
    if method != "full" and all(len(seeds) == len(SEEDS) for seeds in seeds_of.values()):
        return [f"{numbers} {method} on {data}, all budgets and seeds"]
    return [
        f"{numbers} {method}{'' if budget == 'none' else f' at {budget}'} on {data}, {_seeds(seeds)}"
        for budget, seeds in seeds_of.items()
        if seeds
    ]


def missing_selection_rows(rows: Sequence[Result]) -> list[str]:
    """What is not measured yet of the ways, budgets and seeds that a data set has some row of, in words.

    Example::

        missing_selection_rows(rows)  # ["fisher, every 50 steps at extra64 on cifar10, seeds 1, 2"]
    """
    found = {(row.data, row.criterion, row.rechoose_every, row.budget, row.seed) for row in rows}
    lines = []
    for data in data_sets_of(rows):
        of_data = [row for row in rows if row.data == data]
        every_seed = sorted({row.seed for row in of_data})
        for way, budget in product(ways_to_choose(of_data), sorted_budgets(row.budget for row in of_data)):
            if seeds := [seed for seed in every_seed if (data, *way, budget, seed) not in found]:
                lines.append(f"{selection_name(*way)} at {budget} on {data}, {_seeds(seeds)}")
    return lines


def selection_name(criterion: str, rechoose_every: int) -> str:
    """A way to choose channels, in words.

    Example::

        selection_name("weight_norm", 0)  # "weight norm, static"
        selection_name("fisher", 50)  # "fisher, every 50 steps"
    """
    return f"{criterion.replace('_', ' ')}, {f'every {rechoose_every} steps' if rechoose_every else 'static'}"


def ways_to_choose(rows: Iterable[Result]) -> list[tuple[str, int]]:
    """Each criterion and number of steps between choices once: the static ones first, of these the weight norm."""
    ways = {(row.criterion, row.rechoose_every) for row in rows}
    return sorted(ways, key=lambda way: (way[1], CRITERIA.index(way[0])))


def selection_section(rows: Sequence[Result], pictures: Mapping[str, str] | None = None) -> str:
    """All tables of ways to choose channels: one for each data set, and the differences over all.

    Args:
        rows: Of all data sets, in any order; of none there is no text.
        pictures: File of the picture of a data set, which is shown below its table.
    """
    if not rows:
        return ""
    told = paragraph(
        f"Top-1 on the test split in %, {_spread(most_seeds(rows))}, by which criterion the channels are chosen, and "
        "how often: once (static) or anew every so many steps; in bold the best within each budget. The last column is "
        "by how many points it is better than the weight norm, static: paired over budgets and seeds, with the 95 % "
        "interval over these pairs, taken as independent; * marks those that exclude zero; in parentheses, how many "
        "pairs."
    )
    texts = ["### Which channels\n", told]
    for data in data_sets_of(rows):
        of_data = [row for row in rows if row.data == data]
        steps, batch_size = of_data[0].steps, of_data[0].batch_size
        texts.append(paragraph(f"{title_of(data)}, {steps:,} steps of batch size {batch_size} for every row:"))
        texts.append(selection_table(of_data))
        if pictures and data in pictures:
            texts.append(f"![channel selection: {title_of(data)}]({pictures[data]})\n")
    return "\n".join(text for text in [*texts, _pooled_differences(rows)] if text)


def selection_table(rows: Sequence[Result]) -> str:
    """Criteria by budgets: mean and standard deviation over the seeds, and the difference to the weight norm's.

    Args:
        rows: Of one data set, at least one, in any order.

    Example::

        selection_table([row for row in read_rows("channel_selection.csv", Result) if row.data == "cifar10"])
    """
    usual, budgets = most_seeds(rows), sorted_budgets(row.budget for row in rows)
    top1: dict[tuple[str, int, str], list[float]] = {}
    for row in rows:
        top1.setdefault((row.criterion, row.rechoose_every, row.budget), []).append(row.top1)
    ways = ways_to_choose(rows)
    lines = with_best_bold([[accuracy_cell(top1.get((*way, b), []), usual) for b in budgets] for way in ways])
    header = ["channels by", *map(budget_name, budgets), "minus weight norm"]
    differences = selection_differences(rows)
    named = zip(ways, lines, strict=True)
    return markdown_table(header, [[selection_name(*way), *line, differences.get(way, "")] for way, line in named])


def selection_differences(rows: Sequence[Result]) -> dict[tuple[str, int], str]:
    """For each way to choose but the reference its difference to it, pooled over all that ``rows`` has."""
    of_way: dict[tuple[str, int], list[Result]] = {}
    for row in rows:
        of_way.setdefault((row.criterion, row.rechoose_every), []).append(row)
    reference = of_way.get(REFERENCE, [])

    def cell(some: list[Result]) -> str:
        return difference_cell(paired_differences(some, reference, lambda row: (row.data, row.budget, row.seed)), 0)

    return {way: cell(of_way[way]) for way in ways_to_choose(rows) if way != REFERENCE}


def _pooled_differences(rows: Sequence[Result]) -> str:
    """The differences to the weight norm over all data sets; empty of a single one."""
    names = [title_of(data) for data in data_sets_of(rows)]
    if len(names) < 2:
        return ""
    told = paragraph(f"The last column over all data sets ({', '.join(names)}), paired over these too:")
    lines = [[selection_name(*way), cell] for way, cell in selection_differences(rows).items()]
    return "\n".join([told, markdown_table(["channels by", "minus weight norm"], lines)])


def _spread(usual: int) -> str:
    if usual == 1:
        return "of one seed"
    return f"mean ± standard deviation of {usual} seeds (in parentheses, of how many where fewer)"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def _points(fraction: float, sign: str = "") -> str:
    return f"{round(fraction * 100, 1) + 0.0:{sign}.1f}"  # adding 0 makes of -0 a 0


def _count(count: int, usual: int) -> str:
    return "" if count == usual else f" ({count})"


def _mean_of(cell: str) -> float:
    return float("-inf") if cell == DASH else float(cell.split()[0])
