"""data/prepare.py against oracles of its own: plain Python loops, sums by hand and chi-square."""

import gzip
import hashlib
import io
import random
import re
import subprocess
import zipfile
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import prepare
import pytest
from scipy import stats

README = (Path(prepare.__file__).parent / "README.md").read_text()


def pairs(path):
    """The rows of a table."""
    if path.suffix == ".npy":
        table = np.load(path, mmap_mode="r")
        assert table.dtype == np.int64
        return list(map(tuple, table.tolist()))
    return [tuple(map(int, line.split(" "))) for line in path.read_text().splitlines()]


def names(out, side):
    """The file of users or items beside the table `out`."""
    return Path(f"{out}.{side}.tsv").read_bytes()


def zipped(members):
    """The bytes of a .zip of {name: content}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return content.getvalue()


def main(*words):
    """Run prepare.py with options and paths; no blank is in one."""
    prepare.main(" ".join(map(str, words)).split())


def fails(words, needle):
    """The command must end with one line for stderr, status 1, that has `needle`."""
    with pytest.raises(SystemExit) as ended:
        main(*words)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    assert str(needle) in ended.value.code


MEMBERS = {  # of the wheel, by name
    prepare.FOLDER + "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "10\t3\t4\t50\n2\t1\t5\t70\n2\t3\t1\t60\n10\t2\t3\t50\n2\t2\t2\t60\n10\t1\t3\t9\n",
    prepare.FOLDER + "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    "1\tToy Story\t1995\n2\tMisérables, Les\t1995\n3\tGoldenEye\t1995\n",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel, with its checksums in place of the real ones."""
    for member, text in MEMBERS.items():
        monkeypatch.setitem(prepare.SHA256, member, hashlib.sha256(text.encode()).hexdigest())
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    path.write_bytes(zipped(MEMBERS))
    return path


@pytest.mark.parametrize("download", [False, True])
def test_ml_100k_is_in_time_order_with_its_own_ids(download, wheel, tmp_path, monkeypatch, capsys):
    folders = []

    def pip(command, **_):
        assert "pip download" in " ".join(command) and "--no-deps" in command and command[-1] == prepare.WHEEL
        folders.append(Path(command[command.index("--dest") + 1]))
        (folders[0] / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    out = tmp_path / "ml.txt"
    main("ml-100k --out", out, *([] if download else ["--wheel", wheel]))
    # By number, not by text (10 after 2); at times 50 and 60 the order of the file.
    assert out.read_bytes() == b"2 3\n2 2\n2 1\n10 1\n10 3\n10 2\n"
    assert names(out, "items") == "1\tToy Story\n2\tMisérables, Les\n3\tGoldenEye\n".encode()
    assert "2 users, 3 items, 6 interactions" in capsys.readouterr().out
    assert len(folders) == download and not any(folder.exists() for folder in folders)


def test_ml_100k_without_a_network_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails(["ml-100k --out", tmp_path / "ml.txt"], "pip could not fetch recbole==1.2.1; take it elsewhere")
    assert "No matching distribution" in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["no zip", "cut", "no members", *MEMBERS])
def test_ml_100k_refuses_a_file_that_is_no_such_wheel(spoilt, wheel, tmp_path):
    contents = {"no zip": b"not a wheel", "cut": wheel.read_bytes()[:-30], "no members": zipped({})}
    contents |= {member: zipped(MEMBERS | {member: text + "9\t9"}) for member, text in MEMBERS.items()}
    wheel.write_bytes(contents[spoilt])
    fails(["ml-100k --wheel", wheel, "--out", tmp_path / "ml.txt"], "SHA-256" if spoilt in MEMBERS else "")
    assert list(tmp_path.iterdir()) == [wheel]


SCENES = pytest.mark.parametrize("scene, lag", [("markov", 0), ("lag", 2), ("taste", None)])


def reference(world, lag, noise, history, taste):
    """The next item's distribution {item: probability}, written out for one user."""
    popularity, successors, groups = (array.tolist() for array in world)
    weights = {}
    for place, share in enumerate(popularity):
        if lag is None:
            structure = (groups[place] == taste) / groups.count(taste)
        elif len(history) > lag:
            following = successors[history[len(history) - 1 - lag] - 1]
            structure = 2 ** (3 - following.index(place)) / 15 if place in following else 0
        else:
            structure = share
        weights[place + 1] = 0 if place + 1 in history else (1 - noise) * structure + noise * share
    total = sum(weights.values())
    return {item: weight / total for item, weight in weights.items()}


