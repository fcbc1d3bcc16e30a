"""Files damaged in any way are read right or refused in one line; with MUTATIONS=1, ten times as many."""

import json
import os
import re

import numpy as np
import torch

import adarec_search
import evaluate
import sasrec_teacher

TIMES = 10 if "MUTATIONS" in os.environ else 1
PIECES = [bytes([byte]) for byte in b"019-+.,e_# \t\n\r\x0b\x85\xff\0"]
PIECES += ["\u0663".encode(), b"nan", b"1 1\n", b"99999999", b"4294967297"]


def mutated(content, rng):
    """`content` with one to three changes: bytes put in, taken out, exchanged, repeated, or the end lost."""
    for _ in range(rng.integers(1, 4)):
        at, length = rng.integers(len(content) + 1), rng.choice([1, 1, 2, 8, 40])
        piece = PIECES[rng.integers(len(PIECES))]
        head, tail, rest = content[:at], content[at:], content[at + length :]
        changed = [head + piece + tail, head + piece + rest, head + rest, head + tail[:length] + tail, head]
        content = changed[rng.choice(5, p=[0.3, 0.3, 0.2, 0.15, 0.05])]
    return content


def histories(content):
    """What a data file says, None if it must be refused: ids of ASCII digits, a user's rows together."""
    found, last = {}, None
    for line in content.decode("latin1").split("\n"):  # as numpy reads it
        words = line.split()
        if not words:
            continue
        if len(words) != 2 or not all(re.fullmatch("[+]?[0-9]+", w) and 0 < int(w) < 10**8 for w in words):
            return None
        user, item = map(int, words)
        if user != last and user in found:
            return None
        found.setdefault(user, []).append(item)
        last = user
    return found or None


def test_data_files(tmp_path):
    rng, path, refused = np.random.default_rng(0), tmp_path / "data.txt", 0
    lines = [f"{user} {item}\n" for user in (7, 3, 12) for item in rng.integers(1, 40, 5)]
    for _ in range(200 * TIMES):
        content = mutated("".join(lines).encode(), rng)
        path.write_bytes(content)
        expected = histories(content)
        try:
            user_ids, starts, items = sasrec_teacher.read_interactions(path)
        except SystemExit as end:
            assert expected is None or re.search(rb"\r(?!\n)", content), content  # a bare \r may be refused
            assert str(path) in end.code and "\n" not in end.code
            refused += 1
        else:
            found = {
                int(u): items[b:e].tolist() for u, b, e in zip(user_ids, starts, starts[1:], strict=False)
            }
            assert found == expected, content
    assert 0.2 < refused / (200 * TIMES) < 0.9


def test_arrays(tmp_path):
    rng, path, refused, rows = np.random.default_rng(1), tmp_path / "data.npy", 0, [(7, 3), (7, 9), (2, 3)]
    for kind in (np.int64, np.uint16):
        np.save(path, np.array(rows, kind))
        content = path.read_bytes()
        for _ in range(30 * TIMES):
            path.write_bytes(mutated(content, rng))
            try:
                user_ids, starts, items = sasrec_teacher.read_interactions(path)
            except SystemExit as end:
                assert str(path) in end.code and "\n" not in end.code
                refused += 1
            else:  # another number may be as good as the one that was there
                table = np.load(path)
                assert table.min() > 0 and np.array_equal(items, table[:, 1])
                assert np.array_equal(np.repeat(user_ids, np.diff(starts)), table[:, 0])
    assert refused > 20 * TIMES


def test_model_files(tmp_path, write_gru, capfd):
    rng, path, refused = np.random.default_rng(2), tmp_path / "model.pt2", 0
    content, histories = (
        write_gru().read_bytes(),
        (torch.ones(3, dtype=torch.int64), torch.arange(1, 13).view(3, 4)),
    )
    path.write_bytes(content)
    expected = evaluate.load_model(path, 9, 12)[0].module()(*histories)
    for _ in range(25 * TIMES):
        path.write_bytes(mutated(content, rng))
        try:
            program, config = evaluate.load_model(path, 9, 12)
        except SystemExit as end:
            assert str(path) in end.code and "\n" not in end.code
            refused += 1
        else:
            torch.testing.assert_close(program.module()(*histories), expected, rtol=0, atol=0)
    assert capfd.readouterr().err == "" and refused > 20 * TIMES


def test_architecture_files(tmp_path):
    rng, path, refused = np.random.default_rng(3), tmp_path / "a.json", 0
    rows = [["conv3"], ["skip", "dilated_conv5"], ["none", "mean", "avg_pool"]]
    content = json.dumps({"cells": 4, "nodes": 3, "dim": 64, "edges": rows}).encode()
    for _ in range(50 * TIMES):
        path.write_bytes(mutated(content, rng))
        try:
            cells, dim, edges = adarec_search.read_architecture(path)
        except SystemExit as end:
            assert str(path) in end.code and "\n" not in end.code
            refused += 1
        else:
            assert cells > 0 and dim > 0 and type(cells) is type(dim) is int
            assert [len(row) for row in edges] == [*range(1, len(edges) + 1)]
            adarec_search.Cell(8, edges)
    assert refused > 20 * TIMES
