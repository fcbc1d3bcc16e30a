"""A student depends on its last few items: `sees` in its file. It is served on these, and compiled."""

import re
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import save_data, save_model

import adarec_search as search
import evaluate

ROOT = Path(__file__).parent.parent
HAS_COMPILER = any(map(shutil.which, ("g++", "clang++")))
HISTORIES = {u: [(7 * u + t) % 30 + 1 for t in range(5 + u % 40)] for u in range(1, 61)}


@pytest.mark.parametrize("name", [name for name in search.OPERATIONS if name not in ("none", "mean")])
@pytest.mark.parametrize("num_cells, num_nodes", product((1, 2, 4), (1, 3)))
def test_the_last_items_give_the_output_of_all(name, num_cells, num_nodes):
    torch.manual_seed(0)
    edges = [[name] * j for j in range(1, num_nodes + 1)]
    model = search.Student(30, 8, [search.Cell(8, edges) for _ in range(num_cells)], 0.2).eval()
    sees = search.receptive_field(edges, num_cells)
    for length in (1, sees, sees + 1, sees + 30):
        items = torch.randint(1, 31, (16, length))
        whole, cut = (model(None, x)[1][:, -1] for x in (items, items[:, -sees:]))
        torch.testing.assert_close(whole, cut, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("edges, sees", [([["conv3"]], 5), ([["skip"]], 1), ([["mean"]], None)])
def test_the_file_says_what_the_student_sees(edges, sees, tmp_path):
    architecture = {"cells": 2, "nodes": 1, "dim": 8, "edges": edges}
    (tmp_path / "a.json").write_text(str(architecture).replace("'", '"'))
    data = save_data(tmp_path, HISTORIES)
    command = f"{data} --architecture {tmp_path / 'a.json'} --max-length 20 --out {tmp_path / 'b.json'}"
    search.main(command.split())
    _, config = evaluate.load_model(tmp_path / "b.pt2", evaluate.read_interactions(data), "cpu")
    assert config.get("sees") == sees and config["window"] == (sees or 20)


def test_a_file_that_sees_more_than_it_says_is_refused(tmp_path):
    torch.manual_seed(0)
    model = search.Student(30, 8, [search.Cell(8, [["conv3"]]) for _ in range(2)], 0.2)
    data = evaluate.read_interactions(save_data(tmp_path, HISTORIES))
    for sees in (5, 4):
        path = save_model(tmp_path, model, 30, 20, f"{sees}.pt2", sees=sees)
        if sees == 5:
            assert evaluate.load_model(path, data, "cpu")[1]["window"] == 5
        else:
            with pytest.raises(SystemExit, match="depends on more than the last 4 items"):
                evaluate.load_model(path, data, "cpu")
    for sees in (0, -3):
        path = save_model(tmp_path, model, 30, 20, sees=sees)
        with pytest.raises(SystemExit, match="is no model file"):
            evaluate.load_model(path, data, "cpu")


@pytest.mark.parametrize(
    "more",
    [{}, {"dilation": (2,)}, {"stride": (2,)}, {"padding": (3,)}, {"groups": 2}, {"bias": None}],
    ids=str,
)
def test_a_convolution_as_a_matrix_product_is_the_convolution(more):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 9), torch.randn(6, 4 // more.get("groups", 1), 3)
    more = {"bias": torch.randn(6)} | more
    torch.testing.assert_close(evaluate.conv1d_as_product(x, weight, **more), F.conv1d(x, weight, **more))


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("one_request", [True, False])
def test_compiled_scores_are_the_eager_ones(one_request, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = search.Student(30, 8, [search.Cell(8, [["conv3"], ["max_pool", "dilated_conv3"]])], 0.2)
    path, data = save_model(tmp_path, model, 30, 20, sees=7), save_data(tmp_path, HISTORIES)
    module, config = evaluate.load_model(path, evaluate.read_interactions(data), "cpu")
    scorer, calls, as_product = evaluate.Scorer(module), [], evaluate.conv1d_as_product
    monkeypatch.setattr(evaluate, "conv1d_as_product", lambda *args: calls.append(1) or as_product(*args))
    service = evaluate.compiled(scorer, config["window"], "cpu", one_request)
    assert bool(calls) == one_request
    for batch, length in ((1, 1), (1, 5), (3, 2), (64, 5)):
        users, items = torch.ones(batch, dtype=torch.int64), torch.randint(1, 31, (batch, length))
        with torch.no_grad():
            torch.testing.assert_close(service(users, items), scorer(users, items), rtol=1e-5, atol=1e-5)


def snippet_of_readme(folder, monkeypatch):
    """The snippet of README.md, and the model that stands where it looks for one."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (snippet,) = (text for text in snippets if "aoti_load_package" in text)
    assert len([line for line in snippet.splitlines() if line]) <= 15
    torch.manual_seed(0)
    model = search.Student(200, 8, [search.Cell(8, [["conv3"], ["max_pool", "skip"]])], 0.2)
    (folder / "runs").mkdir()
    save_model(folder, model, 200, 20, "runs/student.pt2", sees=5)
    monkeypatch.chdir(folder)
    return snippet, model


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_the_snippet_of_the_readme_recommends_unseen_items(tmp_path, monkeypatch, capsys):
    snippet, model = snippet_of_readme(tmp_path, monkeypatch)
    exec(compile(snippet, "README.md", "exec"), {})
    recommended = eval(capsys.readouterr().out)
    _, output, item_vectors = model.eval()(None, torch.tensor([[50, 181, 172]]))
    scores = output[0, -1] @ item_vectors.T
    scores[[0, 50, 181, 172]] = -torch.inf
    assert recommended == scores.topk(10).indices.tolist()


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
def test_the_program_of_the_readme_gives_the_same_scores_as_onnx(tmp_path, monkeypatch):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime, snippet = pytest.importorskip("onnxruntime"), snippet_of_readme(tmp_path, monkeypatch)[0]
    exec(compile(snippet, "README.md", "exec"), variables := {})
    torch.onnx.export(variables["program"], f="service.onnx")
    session = runtime.InferenceSession("service.onnx")
    for history in ([3], [50, 181, 172]):
        items = torch.tensor([history])
        (scores,) = session.run(None, {session.get_inputs()[0].name: items.numpy()})
        torch.testing.assert_close(torch.from_numpy(scores), variables["service"](items), rtol=0, atol=2e-6)


def test_one_request_and_batches_are_timed_as_they_are_compiled(tmp_path, monkeypatch, capsys):
    model = search.Student(30, 8, [search.Cell(8, [["conv3"]])], 0.2)
    path, data, timed = save_model(tmp_path, model, 30, 20), save_data(tmp_path, HISTORIES), {}
    monkeypatch.setattr(evaluate, "compiled", lambda scorer, window, device, one_request: one_request)
    monkeypatch.setattr(
        evaluate, "milliseconds", lambda way, *_, batch_size, **more: timed.setdefault((way, batch_size), 1.0)
    )
    evaluate.main([str(data), str(path), "--compile"])
    compiled_for = {batch_size: way for way, batch_size in timed if isinstance(way, bool)}
    assert compiled_for == {1: True, evaluate.BATCH: False} and len(timed) == 4
