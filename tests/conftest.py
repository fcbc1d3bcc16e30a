"""What several test files need: data files, and model files made by hand."""

import io
import json

import pytest
import torch
import torch.nn.functional as F

import sasrec_teacher


@pytest.fixture
def write_data(tmp_path):
    """A function that writes histories, {user: [items]}, as a data file and returns its path."""

    def write(histories, name="data.txt"):
        path = tmp_path / name
        path.write_text("".join(f"{user} {item}\n" for user, items in histories.items() for item in items))
        return path

    return write


@pytest.fixture
def write_model(tmp_path):
    """A function that exports a module as a model file, here with torch alone, and returns its path."""

    def write(module, item_count, max_length, /, name="model.pt2", **config):
        batch = torch.export.Dim("batch", min=1)
        length = torch.export.Dim("length", min=1, max=max_length)
        example = torch.ones(2, dtype=torch.int64), torch.ones(2, max_length, dtype=torch.int64)
        program = torch.export.export(
            module.eval(), example, dynamic_shapes=({0: batch}, {0: batch, 1: length})
        )
        buffer = io.BytesIO()
        config = {"items": item_count, "max_length": max_length} | config
        torch.export.save(program, buffer, extra_files={"config.json": json.dumps(config)})
        (tmp_path / name).write_bytes(buffer.getvalue())
        return tmp_path / name

    return write


@pytest.fixture
def write_gru(write_model):
    """A function that writes a teacher of another kind than ours, a GRU of `layers` layers."""

    class GRU(torch.nn.Module):
        def __init__(self, items, max_length, layers):
            super().__init__()
            self.max_length, self.embedding = max_length, torch.nn.Embedding(items + 1, 10)
            self.cells = torch.nn.ModuleList(torch.nn.GRU(10, 10, batch_first=True) for _ in range(layers))

        def forward(self, users, items):
            length = items.shape[1]  # torch exports a GRU for one length alone: fill up to one above all
            padded = F.pad(items, (0, self.max_length + 1))[:, : self.max_length + 1]
            hidden = [self.embedding(padded)]
            for cell in self.cells:
                hidden.append(cell(hidden[-1])[0])
            hidden = torch.stack(hidden)[:, :, :length]
            return hidden, hidden[-1], self.embedding.weight

    def write(items=12, max_length=8, layers=2, **config):
        torch.manual_seed(0)
        return write_model(GRU(items, max_length, layers), items, max_length, "gru.pt2", **config)

    return write


@pytest.fixture
def sasrec():
    """A small random SASRec with weights large enough that every path through it matters."""
    torch.manual_seed(0)
    model = sasrec_teacher.SASRec(item_count=30, max_length=12, dim=8, blocks=3, heads=2, dropout=0.5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.7)
        model.M.weight[0] = 0
    return model.eval()
