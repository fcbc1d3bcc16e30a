"""--device: an epoch mixes no devices, and copies to the CPU only what it must.

Tensors on the device `meta` have no values, so an epoch must come to its end, where the loss is read.
"""

import importlib
import json
from unittest import mock

import pytest
import torch
from conftest import save_data, save_gru, save_model
from test_copies import HELD
from torch.optim.optimizer import register_optimizer_step_post_hook

import bidirectional_distill
import evaluate
import sasrec_teacher

HISTORIES = {u: [(7 * u + t * t) % 12 + 1 for t in range(4 + u % 5)] for u in range(1, 41)}
COMMANDS = {
    "ce": "sasrec_teacher --dim 8 --loss ce",
    "bce": "sasrec_teacher --dim 8 --loss bce",
    "sampled": "sasrec_teacher --dim 8 --loss sampled --negatives 9",
    "search": "adarec_search --teacher T.pt2 --cells 2 --nodes 2 --dim 8 --alpha-warm-up 1",
    "search, sampled": "adarec_search --negatives 9 --cells 1 --nodes 2 --dim 8 --alpha-warm-up 0",
    "distillation": "emd_distill --teacher T.pt2 --student S.pt2",
    "of a GRU": "emd_distill --teacher gru.pt2 --student gru.pt2 --negatives 9 --mapping last",
    "sequence": "bidirectional_distill --teacher T.pt2 --student S.pt2",
    "softmax": "bidirectional_distill --base softmax --teacher T.pt2 --student S.pt2",
    "bpr, warm-up": "bidirectional_distill --base bpr --warm-up 1",
    "bpr": "bidirectional_distill --base bpr --warm-up 0 --negatives drawn",
    "cdae": "bidirectional_distill --base cdae --samples 2 --teacher c-teacher.pt2 --student c-student.pt2",
}
# copies to the CPU: the distances of L_hid each step and, before, 4 states; scores to rank; validation ranks
COPIES = {"search": 6, "distillation": 11, "of a GRU": 11, "sequence": 4, "softmax": 4, "bpr": 2, "cdae": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with data and with the models that the commands need."""
    path = tmp_path_factory.mktemp("inputs")
    untrained = f"{save_data(path, HISTORIES)} --epochs 0 --device cpu"
    save_gru(path)
    save_model(path, sasrec_teacher.SASRec(12, 8, 4, 2, 1, 0.5), 12, 8, "training.pt2", training=True)
    for name, dim in (("T.pt2", 8), ("S.pt2", 4)):
        sasrec_teacher.main(f"{untrained} --max-length 8 --dim {dim} --out {path / name}".split())
    bidirectional_distill.main(f"{untrained} --base cdae --dims 6 3 --warm-up 1 --out {path / 'c'}".split())
    return path


def run(name, device, out):
    """Run two epochs of a command on a device."""
    script, *options = f"{COMMANDS[name]} --epochs 2 --batch-size 7 --device {device} --out {out}".split()
    script = importlib.import_module(script)
    with mock.patch.object(script, "DEVICES", [device]):
        script.main(["data.txt", *options])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_epoch_mixes_no_devices_and_copies_only_what_it_must(name, inputs, tmp_path, monkeypatch):
    script, steps, copies = importlib.import_module(COMMANDS[name].split()[0]), [], []
    for kind in (torch.optim.Adam, torch.optim.AdamW):  # the fused ones do not know the device `meta`
        plain = lambda *args, kind=kind, fused, **options: kind(*args, foreach=False, **options)  # noqa: E731
        monkeypatch.setattr(torch.optim, kind.__name__, plain)
    for method in ("save_model", "end_epoch"):
        monkeypatch.setattr(script.Run, method, lambda *_, **__: None)
    isfinite, cpu = torch.Tensor.isfinite, torch.Tensor.cpu
    random = lambda x: copies.append(x) or torch.rand(x.shape, dtype=x.dtype)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: isfinite(x) if steps else torch.ones(1))
    monkeypatch.setattr(torch.Tensor, "isnan", lambda x: torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: random(x) if x.is_meta else cpu(x))
    embedding = torch.nn.functional.embedding  # on `meta`, it takes items of the CPU without an error

    def checked(items, weight, *args, **options):
        assert items.device == weight.device
        return embedding(items, weight, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "embedding", checked)
    monkeypatch.chdir(inputs)
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    with pytest.raises(RuntimeError, match="meta tensor"):
        run(name, "meta", tmp_path / "out.json")
    hook.remove()
    assert len(steps) >= 6 * (1 + (script is bidirectional_distill)) and len(copies) == COPIES.get(name, 0)


def test_a_program_makes_its_constants_where_it_is(write_model, write_data):
    class Constants(torch.nn.Embedding):
        def forward(self, users, items):
            device, T = items.device, items.shape[1]
            place = torch.arange(T, device=device).double() + torch.arange(T).to(device, torch.float64)
            with torch.no_grad():
                place = place + torch.zeros(1, device=device) + torch.tensor([1.0], device=device)
            x = super().forward(items) + place.float()[:, None]
            return x[None], x + self.one.to(device), self.weight

    model, data = Constants(13, 4), evaluate.read_interactions(write_data({9: [3, 12]}))
    model.one, ids = torch.ones(1), (torch.ones(2, dtype=int), torch.ones(2, 3, dtype=int))
    path = write_model(model, 12, 8)
    on_cpu, on_meta = (evaluate.load_model(path, data, device)[0] for device in ("cpu", "meta"))
    assert all(map(torch.equal, on_cpu(*ids), torch.export.load(path).module()(*ids)))
    assert all(x.is_meta for x in on_meta(*(x.to("meta") for x in ids)))


@pytest.mark.parametrize("script", sorted(HELD["load_model"]))
def test_a_program_exported_in_training_mode_is_loaded_without_dropout(script, inputs):
    path, data = inputs / "training.pt2", evaluate.read_interactions(inputs / "data.txt")
    loaded, _ = importlib.import_module(script).load_model(path, data, "cpu")
    exported, ids = torch.export.load(path).module(), (torch.ones(1, dtype=int), torch.arange(1, 6)[None])
    assert not torch.equal(exported(*ids)[1], exported(*ids)[1])
    assert torch.equal(loaded(*ids)[1], loaded(*ids)[1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", COMMANDS)
def test_cuda_learns_as_the_cpu_does(name, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    for device in ("cpu", "cuda"):
        run(name, device, tmp_path / f"{device}.json")
    logs = [(tmp_path / f"{device}.json.log.jsonl").read_text().splitlines() for device in ("cpu", "cuda")]
    for line, other in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        for key in line.keys() - {"seconds", "renewal_seconds", "edges", "alpha", "flow"}:
            assert other[key] == pytest.approx(line[key], rel=0.1, abs=0.05)
