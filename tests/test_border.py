"""Test that the core needs nothing of the folders that a fork may delete. The README names them."""

import ast

import pytest
from children import ROOT

OPTIONAL = {"scripts", "study", "docs"}
CORE = [path for folder in (".", "common", "tests") for path in sorted(ROOT.glob(f"{folder}/*.py"))]


@pytest.mark.parametrize("path", CORE, ids=[str(path.relative_to(ROOT)) for path in CORE])
def test_the_core_imports_nothing_that_a_fork_may_delete(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])

    assert not imported & OPTIONAL
