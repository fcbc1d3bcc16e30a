"""The scripts stand alone: what two of them need stands in both, word for word."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py")])
OWN = {"main", "train"}  # every script has its own


def definitions(path):
    """Text of each function and class at the top of a script, by name."""
    text = path.read_text()
    nodes = (n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef)))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def constants(path):
    """Text of each constant at the top of a script, by name."""
    text = path.read_text()
    nodes = (n for n in ast.parse(text).body if isinstance(n, ast.Assign))
    return {node.targets[0].id: ast.get_source_segment(text, node.value) for node in nodes}


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_same_name_same_text(one, other):
    for read in (definitions, constants):
        mine, theirs = read(one), read(other)
        for name in mine.keys() & theirs.keys() - OWN:
            assert mine[name] == theirs[name], f"{name} has drifted apart in {one.name} and {other.name}"


def test_the_copies_that_stages_share_are_there():
    shared = definitions(ROOT / "sasrec_teacher.py").keys() & definitions(ROOT / "evaluate.py").keys()
    assert {"read_interactions", "leave_one_out", "pad_batch", "rank_of_target", "BadInput"} <= shared


def test_search_and_distillation_share_student_and_transport():
    shared = definitions(ROOT / "adarec_search.py").keys() & definitions(ROOT / "emd_distill.py").keys()
    assert {"Operation", "Cell", "Student", "item_losses", "check_edges", "load_teacher"} <= shared
    assert {"kl_distances", "transport", "emd_loss", "updated_weights", "embedding_loss"} <= shared


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_no_script_imports_another(path):
    names = {script.stem for script in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or ""]
        assert not any(name.split(".")[0] in names | {"data", "tests"} for name in imported)