def test_a_world_is_zipf_with_four_other_successors_and_even_groups():
    popularity, successors, groups = prepare.make_world(40, np.random.default_rng(0))
    zipf = 1 / np.arange(1, 41)
    np.testing.assert_allclose(np.sort(popularity)[::-1], zipf / zipf.sum())
    assert all(len({*others, item} & set(range(40))) == 5 for item, others in enumerate(successors.tolist()))
    assert Counter(groups.tolist()) == dict.fromkeys(range(5), 8)


@SCENES
def test_conditional_is_the_formula(scene, lag):
    rng = np.random.default_rng(1)
    world = prepare.make_world(23, rng)
    for past in [0, 1, 2, 3, 9, 22]:
        histories = np.array([rng.permutation(23)[:past] + 1 for _ in range(4)]).reshape(4, past)
        tastes = rng.integers(prepare.GROUPS, size=4)
        found = prepare.conditional(world, lag, 0.3, histories, tastes)
        for row, history, taste in zip(found, histories.tolist(), tastes, strict=True):
            expected = reference(world, lag, 0.3, history, taste)
            np.testing.assert_allclose(row, list(expected.values()), atol=1e-14)


@SCENES
def test_whole_histories_follow_the_process(scene, lag):
    """Chi-square over every history of four of five items, the users' groups mixed evenly."""
    rng = np.random.default_rng(3)
    world = prepare.make_world(5, rng)
    drawn, tastes, _ = prepare.simulate(world, lag, 0.6, 100_000, 4, rng)
    histories = list(permutations(range(1, 6), 4))
    steps = [(history[:t], history[t]) for history in histories for t in range(4)]
    p = [[reference(world, lag, 0.6, past, taste)[item] for taste in range(5)] for past, item in steps]
    expected = 100_000 * np.reshape(p, (-1, 4, 5)).prod(axis=1).mean(axis=1)
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) <= set(histories) and expected.min() > 5  # nothing with an item twice
    assert stats.chisquare([counts[history] for history in histories], expected).pvalue > 1e-3
    assert stats.chisquare(np.bincount(tastes)).pvalue > 1e-3


@SCENES
def test_the_command_writes_what_the_seed_draws_in_slices_too(scene, lag, tmp_path, monkeypatch, capsys):
    def make(seed):
        size = f"--lag 2 --users 50 --items 30 --length 8 --noise 0.3 --seed {seed}"
        main("synthetic --scene", scene, size, "--out", tmp_path / "x")
        return pairs(tmp_path / "x"), capsys.readouterr().out

    whole = make(5)
    rng = np.random.default_rng(5)
    world = prepare.make_world(30, rng)
    histories, tastes, _ = prepare.simulate(world, lag, 0.3, 50, 8, rng)
    assert whole[0] == [(user, item) for user, row in enumerate(histories, 1) for item in row]
    # In expectation the best of all models has the likeliest item first, and so on.
    cases = zip(histories[:, :-1].tolist(), tastes, strict=True)
    truths = [reference(world, lag, 0.3, history, taste) for history, taste in cases]
    likeliest = np.array([sorted(truth.values(), reverse=True)[:10] for truth in truths]).mean(axis=0)
    hr, ndcg = likeliest.sum(), sum(p / np.log2(rank + 1) for rank, p in enumerate(likeliest, 1))
    assert f"best possible on the test items: HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}\n" in whole[1]
    monkeypatch.setattr(prepare, "SLICE", 30 * 7)  # 8 slices of 6 or 7 users
    assert make(5) == whole


@pytest.mark.parametrize("options, hr, ndcg", re.findall(r"`(--scene .*?)` \| ([\d.]+) \| ([\d.]+)", README))
def test_synthetic_gives_full_histories_and_the_figures_of_the_readme(options, hr, ndcg, tmp_path, capsys):
    out = tmp_path / "a" / "b" / "scene.npy"  # the folders are made
    main("synthetic", options, "--out", out)
    table = pairs(out)
    assert len(table) == len({*table}) == 60_000  # no user has an item twice
    assert np.min(table, axis=0).tolist() == [1, 1] and np.max(table, axis=0).tolist() == [2000, 200]
    said, figures = capsys.readouterr().out, f"best possible on the test items: HR@10 {hr}, NDCG@10 {ndcg}"
    assert said == f"{out}: 2,000 users, 200 items, 60,000 interactions\n{figures}\n"


