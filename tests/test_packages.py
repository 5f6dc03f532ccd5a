"""What is installed is all that there is."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_of_code_is_a_listed_package():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    modules = [path for folder in setuptools["package-dir"].values() for path in (ROOT / folder).rglob("*.py")]
    packages = {f"microtune.{'.'.join(path.parent.relative_to(ROOT).parts)}" for path in modules}
    assert sorted(setuptools["packages"]) == sorted(packages)
    assert [path.parent for path in modules if not path.with_name("__init__.py").exists()] == []
