"""The files of the method import each other in one direction."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_transfer.methods.collaborative as method

FOLDER, NAME = Path(method.__file__).parent, method.__name__


def imports_of(path):
    """Return the files of the method that a file imports when it is loaded, or for its types."""
    tree = ast.parse(path.read_text())
    lazy = {
        id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    found = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and id(node) not in lazy]
    return {node.module for node in found if node.module.startswith(f"{NAME}.")}


def test_no_file_of_the_method_imports_one_that_imports_it():
    files = {
        ".".join([NAME, *path.relative_to(FOLDER).with_suffix("").parts]): imports_of(path)
        for path in FOLDER.rglob("*.py")
    }
    order = [*TopologicalSorter(files).static_order()]  # raises a CycleError that names the files
    assert (
        order.index(f"{NAME}.search.options")
        < order.index(f"{NAME}.search.candidates")
        < order.index(f"{NAME}.callback")
    )