OUTSIDE = ["--users 0", "--length 2 --scene taste", "--items 29", "--items 4 --length 4 --scene taste"]
OUTSIDE += ["--noise 0", "--noise 1.1", "--noise nan", "--lag 0", "--lag 29", "--seed -1"]
LIMITS = ["--lag 28", "--items 30", "--length 200 --users 3", "--noise 1", "--items 8 --length 8 --users 75"]


@pytest.mark.parametrize("options", OUTSIDE)
def test_synthetic_refuses_what_makes_no_scene(options, tmp_path):
    fails(["synthetic --scene lag --out", tmp_path / "x.txt", options], "a scene needs ")


@pytest.mark.parametrize("extreme", LIMITS)
def test_synthetic_runs_at_the_limits(extreme, tmp_path):
    main("synthetic --users 20 --scene lag", extreme, "--out", tmp_path / "x.txt")
    assert len({*pairs(tmp_path / "x.txt")}) == 600  # no item twice


def convert_slowly(rows, event=None, min_rating=0, dedupe=False, k=1, timed=False):
    """The table and both maps that `convert` must give for rows (user, item, rating, time, event)."""
    rows = [row for row in rows if event in (None, row[4]) and row[2] >= min_rating]
    first = {}
    for row in sorted(rows, key=lambda row: row[3] * timed):  # sorted() keeps ties
        first.setdefault(row[:2], row)
    rows = [row for row in rows if not dedupe or first[row[:2]] is row]
    before = None
    while rows != before:
        before = rows
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        rows = [row for row in rows if users[row[0]] >= k and items[row[1]] >= k]
    users, items = (list(dict.fromkeys(row[side] for row in rows)) for side in (0, 1))
    rows = sorted(rows, key=lambda row: (users.index(row[0]), row[3] * timed))
    table = [(users.index(row[0]) + 1, items.index(row[1]) + 1) for row in rows]
    maps = ["".join(f"{n}\t{name}\n" for n, name in enumerate(ids, 1)) for ids in (users, items)]
    return table, *(text.encode() for text in maps)


CHOICES = [{}, {"event": "view", "min_rating": 2.5, "k": 4, "timed": True}, {"dedupe": True, "k": 7}]
CHOICES += [{"dedupe": True, "timed": True}, {"dedupe": True, "timed": True, "k": 4, "event": "view"}]


@pytest.mark.parametrize("separator", [",", "\t", "::", ";", "|", " ", "^", "tab", "<>"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("form", [".csv", ".gz", ".zip"])
def test_convert_agrees_with_a_plain_reference(separator, header, form, tmp_path, capsys):
    draw, columns = random.Random(1).choice, "who what stars when kind" if header else "1 2 3 4 5"
    kinds = range(60), range(70), [1, 2.5, 4, 5], range(3), ["view", "view", "buy"]  # few times: many ties
    rows = [tuple(map(draw, kinds)) for _ in range(900)]
    lines = [columns.split()] * header + [map(str, row) for row in rows]
    text = "\n".join(("\t" if separator == "tab" else separator).join(line) for line in lines).encode()
    log, out = tmp_path / f"log{form}", tmp_path / "out.txt"
    packed = {".csv": text, ".gz": gzip.compress(text), ".zip": zipped({"a/": "", "a/log.csv": text})}
    log.write_bytes(packed[form])
    user, item, rating, when, kind = columns.split()
    options = f"--user {user} --item {item} --rating {rating} --event-column {kind} --out {out}"
    options += f" --separator {separator}" * (separator in ("^", "tab", "<>"))  # others are found
    for choice in CHOICES:
        more = f" --time {when}" * choice.get("timed", False) + " --dedupe" * choice.get("dedupe", False)
        more += f" --k-core {choice.get('k', 1)} --min-rating {choice.get('min_rating', 0)}"
        more += " --event view" * ("event" in choice)
        main("convert", log, options, more)
        expected = convert_slowly(rows, **choice)
        assert (pairs(out), names(out, "users"), names(out, "items")) == expected
        said = capsys.readouterr()
        assert f"{len(expected[0]):,} interactions" in said.out and not said.err and len(expected[0]) > 99


def test_k_core_goes_on_until_nothing_changes():
    # Item 3 falls first, then user 2, then item 2; users 0, 1 and items 0, 1 hold each other.
    users, items = np.array([0, 0, 1, 1, 2, 2, 0]), np.array([0, 1, 0, 1, 2, 3, 2])
    for k, kept in [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 1, 2, 3]), (3, [])]:
        assert prepare.k_core(users, items, k).tolist() == kept


