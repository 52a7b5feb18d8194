"""The package's public names, which are imported when first used."""

import ast
import importlib
from pathlib import Path

import pytest

import skipnet


def names_for_type_checkers() -> dict[str, str]:
    """The public names in `if TYPE_CHECKING:`, and the modules they are from."""
    tree = ast.parse(Path(skipnet.__file__).read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )
    names = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom)
        for alias in statement.names:
            assert alias.asname == alias.name, "only `as` itself is a re-export to type checkers"
            assert alias.name not in names
            names[alias.name] = statement.module
    return names


def test_type_checkers_and_python_know_the_same_names() -> None:
    homes = {name: f"skipnet.{home}" for name, home in skipnet._HOME_OF.items()}
    assert homes == names_for_type_checkers()


@pytest.mark.parametrize("name", sorted(skipnet._HOME_OF))
def test_a_public_name_can_be_imported(name: str) -> None:
    home = importlib.import_module(f"skipnet.{skipnet._HOME_OF[name]}")
    assert getattr(skipnet, name) is getattr(home, name)
    assert name in dir(skipnet)


def test_no_name_is_in_two_homes() -> None:
    assert sum(map(len, skipnet._HOMES.values())) == len(skipnet._HOME_OF)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'skipnet' has no attribute 'Skipnet'"):
        _ = skipnet.Skipnet
    assert not hasattr(skipnet, "__wrapped__")
