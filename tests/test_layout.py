"""Which file may import which: each only files of its own layer or below, never in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import lightning_transfer

ROOT, NAME = Path(lightning_transfer.__file__).parent, lightning_transfer.__name__
# files of source/ about one run
ONE_RUNS = {"term", "annealing", "drawing", "view", "measured_gap", "choosing", "first_batch"}
FACES = {"", "__main__", "callbacks", "mixins", "functional", "nn", "checkpoints", "metrics"}
IN_A_RUN = {"callback", "mixin", "borrowing", "asking", "watching", "auxiliary", "agreement", "distilling"}
IN_A_RUN |= {"loop", "candidates"}
LAYERS = (
    "ground",
    "source",
    "reports",
    "maths",
    "glue",
    "source of one run",
    "methods",
    "examining",
    "advising",
    "commands",
    "faces",
)
HEAVY = {"faiss", "timm", "matplotlib", "optuna", "tqdm"}  # imported where they are used


def layer_of(module):
    first, *rest = module.split(".")[1:] or [""]
    if first == "source" and rest and rest[0] in ONE_RUNS:
        return "source of one run"
    if first == "methods" and rest and rest[-1] not in IN_A_RUN:
        return "maths"  # functions and modules, which know no Trainer
    return "faces" if first in FACES else first if first in LAYERS else "ground"


def parsed():
    for path in ROOT.rglob("*.py"):
        module = ".".join([NAME, *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        yield module, ast.parse(path.read_text())


TREES = dict(parsed())


def imported(tree, *, inside=True):
    """Yield the modules that a file imports; `inside` functions too, or only when it is loaded."""
    nodes = [tree]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in TREES else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif inside or not (isinstance(node, ast.FunctionDef) or is_for_types(node)):
            nodes += ast.iter_child_nodes(node)


def is_for_types(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def ours(tree, *, inside=True):
    return {module for module in imported(tree, inside=inside) if module in TREES}


def test_a_file_imports_only_its_own_layer_and_those_below():
    place = {module: LAYERS.index(layer_of(module)) for module in TREES}
    above = {(module, other) for module, tree in TREES.items() for other in ours(tree) if place[other] > place[module]}
    search = f"{NAME}.methods.collaborative.search"
    assert above == {(f"{search}.options", f"{search}.loop")}  # of `LayerSearch.run` alone, when it is called


def test_no_file_imports_one_that_imports_it():
    files = {module: ours(tree, inside=False) - {module} for module, tree in TREES.items()}
    assert len([*TopologicalSorter(files).static_order()]) == len(TREES)  # a circle raises a CycleError that names it


def test_a_method_imports_no_other_method():
    for module, tree in TREES.items():
        if module.startswith(f"{NAME}.methods."):
            own = ".".join(module.split(".")[:3])
            others = {other for other in ours(tree) if other.startswith(f"{NAME}.methods.")}
            assert {other for other in others if not f"{other}.".startswith(f"{own}.")} == set(), module


def test_lightning_stays_in_the_layers_that_know_it_and_heavy_packages_are_imported_when_used():
    for module, tree in TREES.items():
        roots = {other.split(".")[0] for other in imported(tree)}
        if LAYERS.index(layer_of(module)) < LAYERS.index("glue"):
            assert not roots & {"lightning", "pytorch_lightning"}, module
        assert not HEAVY & {other.split(".")[0] for other in imported(tree, inside=False)}, module


def test_no_file_is_longer_than_350_lines():
    assert {path.name: num for path in ROOT.rglob("*.py") if (num := len(path.read_text().splitlines())) > 350} == {}