SMALL = [  # a log, options, the rows of the table with their original ids, what is said on stderr
    # b comes first in the file, but its row with x goes, and with it a's row comes before b's.
    (b"b,x\na,y\nb,y\na,z\nb,z\n", "--k-core 2", b"a/y a/z b/y b/z", ""),
    (b"a,x,3.9\nb,x,4\nc,x,4.0\nd,x,nan\n", "--rating 3 --min-rating 4", b"b/x c/x", ""),
    (b'"Do,e",x\n a ,"say""hi"""\na,y\n', "", b'Do,e/x a/say"hi" a/y', ""),
    (b'a,x,"1\n2"\nb,x,3\n', "", b"a/x b/x", ""),  # a field of two lines
    (b"a,x\r\n\r\nb,x\r\n", "", b"a/x b/x", ""),
    (b"\xef\xbb\xbfa,caf\xe9\n", "", b"a/caf\xe9", ""),  # a byte order mark, Latin-1
    (b'"a::x\nb"c::x\n', "", b'"a/x b"c/x', ""),
    (b"a;1,5;2,5\n", "", b"a/1,5", ""),
    (b'"a;b;c;d","x",3\n', "", b"a;b;c;d/x", ""),
    # Times: nanoseconds, numbers of all kinds, dates; one that names no zone is in UTC.
    (b"a,x,1600000000000000002\na,y,1600000000000000001\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,20\na,y,3.5\na,z,3\na,w,-1e1\n", "--time 3", b"a/w a/z a/y a/x", ""),
    (b"a,x,7\na,y,7.0\na,z,7\n", "--time 3", b"a/x a/y a/z", ""),
    (b"a,x,2014-04-07T10:51:09.277Z\na,y,2014-04-07T10:51:09.276Z\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,2020-01-01 00:00:01\na,y,2020-01-01T01:00:00+01:00\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,2017-04-20 00:05:15 UTC\na,y,2017-04-20\n", "--time 3", b"a/y a/x", ""),
    (b"user,item,time\na,x,1\nb,y,2\n", "--time 3", b"a/x b/y", "log.csv: line 1 is taken for a header"),
    (b"\nuser;item\n1;5\n2;5\n", "", b"1/5 2/5", "log.csv: line 2 is taken for a header"),
    (b"ann,mug\n5,pen\n", "", b"ann/mug 5/pen", ""),
    (b"ann,mug,1\nbob2,pen2,2\n", "--time 3", b"ann/mug bob2/pen2", ""),
    (b"a,1\nb,2\nb,1.0\n", "", b"a/1 b/2 b/1.0", "some items are the same number"),
    (b"07,1\n7,2\n70,1\n", "", b"07/1 7/2 70/1", "some users are the same number"),
    (b"1,a1\n10,a1.0\n100,a01\n", "", b"1/a1 10/a1.0 100/a01", ""),
    (b"a,x,1\nb,y\n,y,1\na,y,noon\na,z,0\n", "--time 3 --skip-bad", b"a/z a/x", "log.csv: 3 bad"),
    # Bad lines have numbered items beyond the number of rows.
    (b"a,x,-\na,y,-\na,z,1\nb,x,1\n", "--time 3 --skip-bad --dedupe", b"a/z b/x", "2 bad"),
    (b'a,x\n"b"b,y\nc,y\n', "--skip-bad", b"a/x c/y", "1 bad"),
    (b'a,x\nb,"y\nc,y\n', "--skip-bad", b"a/x", "2 bad"),  # the open quote takes the last line too
]


@pytest.mark.parametrize("content, options, expected, note", SMALL)
def test_small_logs(content, options, expected, note, tmp_path, capsys):
    log, out = tmp_path / "log.csv", tmp_path / "out.npy"
    log.write_bytes(content)
    main("convert", log, "--user 1 --item 2", options, "--out", out)
    users, items = (dict(re.findall(rb"(.+)\t(.+)\n", names(out, side))) for side in ("users", "items"))
    rows = [users[b"%d" % user] + b"/" + items[b"%d" % item] for user, item in pairs(out)]
    assert b" ".join(rows) == expected
    said = capsys.readouterr().err
    assert note in said and said.count("\n") == bool(note)


