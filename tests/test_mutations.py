"""Damaged files are read correctly or refused in one line. With MUTATIONS=1, ten times as many."""

import json
import os
import re
from itertools import groupby

import numpy as np
import pytest
import torch

import adarec_search
import evaluate
import sasrec_teacher

TIMES = 10 if "MUTATIONS" in os.environ else 1
PIECES = [bytes([byte]) for byte in b"019-+.,e_# \t\n\r\x0b\x85\xff\0"]
PIECES += ["\u0663".encode(), b"nan", b"1 1\n", b"99999999", b"4294967297"]


def share_refused(path, read, check, count, seed):
    """The share of `count` damaged copies of a file that `read` refuses. check(content, value or None)."""
    whole, rng, refused = path.read_bytes(), np.random.default_rng(seed), 0
    for _ in range(count * TIMES):
        content = whole
        for _ in range(rng.integers(1, 4)):  # insert, replace, remove or repeat bytes, or lose the end
            at, length = rng.integers(len(content) + 1), rng.choice([1, 1, 2, 8, 40])
            piece, head, tail = PIECES[rng.integers(len(PIECES))], content[:at], content[at:]
            changes = piece + tail, piece + tail[length:], tail[length:], tail[:length] + tail, b""
            content = head + changes[rng.choice(5, p=[0.3, 0.3, 0.2, 0.15, 0.05])]
        path.write_bytes(content)
        try:
            value = read(path)
        except SystemExit as end:
            assert str(path) in end.code and "\n" not in end.code
            value, refused = None, refused + 1
        check(content, value)
    return refused / (count * TIMES)


def rows_of(content):
    """What a text file says: [(user, item)]. None if it must be refused."""
    rows = [line.split() for line in content.decode("latin1").split("\n") if line.split()]  # as numpy does
    good = re.compile("[+]?[0-9]+").fullmatch
    if not rows or not all(len(r) == 2 and all(good(w) and 0 < int(w) < 10**8 for w in r) for r in rows):
        return None
    rows = [(int(user), int(item)) for user, item in rows]
    users = [user for user, _ in groupby(rows, lambda row: row[0])]
    return rows if len({*users}) == len(users) else None


@pytest.mark.parametrize("kind", ["text", "<i8", "<u2"])
def test_data_files(kind, tmp_path):
    def check(content, data):
        expected = rows_of(content) if kind == "text" else data and np.load(path)
        if data:  # in an array, another number may be as good as the one that was there
            rows = np.stack([np.repeat(data.user_ids, np.diff(data.starts)), data.items], 1)
            assert np.array_equal(rows, expected) and rows.min() > 0, content
        else:  # a bare \r may be refused
            assert expected is None or re.search(rb"\r(?!\n)", content), content

    rows = [(user, item) for user in (7, 3, 12) for item in np.random.default_rng(0).integers(1, 40, 5)]
    path = tmp_path / ("data.txt" if kind == "text" else "data.npy")
    np.savetxt(path, rows, "%d") if kind == "text" else np.save(path, np.array(rows, kind))
    assert 0.2 < share_refused(path, sasrec_teacher.read_interactions, check, 150, seed=0) < 0.98


def test_model_files(write_data, write_gru, capfd):
    def check(content, loaded):
        for value, other in zip(loaded[0](*inputs), expected, strict=True) if loaded else []:
            assert torch.equal(value, other)

    path, data = write_gru(), evaluate.read_interactions(write_data({9: range(1, 13)}))
    inputs, read = (torch.ones(3, dtype=int), torch.arange(1, 13).view(3, 4)), evaluate.load_model
    expected = read(path, data, "cpu")[0](*inputs)
    assert share_refused(path, lambda path: read(path, data, "cpu"), check, 25, seed=3) > 0.8
    assert capfd.readouterr().err == ""


def test_architecture_files(tmp_path, write_data, monkeypatch):
    def check(content, status):
        if status == "built":
            num_cells, dim, edges = built
            assert num_cells > 0 and dim > 0 and type(num_cells) is type(dim) is int
            assert [len(row) for row in edges] == [*range(1, len(edges) + 1)]
            cell(8, edges)
        built.clear()

    path, built, cell = tmp_path / "a.json", [], adarec_search.Cell
    argv = [str(write_data({9: [3, 12]})), "--architecture", str(path), "--out", "b.json"]
    # a damaged file may ask for 10**8 cells, so record what would be built
    record = {"range": lambda n: built.append(n) or [0], "Cell": lambda *args: built.extend(args)}
    for name, fake in (dict.fromkeys(("Student", "Run", "save_student"), lambda *_: None) | record).items():
        monkeypatch.setattr(adarec_search, name, fake, raising=False)
    edges = [["conv3"], ["skip", "dilated_conv5"], ["none", "mean", "avg_pool"]]
    path.write_text(json.dumps({"cells": 4, "nodes": 3, "dim": 64, "edges": edges}))
    assert share_refused(path, lambda _: adarec_search.main(argv) or "built", check, 50, seed=3) > 0.4
