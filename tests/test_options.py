"""Options that are numbers which cannot be: one line and status 2, before anything is read or written."""

import importlib

import pytest

COUNTS = "--batch-size=0 --epochs=-1 --seed=-1 --learning-rate=-0.1 --learning-rate=nan"
SEARCHED = (
    "--cells=0 --nodes=0 --dim=0 --max-length=0 --negatives=-1 --alpha-warm-up=-1 --dropout=2 --gamma=1.1"
)
PUT = {
    "sasrec_teacher": "--dim=0 --blocks=0 --heads=3 --max-length=0 --negatives=-1 --dropout=1.5 --patience=0",
    "adarec_search": f"{SEARCHED} --beta=-1 --epochs=2",
    "emd_distill": "--negatives=-1 --patience=0 --gamma=-0.1 --final-rate=2",
    "bidirectional_distill": "--period=0 --samples=0 --warm-up=-1 --lambda-student=-1 --temperature=-1",
    "evaluate": "--at=0 --negatives=0 --negatives=-1 --users=0",
}
NEEDED = {"emd_distill": ["--student=s.pt2"], "bidirectional_distill": ["--base=bpr"]}
CASES = [(script, word) for script, words in PUT.items() for word in words.split()]
CASES += [(script, word) for script in PUT if script != "evaluate" for word in COUNTS.split()]
CASES += [("bidirectional_distill", "--dims=0=2"), ("bidirectional_distill", "--warm-up=0=--epochs=0")]


@pytest.mark.parametrize("script, wrong", CASES)
def test_a_number_that_cannot_be_is_told(script, wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = {"evaluate": ["model.pt2"], "adarec_search": ["--out=a.json"]}.get(script, ["--out=a.pt2"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main(["d.txt", *out, *NEEDED.get(script, []), *wrong.split("=")])
    told = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: --" in told and not list(tmp_path.iterdir())
    assert wrong.split("=")[0] in told
