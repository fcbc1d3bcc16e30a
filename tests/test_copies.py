"""No script imports another. What several scripts need stands in each of them, word for word."""

import ast
from functools import cache
from pathlib import Path

import pytest

FOLDERS = [Path(__file__).parent.parent / name for name in (".", "data", "related")]
SCRIPTS = {path.stem: path.read_text() for folder in FOLDERS for path in folder.glob("*.py")}
TEACHER, SEARCH, DISTILL = {"sasrec_teacher"}, {"adarec_search"}, {"emd_distill"}
BIDIRECTIONAL, EVALUATE, PREPARE = {"bidirectional_distill"}, {"evaluate"}, {"prepare"}
ASREP, DT4SR, RANKING = {"asrep"}, {"dt4sr"}, {"ranking_distill"}
DISTILLING = {"dfa_distill", "domain_distill", "statistics_distill"} | RANKING
RELATED = DISTILLING | ASREP | DT4SR
TRAINING = TEACHER | SEARCH | DISTILL | BIDIRECTIONAL
LOADING = SEARCH | DISTILL | BIDIRECTIONAL | EVALUATE | ASREP | DISTILLING
HELD = {  # names, and all scripts that hold them
    "number": SCRIPTS.keys(),
    "Interactions read_interactions Help": SCRIPTS.keys() - PREPARE,
    "DEVICES": TRAINING | EVALUATE,
    "pad_batch": TEACHER | LOADING | DT4SR,
    "load_model": LOADING,
    "with_dropout": LOADING | DT4SR,
    "Run training_part join_processes sum_over_processes": TRAINING,
    "write": TRAINING | ASREP,
    "RANK PROCESSES Histories epoch_batches": TRAINING | RELATED,
    "batch_of": TEACHER | SEARCH | DISTILL | RELATED,
    "SharedNegatives sampled_log_softmax": TEACHER | SEARCH | DISTILL,
    "ItemLosses kl_distances transport emd_loss updated_weights distillation_loss": SEARCH | DISTILL,
    "ask_teacher": SEARCH | DISTILL,
    "UnseenItems": TEACHER | BIDIRECTIONAL | ASREP | DT4SR,
    "bce_loss": TEACHER | ASREP,
    "export": TEACHER | SEARCH | BIDIRECTIONAL | DT4SR,
    "validate": TEACHER | DISTILL | BIDIRECTIONAL,
    "rank_of_target": TEACHER | DISTILL | BIDIRECTIONAL | EVALUATE,
    "last_output": TRAINING - SEARCH | EVALUATE | ASREP,
    "Block": TEACHER | DT4SR,
    "follow training_rows write_student refuse_to_overwrite": RELATED,
    "rest_of": {"dfa_distill", "statistics_distill"},
}
HELD = {name: {*scripts} for names, scripts in HELD.items() for name in names.split()}
OWN = {"main", "train", "search", "set_up"}  # each script has its own


@cache
def definitions(script):
    """The lines of each function, class and constant at the top level of a script, by name."""
    lines, by_name = SCRIPTS[script].splitlines(), {}
    for node in ast.parse(SCRIPTS[script]).body:
        start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        while lines[start - 2].startswith("# ") and not lines[start - 2].startswith("# ----"):
            start -= 1  # a comment above it belongs to it
        names = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
        for target in node.targets if isinstance(node, ast.Assign) else []:
            names += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)]  # one, or a tuple
        by_name |= dict.fromkeys(names, lines[start - 1 : node.end_lineno])
    return by_name


def test_the_scripts_hold_what_they_share():
    names = {name for script in SCRIPTS for name in definitions(script)} - OWN
    holders = {name: {script for script in SCRIPTS if name in definitions(script)} for name in names}
    assert {name: scripts for name, scripts in holders.items() if len(scripts) > 1} == HELD


@pytest.mark.parametrize("name", HELD)
def test_the_same_name_has_the_same_text(name):
    first, *others = sorted(HELD[name])
    for other in others:
        assert definitions(other)[name] == definitions(first)[name], f"{name} differs in {first} and {other}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    for node in ast.walk(ast.parse(SCRIPTS[script])):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in modules} & (SCRIPTS.keys() | {"data", "related", "tests"})