def test_the_readme_example(tmp_path, monkeypatch):
    log, table = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(log)
    main(re.search(r"`python data/prepare.py (convert log.csv .*?)`", README, re.DOTALL)[1])
    assert Path("log.txt").read_text() == table and table.count("\n") == 10
    assert names("log.txt", "items") == b"1\tmug\n2\tpen\n3\tcup\n4\tlamp\n"


BAD_LOGS = [  # content, options beyond --user 1 --item 2, what the message must have
    (b"", "", "no column 1 for --user"),
    (b"a,x\nb,y\n\nb\n", "", "line 4: 1 column(s) where the first line has 2"),
    (b'a,x,"1\n2"\nb,y\n', "", "line 3: 2 column(s) where the first line has 3"),
    (b"a::x::1\n", "--separator ,", "no column 2 for --item; check --separator; its columns: ['a::x::1']"),
    (b"a,x\n", "--time 0", "no column 0 for --time"),
    (b"u,i\na,x\n", "--event view", "no column event for --event"),
    (b"a,x\n", "--min-rating 4", "no column rating for --rating"),
    (b"a,x,noon\nb,x,nine\n", "--time 3", "line 1: could not convert string to float: 'noon'"),
    (b"a,x,1\nb,x,nan\n", "--time 3", "line 2: the time is nan"),
    (b"a,x,1\nb,x,99999999999999999999\n", "--time 3", "line 2"),
    (b"a,x,2020-01-31\n\nb,x,5\n", "--time 3", "line 3: Invalid isoformat string: '5'"),
    (b"a,x,5\na,y,so\n", "--rating 3 --min-rating 1", "line 2: could not convert string to float: 'so'"),
    (b"a,x\nb, \n", "", "line 2: the id '' is empty"),
    (b'a,x\n"b\nc",y\n', "", "line 2: the id 'b\\nc'"),
    (b"a,x\nb,x\ty\n", "--separator ,", "line 2: the id 'x\\ty'"),
    (b'a,x\n"b,y\nc,x\n', "", "line 2: unexpected end of data"),
    (b"a" * 200_000, "", "field larger than field limit"),
    (b"u,i,event\na,x,buy\n", "--user u --event view --dedupe", "no interaction is left"),
]


@pytest.mark.parametrize("content, options, needle", BAD_LOGS)
def test_convert_refuses_bad_logs_and_overwrites_nothing(content, options, needle, tmp_path):
    log, out = tmp_path / "log.csv", tmp_path / "out.txt"
    log.write_bytes(content)
    out.write_text("old")
    fails(["convert", log, "--user 1 --item 2", options, "--out", out], needle)
    assert out.read_text() == "old" and {*tmp_path.iterdir()} == {log, out}


UNREADABLE = {
    "plain.gz": b"a,x\n",
    "cut.gz": gzip.compress(b"a,x\n")[:-9],
    "spoilt.gz": gzip.compress(b"a,x\n")[:10] + b"\xff",  # no such kind of block
    "plain.zip": b"a,x\n",
    "two.zip": zipped({"a.csv": "a,x\n", "b.csv": "a,x\n"}),
    "secret.zip": zipped({"a.csv": ""}).replace(b"\x14\0\0\0", b"\x14\0\1\0"),  # takes a password
}


@pytest.mark.parametrize("name", ["missing.csv", *UNREADABLE])
def test_convert_refuses_what_it_cannot_read(name, tmp_path):
    log, out = tmp_path / name, tmp_path / "out.txt"
    if name in UNREADABLE:
        log.write_bytes(UNREADABLE[name])
    fails(["convert", log, "--user 1 --item 2 --out", out], "a.csv, b.csv" if name == "two.zip" else tmp_path)
    assert not out.exists()


CLASHES = [("x", "x"), ("x.items.tsv", "x"), ("x.users.tsv.tmp", "x"), ("x", "x/y"), ("x", "")]


@pytest.mark.parametrize("name, place", CLASHES)
def test_out_must_be_a_place_to_write_and_leave_the_log_alone(name, place, tmp_path):
    log, out = tmp_path / name, tmp_path / place
    log.write_text("a,x\n")
    fails(["convert --user 1 --item 2", log, "--out", out], f"{out} {'would' * (place == 'x')}")
    assert log.read_text() == "a,x\n" and list(tmp_path.iterdir()) == [log]


@pytest.mark.parametrize("command", ["", "ml-100k", "synthetic", "convert"])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command, "--help")
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 200
