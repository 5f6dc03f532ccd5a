"""Makes the tables and pictures of the results from CSV, and says which rows are missing.

    uv run recipes/studies/render_results.py --results recipes/results/results.csv \\
        --selection recipes/results/channel_selection.csv --out_dir recipes/results

Takes seconds and trains nothing. A row is one training, as ``compare_trainings.py`` writes it: ``Result`` in
``result_rows.py`` says what its columns are. ``--results`` are those of the ways of ``ways/methods.json``,
``--selection`` those of ``ways/channel_selection.json``. ``OUT_DIR/results.md`` has the tables, and shows the pictures
beside it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from microtune.modules.atomic_files import whole_file
from microtune.modules.csv_rows import read_rows
from microtune.modules.user_error import UserError
from microtune.recipes.studies.result_rows import (
    BUDGETS,
    METHODS,
    NamedScheme,
    Result,
    data_sets_of,
    title_of,
)
from microtune.recipes.studies.result_tables import (
    how_to_read,
    missing_rows,
    missing_selection_rows,
    results_section,
    search_time_section,
    selection_section,
)
from microtune.recipes.training.command_line import listed, run_recipe

SEARCHED = [method for method in METHODS if method not in ("full", "last_layers", "biases")]


def main(
    results: Path,
    out_dir: Path,
    selection: Path | None = None,
    schemes: str | None = None,
) -> None:
    """Makes the tables and pictures of the results from CSV, and says which rows are missing.

    Args:
        results: CSV with a row for each training.
        out_dir: Folder of results.md and the pictures.
        selection: CSV with a row for each training that compares criteria for channels.
        schemes: Schemes to draw, such as cifar10-extra64-one_pass=scheme.json, separated by commas; by default those
            in OUT_DIR/schemes that were searched for, as cifar10-extra64-one_pass.json.

    Raises:
        UserError: A file is missing or not what it should be.
    """
    # everything is read before anything is written
    rows = read_rows(results, Result, check_method)
    if not rows:
        raise UserError(f"{results} has no rows: give the results of at least one training")
    of_selection = [] if selection is None else read_rows(selection, Result, check_choice)
    drawn = load_schemes(scheme_files(schemes, out_dir / "schemes"))
    pictures = draw_all(rows, of_selection, drawn, out_dir)
    with whole_file(out_dir / "results.md") as partial:
        partial.write_text(f"## Results\n\n{results_in_markdown(rows, of_selection, pictures)}", encoding="utf-8")
    print(f"tables: {out_dir / 'results.md'}; pictures: {', '.join(pictures)}")
    missing = missing_rows(rows) + missing_selection_rows(of_selection)
    for line in missing:
        print(f"missing: {line}")
    if not missing:
        print("no row is missing")


def check_method(row: Result, others: Mapping[int, Result]) -> None:
    """Raises ``UserError`` if the tables have no place for a row, or others (by line) were trained for other steps."""
    if row.way not in METHODS:
        raise UserError(f"way is {row.way!r:.80}: the tables are of {', '.join(METHODS)}")
    budgets = ("none",) if row.way == "full" else BUDGETS
    if row.budget not in budgets:
        raise UserError(f"budget is {row.budget!r:.80}: the tables have {', '.join(budgets)} of {row.way}")
    check_equal_steps(row, others)


def check_choice(row: Result, others: Mapping[int, Result]) -> None:
    """Raises ``UserError`` if a row is of no choice of channels, or others (by line) were trained for other steps."""
    if row.way in METHODS:
        raise UserError(f"way is {row.way!r}: that is no choice of channels; give what ways/channel_selection.json has")
    check_equal_steps(row, others)


def check_equal_steps(row: Result, others: Mapping[int, Result]) -> None:
    """Raises ``UserError`` if another row (by line) of the same data has other steps or another batch size."""
    for line, other in others.items():
        if row.data == other.data and (row.steps, row.batch_size) != (other.steps, other.batch_size):
            raise UserError(
                f"{row.data} was trained for {row.steps} steps of {row.batch_size} samples, in line {line} for "
                f"{other.steps} of {other.batch_size}: give every way the same budget of steps"
            )


def results_in_markdown(rows: Sequence[Result], of_selection: Sequence[Result], pictures: Sequence[str] = ()) -> str:
    """All tables, and with those of a data set its pictures.

    Args:
        rows: At least one, in any order.
        of_selection: May be none.
        pictures: Names of those that lie beside the text.
    """

    texts = [how_to_read(rows)]
    for data in data_sets_of(rows):
        texts.append(results_section([row for row in rows if row.data == data]))
        for kind in ("accuracy_over_memory", "updated_channels"):
            if f"{kind}_{data}.png" in pictures:
                texts.append(f"![{kind.replace('_', ' ')}: {title_of(data)}]({kind}_{data}.png)\n")
    of_data_set = {data: f"channel_selection_{data}.png" for data in data_sets_of(of_selection)}
    texts.append(search_time_section(rows))
    texts.append(
        selection_section(of_selection, {data: name for data, name in of_data_set.items() if name in pictures})
    )
    return "\n".join(text for text in texts if text)


def draw_all(
    rows: Sequence[Result], of_selection: Sequence[Result], schemes: Sequence[NamedScheme], out_dir: Path
) -> list[str]:
    """Draws the pictures of every data set; returns their names."""
    # by need: the pictures' library takes a second to import
    from microtune.recipes.studies.result_pictures import (
        draw_accuracy_over_memory,
        draw_selection,
        draw_updated_channels,
    )

    pictures = []
    for data in data_sets_of([*rows, *schemes, *of_selection]):
        for kind, draw, some in (
            ("accuracy_over_memory", draw_accuracy_over_memory, rows),
            ("updated_channels", draw_updated_channels, schemes),
            ("channel_selection", draw_selection, of_selection),
        ):
            if of_data := [one for one in some if one.data == data]:
                pictures.append(f"{kind}_{data}.png")
                draw(of_data, out_dir / pictures[-1])
    return pictures


def scheme_files(schemes: str | None, folder: Path) -> dict[str, Path]:
    """The file of each scheme by its name, from the command line or else those of the folder.

    Raises:
        UserError: The command line's are not names and files.

    Example::

        scheme_files("cifar10-extra64-layers=scheme.json", Path("schemes"))  # {"cifar10-extra64-layers": Path(...)}
    """
    if schemes is None:
        return {file.stem: file for file in sorted(folder.glob("*.json")) if file.stem.split("-")[-1] in SEARCHED}
    files: dict[str, Path] = {}
    for part in listed(schemes):
        name, equals, file = part.partition("=")
        if not (name and equals and file):
            raise UserError(f"schemes has {part!r}: give each as name=file, such as cifar10-extra64-layers=scheme.json")
        if name in files:
            raise UserError(f"schemes has {name} twice: keep one")
        files[name] = Path(file)
    return files


def load_schemes(files: dict[str, Path]) -> list[NamedScheme]:
    """Reads the schemes, whose names say what they are for.

    Raises:
        UserError: A name does not say it, or a file is no scheme.
    """
    if not files:
        return []
    from microtune.modules.sparse_update.update_scheme import UpdateScheme  # imports PyTorch, which takes seconds

    schemes = []
    for name, file in files.items():
        parts = name.split("-")
        if len(parts) != 3 or parts[1] not in BUDGETS or parts[2] not in METHODS:
            raise UserError(
                f"scheme {name!r} of {file} does not say what it is for: name it data-budget-method, of "
                f"{', '.join(BUDGETS)}; {', '.join(METHODS)}"
            )
        schemes.append(NamedScheme(*parts, UpdateScheme.load(file)))
    return schemes


if __name__ == "__main__":
    run_recipe(main)
