"""Numbers that an option refuses, in one line and with status 2, before a file is read; and the defaults."""

import importlib

import pytest

COMMON = "--batch-size=0 --epochs=-1 --epochs=x --seed=-1 --learning-rate=-0.1 --learning-rate=nan"
TEACHER = "--dim=0 --blocks=0 --heads=3 --max-length=0 --negatives=-1 --dropout=1.5 --patience=0"
SEARCH = "--cells=0 --nodes=0 --dim=0 --max-length=0 --negatives=-1 --alpha-warm-up=-1 --dropout=2 --epochs=2"
BOTH = "--dims=0=2 --period=0 --samples=0 --warm-up=-1 --lambda-student=-1 --temperature=-1"
WRONG = {  # a command, and words to add to it
    "sasrec_teacher d.txt --out=a.pt2": f"{COMMON} {TEACHER}",
    "adarec_search d.txt --out=a.json": f"{COMMON} {SEARCH} --beta=-1 --gamma=1.1 --alpha-learning-rate=-1",
    "emd_distill d.txt --out=a --student=S": f"{COMMON} --negatives=-1 --patience=0 --gamma=2 --final-rate=2",
    "bidirectional_distill d.txt --out=a --base=bpr": f"{COMMON} {BOTH} --warm-up=0=--epochs=0",
    "evaluate d.txt m.pt2": "--at=0 --negatives=0 --negatives=-1 --users=0",
}
LAMBDAS = "lambda_teacher=0.5 lambda_student=0.5"
DEFAULTS = {
    "sasrec_teacher": "dropout=0.2 learning_rate=0.001 final_rate=1.0",
    "adarec_search": "dropout=0.2 gamma=0.5 beta=0.3 learning_rate=0.005 alpha_learning_rate=0.05",
    "emd_distill --student=S": "gamma=0.5 distance=kl mapping=emd learning_rate=0.005 final_rate=1.0",
    "bidirectional_distill --base=bpr": f"temperature=5.0 learning_rate=0.001 {LAMBDAS}",
    "bidirectional_distill --base=cdae": f"temperature=2.0 learning_rate=0.002 {LAMBDAS}",
    "bidirectional_distill --teacher=T --student=S": f"temperature=1.0 learning_rate=0.001 {LAMBDAS}",
    "bidirectional_distill --base=softmax --teacher=T --student=S": "temperature=1.0 learning_rate=0.001",
}


@pytest.mark.parametrize("command, word", [(key, word) for key in WRONG for word in WRONG[key].split()])
def test_a_wrong_number_is_refused(command, word, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *argv = command.split()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script).main([*argv, *word.split("=")])
    message = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error: " in message and word.split("=")[0] in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, defaults", DEFAULTS.items())
def test_the_defaults(command, defaults, monkeypatch):
    script, *argv = command.split()
    module, parsed = importlib.import_module(script), []
    monkeypatch.setattr(module, "search" if script == "adarec_search" else "train", parsed.append)
    module.main(["d.txt", "--out=a.json", *argv])
    assert {*defaults.split()} <= {f"{name}={value}" for name, value in vars(parsed[0]).items()}
