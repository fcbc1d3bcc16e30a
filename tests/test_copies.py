"""The scripts stand alone: what two of them need stands in both, word for word."""

import ast
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("related/*.py")]
}
OWN = {"main", "train", "search", "L", "L_CF"}  # every script has its own


def definitions(script):
    """Text of each function, class and constant at the top of a script, by name."""
    text, found = SCRIPTS[script].read_text(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node.decorator_list) + ast.get_source_segment(text, node)
        elif isinstance(node, ast.Assign):
            found[node.targets[0].id] = ast.get_source_segment(text, node.value)
    return {name: source for name, source in found.items() if name not in OWN}


@pytest.mark.parametrize("one, other", [*combinations(sorted(SCRIPTS), 2)])
def test_same_name_same_text(one, other):
    mine, theirs = definitions(one), definitions(other)
    for name in mine.keys() & theirs.keys():
        assert mine[name] == theirs[name], f"{name} has drifted apart in {one} and {other}"


def test_what_scripts_share_is_there():
    has = {name: definitions(name).keys() for name, path in SCRIPTS.items() if path.parent.name != "related"}
    reading = {"read_interactions", "leave_one_out", "pad_batch", "rank_of_target", "sha256_of", "Help"}
    reading |= {"refuse_numbers"}
    training = {"training_part", "batches_of_like_length", "save_model", "report", "write"}
    training |= {"run_of", "save_checkpoint", "load_checkpoint", "random_numbers", "join", "share", "add_up"}
    training |= {"complete"}
    layers = {
        "item_losses",
        "sampled_item_losses",
        "ask",
        "kl_distances",
        "transport",
        "emd_loss",
        "updated_weights",
        "mean_of_all",
    }
    training_scripts = has.keys() - {"prepare", "evaluate"}
    assert not any(has["prepare"] & has[script] for script in has.keys() - {"prepare"})
    assert all(reading <= has[script] for script in has.keys() - {"prepare", "adarec_search"})
    assert all(training <= has[script] for script in has.keys() - {"prepare", "evaluate"})
    assert all("validate" in has[script] for script in has.keys() - {"prepare", "evaluate", "adarec_search"})
    assert all("load_model" in has[script] for script in has.keys() - {"prepare", "sasrec_teacher"})
    assert {"proposal", "draw_shared"} <= has["sasrec_teacher"] & has["adarec_search"] & has["emd_distill"]
    assert layers | {"ask", "at_real"} <= has["adarec_search"] & has["emd_distill"]
    assert all("module_of" in has[script] for script in has.keys() - {"prepare", "sasrec_teacher"})
    assert "with_dropout" in has["emd_distill"] & has["bidirectional_distill"]
    assert all("export" in has[script] for script in training_scripts - {"emd_distill"})
    assert {"draw_negatives", "seen_in_training"} <= has["sasrec_teacher"] & has["bidirectional_distill"]


def test_what_the_neighbours_share_is_there():
    has = {name: definitions(name).keys() for name in SCRIPTS}
    distil = {"dfa_distill", "statistics_distill", "domain_distill"}
    related = {name for name, path in SCRIPTS.items() if path.parent.name == "related"}
    assert related == distil | {"asrep", "dt4sr"}
    assert all({"read_interactions", "sha256_of", "Help"} <= has[script] for script in related)
    alike = {
        "training_rows",
        "batch_of",
        "follow",
        "write_student",
        "with_dropout",
        "leave_one_out",
        "pad_batch",
    }
    assert all(alike | {"load_model"} <= has[script] for script in distil)
    assert "rest_of" in has["dfa_distill"] & has["statistics_distill"]
    assert {"leave_one_out", "pad_batch", "share", "write", "load_model", "module_of"} <= has["asrep"]
    assert {"Block", "Dropout", "share", "write", "export", "save_model"} <= has["dt4sr"] & has[
        "sasrec_teacher"
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_imports_another(script):
    for node in ast.walk(ast.parse(SCRIPTS[script].read_text())):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in imported} & (SCRIPTS.keys() | {"data", "tests"})
