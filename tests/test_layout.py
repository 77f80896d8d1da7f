"""The promises about the shape of the code: its size, the length of functions, who imports whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BUDGET = {"superclip": 280, "data": 385, "train": 450, "eval": 345}  # lines of code
PATHS = [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("study/*.py")]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def lines_of_code(name):
    """What remains without blank lines, comments and docstrings."""
    docs, lines = set(), FILES[name].read_text().splitlines()
    for node in ast.walk(TREES[name]):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            docs |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = {i for i, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    return len(code - docs)


def imports(nodes):
    """The project's own modules that these nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & FILES.keys()


@pytest.mark.parametrize("name", BUDGET)
def test_the_four_files_keep_their_budgets(name):
    assert lines_of_code(name) <= BUDGET[name], "a fork may raise its BUDGET"


def test_no_function_is_longer_than_a_screen():
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                limit = 100 if (name, node.name) == ("train", "train") else 80
                assert node.end_lineno - node.lineno < limit, f"{name}.{node.name}"


def test_imports_go_in_one_direction_and_none_is_hidden():
    graph = {name: imports(tree.body) for name, tree in TREES.items()}
    for name, tree in TREES.items():
        assert imports(ast.walk(tree)) == graph[name], f"{name} imports inside a function"

    def reach(name, seen=()):
        assert name not in seen, f"a circle: {seen}"
        return {name}.union(*(reach(other, (*seen, name)) for other in graph[name]))

    for name in graph:
        reach(name)
    assert graph["superclip"] == set() and graph["data"] == {"superclip"}
    assert graph["eval"] == {"data", "superclip"}
    may_train = {name for name in graph if "train" in graph[name]}
    assert all(name == "scripts.bench" or name.startswith("study.") for name in may_train)
