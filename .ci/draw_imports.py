"""Draws who imports whom, from the code, into modules/README.md; with --check only says whether that is current.

    uv run .ci/draw_imports.py

An arrow means "imports"; one that follows from others (a imports b, b imports c, a imports c) is left out.
"""

import re
import sys
from pathlib import Path

import grimp

README = Path(__file__).parents[1] / "modules/README.md"
PACKAGES = [f"microtune.{name}" for name in ("recipes", "callbacks", "datamodules", "modules")]
BEGIN, END = "<!-- imports: made by .ci/draw_imports.py -->\n", "<!-- end of imports -->\n"
RUNNABLES, BASE = "train_*.py, quickstart.py, ...", "atomic_files, csv_rows, ..."


def place(module: str) -> dict[str, str | None]:
    """The node of a file in each picture; None where it is outside."""
    _, folder, *rest = module.split(".")
    in_folder = len(rest) > 1
    places = {"folders": folder, "recipes": None, "modules": None}
    if folder == "recipes" and rest:
        places["recipes"] = rest[0] if in_folder else RUNNABLES
    elif folder == "modules" and rest:
        places["modules"] = rest[0] if in_folder or rest == ["classifier"] else BASE
    return places


def arrows(graph: grimp.ImportGraph, picture: str) -> set[tuple[str, str]]:
    """Who imports whom among the nodes of a picture."""
    found = set()
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            pair = place(importer)[picture], place(imported)[picture]
            if None not in pair and pair[0] != pair[1]:
                found.add(pair)
    return found


def reduced(pairs: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Without the arrows that follow from others; raises ``SystemExit`` where they go in a circle."""
    reach = {start: {end for first, end in pairs if first == start} for start, _ in pairs}
    for _ in reach:
        for ends in reach.values():
            ends |= {far for end in ends for far in reach.get(end, ())}
    if circle := [node for node, ends in reach.items() if node in ends]:
        raise SystemExit(f"imports go in a circle: {', '.join(sorted(circle))}")
    return sorted(
        (start, end)
        for start, end in pairs
        if not any(end in reach.get(middle, ()) for first, middle in pairs if first == start)
    )


def mermaid(pairs: list[tuple[str, str]]) -> str:
    """A flow chart, the importing side on top."""
    names = {node: f"n{number}" for number, node in enumerate(sorted({node for pair in pairs for node in pair}))}
    lines = [f'    {name}["{node}"]' for node, name in names.items()]
    lines += [f"    {names[importer]} --> {names[imported]}" for importer, imported in pairs]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def main() -> None:
    """Writes the pictures, or checks them."""
    graph = grimp.build_graph(*PACKAGES)
    titles = {"folders": "The folders:", "recipes": "Inside `recipes`:", "modules": "Inside `modules`:"}
    drawn = "\n\n".join(f"{title}\n\n{mermaid(reduced(arrows(graph, name)))}" for name, title in titles.items())
    text = README.read_text(encoding="utf-8")
    made = re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{drawn}\n\n{END}", text, flags=re.DOTALL)
    if "--check" in sys.argv:
        sys.exit(0 if made == text else f"{README} shows other imports than the code has: uv run .ci/draw_imports.py")
    README.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
