"""What the pages show is true: links lead somewhere, snippets run, commands are understood."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import GRU, save_data

import evaluate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "results").glob("*.md"))]
SCRIPTS = ["sasrec_teacher", "adarec_search", "emd_distill", "bidirectional_distill", "evaluate"]


def anchors(page):
    """The anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (link for link in links if not link.startswith("http")):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), link


def test_each_function_in_a_table_of_the_readme_is_a_link():
    names = {name for script in SCRIPTS for name in vars(importlib.import_module(script))}
    rows = [line for line in README.splitlines() if line.startswith("| ")]
    linked = re.compile(r"\[`[\w.]+`\]\(\w+\.py#L\d+\)")
    assert sum(len(linked.findall(row)) for row in rows) > 40
    for row in rows:
        for name in re.findall(r"`([a-zA-Z_]\w+)`", linked.sub("", row)):
            assert name not in names, f"{name} is no link in: {row}"


def test_the_snippet_of_the_readme_makes_a_model_file(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    (snippet,) = (text for text in snippets if "torch.export.save" in text)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    model = GRU(1682, 50, 1)
    exec(compile(snippet, "README.md", "exec"), {"model": model})
    data = save_data(tmp_path, {user: range(user, user + 5) for user in range(1, 9)})
    module, config = evaluate.load_model("runs/mine.pt2", evaluate.read_interactions(data), "cpu")
    batch = torch.ones(3, dtype=torch.int64), torch.randint(1, 1683, (3, 7))
    torch.testing.assert_close(module(*batch), model(*batch))
    assert config["window"] == 50


def test_the_commands_of_the_data_page_join_published_files(tmp_path, monkeypatch):
    blocks = re.findall(r"```(?:python)?\n(.*?)```", (ROOT / "data" / "README.md").read_text(), re.S)
    with_awk, with_torch = (next(text for text in blocks if word in text) for word in ("awk", "np.savetxt"))
    parts = {"train": [(1, 7), (0, 3), (1, 2), (0, 9)], "valid": [(0, 1), (1, 0)], "test": [(0, 5), (1, 8)]}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part, rows in parts.items():
        Path(f"{part}.txt").write_text("".join(f"{user}\t{item}\t{99 - item}\n" for user, item in rows))
        torch.save(torch.tensor(rows), f"{part.replace('valid', 'val')}_5.pt")
    subprocess.run(with_awk, shell=True, check=True)
    exec(compile(with_torch, "data/README.md", "exec"), {})
    joined = [(tmp_path / "data" / name).read_text() for name in ("beauty5.txt", "citeulike.txt")]
    assert joined[0] == "1 4\n1 10\n1 2\n1 6\n2 8\n2 3\n2 1\n2 9\n"  # training items in the published order
    assert joined[1] == "1 4\n1 10\n1 2\n1 6\n2 3\n2 8\n2 1\n2 9\n"  # training items by id


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_understood(page, monkeypatch, tmp_path):
    blocks = re.findall(r"```\n(.*?)```", page.read_text(), re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(python [^`]+)`", page.read_text())
    for line in [*lines, *(" ".join(text.split()) for text in inline)]:
        if not (command := re.match(r"(?:python|torchrun --nproc-per-node=2) (\w+)\.py ", line)):
            continue
        script, argv = command[1], shlex.split(line[command.end() :], comments=True)
        if script not in SCRIPTS:
            continue
        module, parsed = importlib.import_module(script), []
        for name in ("train", "search", "build", "evaluate", "recommend"):
            monkeypatch.setattr(module, name, parsed.append, raising=False)
        monkeypatch.setattr(module, "print_table", lambda *_: None, raising=False)
        module.main(argv)
        assert len(parsed) == 1, line
