"""What several test files need: data files, and model files that torch alone has made."""

import io
import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sasrec_teacher


def save_data(folder, histories, name="data.txt"):
    """Write histories, {user: [items]}, as a data file. Returns its path."""
    path = folder / name
    path.write_text("".join(f"{user} {item}\n" for user, items in histories.items() for item in items))
    return path


def save_model(folder, module, num_items, max_length, /, name="model.pt2", training=False, **config):
    """Export a module, in training mode or not, as a model file. Returns its path."""
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=1, max=max_length)
    example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
    shapes = {0: batch}, {0: batch, 1: length}
    program = torch.export.export(module.train(training), example, dynamic_shapes=shapes)
    buffer, config = io.BytesIO(), {"items": num_items, "max_length": max_length} | config
    torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
    (folder / name).write_bytes(buffer.getvalue())
    return folder / name


class GRU(torch.nn.Module):
    """A sequence model of another kind than SASRec."""

    def __init__(self, num_items, max_length, num_layers):
        super().__init__()
        self.max_length, self.embedding = max_length, torch.nn.Embedding(num_items + 1, 10)
        self.cells = torch.nn.ModuleList(torch.nn.GRU(10, 10, batch_first=True) for _ in range(num_layers))

    def forward(self, users, items):
        length = items.shape[1]  # torch exports a GRU for one length only, so pad to one
        padded = F.pad(items, (0, self.max_length + 1))[:, : self.max_length + 1]
        hidden = [self.embedding(padded)]
        for cell in self.cells:
            hidden.append(cell(hidden[-1])[0])
        hidden = torch.stack(hidden)[:, :, :length]
        return hidden, hidden[-1], self.embedding.weight


def save_gru(folder, items=12, max_length=8, layers=2, **config):
    """Export a random GRU as a model file. Returns its path."""
    torch.manual_seed(0)
    return save_model(folder, GRU(items, max_length, layers), items, max_length, "gru.pt2", **config)


# the functions above, for the folder of a test
write_data = pytest.fixture(lambda tmp_path: partial(save_data, tmp_path), name="write_data")
write_model = pytest.fixture(lambda tmp_path: partial(save_model, tmp_path), name="write_model")
write_gru = pytest.fixture(lambda tmp_path: partial(save_gru, tmp_path), name="write_gru")


@pytest.fixture
def float64():
    """New tensors are float64, so a comparison can be tight."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def sasrec():
    """A small random SASRec. Its weights are large enough that every path through it matters."""
    torch.manual_seed(0)
    model = sasrec_teacher.SASRec(num_items=30, max_length=12, dim=8, num_blocks=3, num_heads=2, dropout=0.5)
    for weight in model.parameters():
        weight.data.normal_(std=0.7)
    model.M.weight.data[0] = 0
    return model.eval()
