"""--device: what a script makes on another device than the CPU stays there, and no step asks for a value.

On the device `meta` tensors have no values: whoever looks at one, or mixes it with one of the CPU, gets an
error. So an epoch must come through to where its loss is read. With CUDA at hand, all scripts run on it.
"""

import importlib
import json

import numpy as np
import pytest
import torch

import bidirectional_distill
import evaluate
import sasrec_teacher

HISTORIES = {u: [(7 * u + t * t) % 12 + 1 for t in range(4 + u % 5)] for u in range(1, 41)}
COMMANDS = {
    "ce": ("sasrec_teacher", "--dim 8 --loss ce"),
    "bce": ("sasrec_teacher", "--dim 8 --loss bce"),
    "sampled": ("sasrec_teacher", "--dim 8 --loss sampled --negatives 9"),
    "search": ("adarec_search", "--teacher T.pt2 --cells 2 --nodes 2 --dim 8 --alpha-warm-up 1"),
    "search, sampled": ("adarec_search", "--negatives 9 --cells 1 --nodes 2 --dim 8 --alpha-warm-up 0"),
    "distillation": ("emd_distill", "--teacher T.pt2 --student S.pt2"),
    "of a gru": ("emd_distill", "--teacher gru.pt2 --student gru.pt2 --negatives 9 --mapping last"),
    "sequence": ("bidirectional_distill", "--teacher T.pt2 --student S.pt2"),
    "softmax": ("bidirectional_distill", "--base softmax --teacher T.pt2 --student S.pt2"),
    "bpr": ("bidirectional_distill", "--base bpr --warm-up 1 --negatives drawn"),
    "cdae": (
        "bidirectional_distill",
        "--base cdae --samples 2 --teacher c-teacher.pt2 --student c-student.pt2",
    ),
}


@pytest.fixture
def call(write_data, write_gru, tmp_path):
    """A function that runs a command of the above, for `epochs` epochs on a device."""
    data = write_data(HISTORIES)
    write_gru()
    for name, dim in (("T", 8), ("S", 4)):
        new = f"{data} --max-length 8 --epochs 0 --device cpu --dim {dim} --out {tmp_path / name}.pt2"
        sasrec_teacher.main(new.split())
    base = f"{data} --base cdae --dims 6 3 --warm-up 1 --epochs 0 --device cpu --out {tmp_path / 'c'}"
    bidirectional_distill.main(base.split())

    def run(name, device, epochs):
        script, options = COMMANDS[name]
        out = {"adarec_search": "out.json", "bidirectional_distill": "out"}.get(script, "out.pt2")
        argv = [str(tmp_path / word) if word.endswith(".pt2") else word for word in options.split()]
        argv += ["--epochs", str(epochs), "--batch-size", "7", "--device", device]
        importlib.import_module(script).main([str(data), *argv, "--out", str(tmp_path / out)])

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_nothing_is_read_or_mixed_in_an_epoch(name, call, monkeypatch):
    script, steps = importlib.import_module(COMMANDS[name][0]), []
    for kind in (torch.optim.Adam, torch.optim.AdamW):  # the fused ones know no device `meta`

        def plain(*args, kind=kind, fused, **options):
            optimizer = kind(*args, foreach=False, **options)
            optimizer.register_step_post_hook(lambda *_: steps.append(kind))
            return optimizer

        monkeypatch.setattr(torch.optim, kind.__name__, plain)
    # what comes between the steps, or in them has to leave the device: transport, fit, ranks
    monkeypatch.setattr(script, "validate", lambda *_: (0.0, 0.0), raising=False)
    monkeypatch.setattr(script, "save_model", lambda *_, **__: None)
    monkeypatch.setattr(script, "save_checkpoint", lambda *_, **__: None)
    monkeypatch.setattr(script, "fit", lambda *_: None, raising=False)
    mean = lambda mean, _: np.random.default_rng(0).random(mean.shape)  # noqa: E731
    monkeypatch.setattr(script, "mean_of_all", mean, raising=False)
    taught = lambda *args: (torch.ones(2, args[7], 2 * sum(map(len, HISTORIES.values())), dtype=int), 0)  # noqa: E731
    monkeypatch.setattr(script, "renew", taught, raising=False)
    ended = iter([None, *[True] * 9] if name == "bpr" else [True] * 9)
    finite = torch.Tensor.isfinite  # bpr: not after the warm-up, in which nothing is taught
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda x: finite(x) if next(ended) else torch.ones(1))
    epochs = 2 if "search" in name or name == "bpr" else 1
    with pytest.raises(RuntimeError, match="meta tensors|meta tensor"):
        call(name, "meta", epochs)
    assert len(steps) >= 6 * (1 + (script is bidirectional_distill)) * (2 if name == "bpr" else 1)


def test_a_program_makes_its_constants_where_it_is(write_model):
    class Constants(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.M, self.one = torch.nn.Embedding(13, 4), torch.ones(1)

        def forward(self, users, items):
            place = torch.arange(items.shape[1], device=items.device)[:, None].double().float()
            with torch.no_grad():
                place = place + torch.zeros(1, device=items.device) + torch.tensor([1.0], device=items.device)
            x = self.M(items) + place + torch.arange(items.shape[1]).to(items.device, torch.float32)[:, None]
            return x[None], x + self.one.to(items.device), self.M.weight

    program, _ = evaluate.load_model(write_model(Constants(), 12, 8), 9, 12)
    ids = torch.ones(2, dtype=int), torch.ones(2, 3, dtype=int)
    expected = program.module()(*ids)
    torch.testing.assert_close(evaluate.module_of(program, "cpu")(*ids), expected, rtol=0, atol=0)
    made = evaluate.module_of(program, "meta")(*(x.to("meta") for x in ids))
    assert all(x.device.type == "meta" for x in made)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", COMMANDS)
def test_cuda_learns_as_the_cpu_does(name, call, tmp_path):
    logs = []
    for device in ("cpu", "cuda"):
        call(name, device, 2)
        (log,) = tmp_path.glob("out*.log.jsonl")
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
    for line, other in zip(*logs, strict=True):
        for key in line.keys() - {"seconds", "renewal_seconds", "edges", "alpha", "flow"}:
            assert other[key] == pytest.approx(line[key], rel=0.1, abs=0.05)
