"""data/prepare.py against plain Python loops, sums by hand and chi-square tests."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import re
import subprocess
import zipfile
from collections import Counter
from contextlib import redirect_stderr
from itertools import permutations, product
from pathlib import Path

import numpy as np
import prepare
import pytest
from scipy import stats

README = (Path(prepare.__file__).parent / "README.md").read_text()


def pairs(path):
    """The rows of a table."""
    table = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.loadtxt(path, np.int64, ndmin=2)
    assert table.dtype == np.int64
    return list(map(tuple, table.tolist()))


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
    """Run prepare.py with options and paths, none of which has a blank in it."""
    prepare.main(" ".join(map(str, words)).split())


def fails(words, needle):
    """The command must end with one line on stderr, from `sys.exit` or argparse, that has `needle`."""
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as ended:
        main(*words)
    message = stderr.getvalue().splitlines()[-1] if ended.value.code == 2 else ended.value.code
    assert str(needle) in message and "\n" not in message


INTERACTIONS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
INTERACTIONS += "10\t3\t4\t50\n2\t1\t5\t70\n2\t3\t1\t60\n10\t2\t3\t50\n2\t2\t2\t60\n10\t1\t3\t9\n"
TITLES = "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
TITLES += "1\tToy Story\t1995\n2\tMisérables, Les\t1995\n3\tGoldenEye\t1995\n"
MEMBERS = dict(zip(prepare.MEMBERS, (INTERACTIONS, TITLES), strict=True))


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel, with its checksum in place of the real one."""
    monkeypatch.setattr(prepare, "SHA256", hashlib.sha256((INTERACTIONS + TITLES).encode()).hexdigest())
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
    # 10 comes after 2, as a number. At the times 50 and 60, the order of the file decides.
    assert out.read_bytes() == b"2 3\n2 2\n2 1\n10 1\n10 3\n10 2\n"
    assert names(out, "items") == "1\tToy Story\n2\tMisérables, Les\n3\tGoldenEye\n".encode()
    assert "2 users, 3 items, 6 interactions" in capsys.readouterr().out
    assert len(folders) == download and not any(folder.exists() for folder in folders)


def test_ml_100k_without_a_network_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails(["ml-100k --out", tmp_path / "ml.txt"], "could not download recbole==1.2.1; get the file elsewhere")
    assert "No matching distribution" in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["no zip", "cut", "no members", *MEMBERS, "is --out"])
def test_ml_100k_refuses_a_file_that_is_no_such_wheel(spoilt, wheel, tmp_path):
    contents = {"no zip": b"not a wheel", "cut": wheel.read_bytes()[:-30], "no members": zipped({})}
    contents |= {member: zipped(MEMBERS | {member: text + "9\t9"}) for member, text in MEMBERS.items()}
    content = contents.get(spoilt, wheel.read_bytes())
    wheel.write_bytes(content)
    needle = {"no zip": "", "cut": "", "is --out": "would overwrite"}.get(spoilt, "SHA-256")
    fails(["ml-100k --wheel", wheel, "--out", wheel if spoilt == "is --out" else tmp_path / "ml.txt"], needle)
    assert list(tmp_path.iterdir()) == [wheel] and wheel.read_bytes() == content


SCENES = pytest.mark.parametrize("scene, lag", [("markov", 0), ("lag", 2), ("taste", None)])


def reference(world, lag, noise, history, group):
    """The next item's distribution {item: probability}, written out for one user."""
    popularity, successors, groups = (array.tolist() for array in world)
    following = successors[history[-1 - lag] - 1] if lag is not None and len(history) > lag else []
    weights = {}
    for place, share in enumerate(popularity):
        structure = (groups[place] == group) / groups.count(group) if lag is None else share
        if following:
            structure = 2 ** (3 - following.index(place)) / 15 if place in following else 0
        weights[place + 1] = 0 if place + 1 in history else (1 - noise) * structure + noise * share
    return {item: weight / sum(weights.values()) for item, weight in weights.items()}


def test_a_world_is_zipf_with_four_other_successors_and_even_groups():
    popularity, successors, groups = prepare.draw_world(40, np.random.default_rng(0))
    zipf = 1 / np.arange(1, 41)
    np.testing.assert_allclose(np.sort(popularity)[::-1], zipf / zipf.sum())
    assert all(len({*others, item} & set(range(40))) == 5 for item, others in enumerate(successors.tolist()))
    assert Counter(groups.tolist()) == dict.fromkeys(range(5), 8)


@SCENES
def test_the_next_item_distribution_is_the_formula(scene, lag):
    rng = np.random.default_rng(1)
    world = prepare.draw_world(23, rng)
    for length in [0, 1, 2, 3, 9, 22]:
        histories = np.array([rng.permutation(23)[:length] + 1 for _ in range(4)]).reshape(4, length)
        groups = rng.integers(prepare.NUM_GROUPS, size=4)
        p = prepare.next_item_distribution(world, lag, 0.3, histories, groups)
        for row, history, group in zip(p, histories.tolist(), groups, strict=True):
            expected = reference(world, lag, 0.3, history, group)
            np.testing.assert_allclose(row, list(expected.values()), atol=1e-14)


@SCENES
def test_whole_histories_follow_the_process(scene, lag):
    """Chi-square over every history of four of five items, the users' groups mixed evenly."""
    rng = np.random.default_rng(3)
    world = prepare.draw_world(5, rng)
    drawn, groups, _ = prepare.simulate(world, lag, 0.6, 100_000, 4, rng)
    histories = list(permutations(range(1, 6), 4))
    steps = [(history[:t], history[t]) for history in histories for t in range(4)]
    p = [[reference(world, lag, 0.6, past, group)[item] for group in range(5)] for past, item in steps]
    expected = 100_000 * np.reshape(p, (-1, 4, 5)).prod(axis=1).mean(axis=1)
    counts = Counter(map(tuple, drawn.tolist()))
    assert set(counts) <= set(histories) and expected.min() > 5  # nothing with an item twice
    assert stats.chisquare([counts[history] for history in histories], expected).pvalue > 1e-3
    assert stats.chisquare(np.bincount(groups)).pvalue > 1e-3


@SCENES
def test_the_command_writes_what_the_seed_draws_in_slices_too(scene, lag, tmp_path, monkeypatch, capsys):
    options = "--lag 2 --users 50 --items 30 --length 8 --noise 0.3 --seed 5 --out"
    main("synthetic --scene", scene, options, tmp_path / "x")
    table, shown = pairs(tmp_path / "x"), capsys.readouterr().out
    rng = np.random.default_rng(5)
    world = prepare.draw_world(30, rng)
    histories, groups, _ = prepare.simulate(world, lag, 0.3, 50, 8, rng)
    assert table == [(user, item) for user, row in enumerate(histories, 1) for item in row]
    # In expectation, the best model ranks the items by their probability.
    cases = zip(histories[:, :-1].tolist(), groups, strict=True)
    truths = [reference(world, lag, 0.3, history, group) for history, group in cases]
    likeliest = np.array([sorted(truth.values(), reverse=True)[:10] for truth in truths]).mean(axis=0)
    hr, ndcg = likeliest.sum(), sum(p / np.log2(rank + 1) for rank, p in enumerate(likeliest, 1))
    assert f"best possible on the test items: HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}\n" in shown
    monkeypatch.setattr(prepare, "MAX_PROBABILITIES", 30 * 7)  # 8 slices of 6 or 7 users
    main("synthetic --scene", scene, options, tmp_path / "x")
    assert (pairs(tmp_path / "x"), capsys.readouterr().out) == (table, shown)


@pytest.mark.parametrize("options, hr, ndcg", re.findall(r"`(--scene .*?)` \| ([\d.]+) \| ([\d.]+)", README))
def test_synthetic_gives_full_histories_and_the_figures_of_the_readme(options, hr, ndcg, tmp_path, capsys):
    out = tmp_path / "a" / "b" / "scene.npy"  # the folders do not exist yet
    main("synthetic", options, "--out", out)
    table = pairs(out)
    assert len(table) == len({*table}) == 60_000  # no user has an item twice
    assert np.min(table, axis=0).tolist() == [1, 1] and np.max(table, axis=0).tolist() == [2000, 200]
    best = f"best possible on the test items: HR@10 {hr}, NDCG@10 {ndcg}"
    assert capsys.readouterr().out == f"{out}: 2,000 users, 200 items, 60,000 interactions\n{best}\n"


OUTSIDE = ["--users 0", "--length 2 --scene taste", "--items 29", "--items 4 --length 4 --scene taste"]
OUTSIDE += ["--noise 0", "--noise 1.1", "--noise nan", "--lag 0", "--lag 29", "--seed -1"]
LIMITS = ["--lag 28", "--items 30", "--length 200 --users 3", "--noise 1", "--items 8 --length 8 --users 75"]


@pytest.mark.parametrize("options", OUTSIDE + LIMITS)
def test_synthetic_runs_at_its_limits_and_not_beyond(options, tmp_path):
    words = "synthetic --users 20 --scene lag", options, "--out", tmp_path / "x.txt"
    if options in OUTSIDE:
        return fails(words, options.split()[0])
    main(*words)
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
PACK = {".csv": bytes, ".gz": gzip.compress, ".zip": lambda text: zipped({"a/": "", "a/log.csv": text})}
PACK |= {".bz2": bz2.compress, ".xz": lzma.compress, ".GZ": gzip.compress}
FORMS = [*product([",", "\t", "::", ";", "|", " ", "^", "tab", "<>"], [".csv", ".gz", ".zip"])]


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("separator, form", [*FORMS, (",", ".bz2"), (",", ".xz"), (",", ".GZ")])
def test_convert_agrees_with_a_plain_reference(separator, form, header, tmp_path, capsys):
    draw, columns = random.Random(1).choice, "who what stars when kind" if header else "1 2 3 4 5"
    kinds = range(60), range(70), [1, 2.5, 4, 5], range(3), ["view", "view", "buy"]  # few times: many ties
    rows = [tuple(map(draw, kinds)) for _ in range(900)]
    lines = [columns.split()] * header + [map(str, row) for row in rows]
    log, out = tmp_path / f"log{form}", tmp_path / "out.txt"
    text = "\n".join(("\t" if separator == "tab" else separator).join(line) for line in lines)
    log.write_bytes(PACK[form](text.encode()))
    user, item, rating, when, kind = columns.split()
    options = f"--user {user} --item {item} --rating {rating} --event-column {kind} --out {out}"
    options += f" --separator {separator}" * (separator in ("^", "tab", "<>"))  # others are found
    for choice in CHOICES:
        more = f"--time {when}" * ("timed" in choice) + " --dedupe" * ("dedupe" in choice)
        more += f" --k-core {choice.get('k', 1)} --min-rating {choice.get('min_rating', 0)}"
        more += " --event view" * ("event" in choice)
        main("convert", log, options, more)
        expected = convert_slowly(rows, **choice)
        assert (pairs(out), names(out, "users"), names(out, "items")) == expected
        shown, number = capsys.readouterr(), len(expected[0])
        assert f"{number:,} interactions" in shown.out and not shown.err and number > 99


def test_k_core_goes_on_until_nothing_changes():
    # Item 3 falls first, then user 2, then item 2; users 0, 1 and items 0, 1 hold each other.
    users, items = np.array([0, 0, 1, 1, 2, 2, 0]), np.array([0, 1, 0, 1, 2, 3, 2])
    for k, kept in [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 1, 2, 3]), (3, [])]:
        assert prepare.k_core(users, items, k).tolist() == kept


LONE_QUOTES = b'a,x,"Best of\nb,y,Lay\nc,z,Rock "n" Roll"\nd,w,1\n'  # none of the fields is quoted
SMALL = [  # a log, options, the rows of the table with their original ids, what is on stderr
    # b comes first in the file, but its row with x goes, and with it a's row comes before b's.
    (b"b,x\na,y\nb,y\na,z\nb,z\n", "--k-core 2", b"a/y a/z b/y b/z", ""),
    (b"a,x,3.9\nb,x,4\nc,x,4.0\nd,x,nan\n", "--rating 3 --min-rating 4", b"b/x c/x", ""),
    (b'"Do,e",x\n a ,"say""hi"""\na,y\n', "", b'Do,e/x a/say"hi" a/y', ""),
    (b'a,x,"1\n2"\nb,x,3\n', "--quoted yes", b"a/x b/x", ""),  # a field of two lines
    (LONE_QUOTES, "--quoted no", b"a/x b/y c/z d/w", ""),
    (LONE_QUOTES.replace(b'"n"', b"n"), "--skip-bad", b"d/w", "log.csv: 3 bad"),
    (LONE_QUOTES.replace(b",", b"\t"), "", b"a/x b/y c/z d/w", ""),  # tabs: not quoted unless asked
    (b'"a"\t"x\ty"\t1\n', "--quoted yes --item 3", b"a/1", ""),
    (b"\xef\xbb\xbfa,caf\xe9\r\n\r\nb,x\r\n", "", b"a/caf\xe9 b/x", ""),  # a byte order mark, Latin-1, CR
    (b'"a::x\nb"c::x\n', "", b'"a/x b"c/x', ""),
    (b"a;1,5;2,5\n", "", b"a/1,5", ""),
    (b'"a;b;c;d","x",3\n', "", b"a;b;c;d/x", ""),
    (b' 1   "x  y"  4 \n22   z     5\n', "", b"1/x  y 22/z", ""),  # aligned columns
    # Times: nanoseconds, numbers of all kinds, dates. A date without a time zone is in UTC.
    (b"a,x,1600000000000000002\na,y,1600000000000000001\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,20\na,y,3.5\na,z,3\na,w,-1e1\na,v,3.0\n", "--time 3", b"a/w a/z a/v a/y a/x", ""),
    (b"a,x,2014-04-07T10:51:09.277Z\na,y,2014-04-07T10:51:09.276Z\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,2020-01-01 00:00:01\na,y,2020-01-01T01:00:00+01:00\n", "--time 3", b"a/y a/x", ""),
    (b"a,x,2017-04-20 00:05:15 UTC\na,y,2017-04-20\n", "--time 3", b"a/y a/x", ""),
    (b"user,item,time\na,x,1\nb,y,2\n", "--time 3", b"a/x b/y", "log.csv: line 1 is taken for a header"),
    (b"\nuser;item\n1;5\n2;5\n", "", b"1/5 2/5", "log.csv: line 2 is taken for a header"),
    (b"ann,mug\n5,pen\n", "", b"ann/mug 5/pen", ""),
    (b"ann,mug,1\nbob2,pen2,2\n", "--time 3", b"ann/mug bob2/pen2", ""),
    (b"a,1\nb,2\nb,1.0\n", "", b"a/1 b/2 b/1.0", "some items may be the same number"),
    (b"07,1\n7,2\n70,1\n", "", b"07/1 7/2 70/1", "some users may be the same number"),
    (b"10,1\n1e+1,2\n", "", b"10/1 1e+1/2", "some users may be the same number"),
    (b"1,906000000000000000\n1,9.06E17\n", "", b"1/906000000000000000 1/9.06E17", "some items may be"),
    (b"1,a1\n10,a1.0\n100,a01\n12e10,1e5\n", "", b"1/a1 10/a1.0 100/a01 12e10/1e5", ""),
    (b"a,x,1\nb,y\n,y,1\na,y,no\nNA,y,1\nb,nan,1\na,Na,0\n", "--time 3 --skip-bad", b"a/Na a/x", "5 bad"),
    # Bad lines have numbered items beyond the number of rows.
    (b"a,x,-\na,y,-\na,z,1\nb,x,1\n", "--time 3 --skip-bad --dedupe", b"a/z b/x", "2 bad"),
    (b'a,x\n"b"b,y\nc,y\nb,"y\nc,z\n', "--skip-bad", b"a/x c/y", ": 3 bad"),  # an open quote takes two
]


@pytest.mark.parametrize("content, options, expected, note", SMALL)
def test_small_logs(content, options, expected, note, tmp_path, capsys):
    log, out = tmp_path / "log.csv", tmp_path / "out.npy"
    log.write_bytes(content)
    main("convert", log, "--user 1 --item 2", options, "--out", out)
    users, items = (dict(re.findall(rb"(.+)\t(.+)\n", names(out, side))) for side in ("users", "items"))
    rows = [users[b"%d" % user] + b"/" + items[b"%d" % item] for user, item in pairs(out)]
    assert b" ".join(rows) == expected
    printed = capsys.readouterr().err
    assert note in printed and printed.count("\n") == bool(note)


def test_the_readme_example(tmp_path, monkeypatch):
    log, table, *_ = re.findall(r"```\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(log)
    main(re.search(r"`python data/prepare.py (convert log.csv .*?)`", README, re.DOTALL)[1])
    assert Path("log.txt").read_text() == table and table.count("\n") == 10
    assert names("log.txt", "items") == b"1\tmug\n2\tpen\n3\tcup\n4\tlamp\n"


BAD_LOGS = [  # content, options beyond --user 1 --item 2, what the message must have
    (b"", "", "no column 1 for --user"),
    (b"a,x\nb,y\n\nb\n", "", "line 4: 1 column(s) where the first line has 2"),
    (b'a,x,"1\n2"\nb,y\n', "--quoted yes", "line 3: 2 column(s) where the first line has 3"),
    (LONE_QUOTES.replace(b'"n"', b"n"), "", "line 1: a field in quotes has a line end in it"),
    (b"a::x\n", "--separator ,", "no column 2 for --item; see --separator and --quoted; columns: ['a::x']"),
    (b"a::x\n", "--quoted yes", "--separator '::' cannot be used"),
    (b"a,x\n", "--separator=", "--separator '' cannot be used"),
    (b"a,x\n", "--k-core -3", "--k-core: -3 is not a number from 1"),
    (b"a,x\n", "--time 0", "no column 0 for --time"),
    (b"u,i\na,x\n", "--event view", "no column event for --event"),
    (b"a,x\n", "--min-rating 4", "no column rating for --rating"),
    (b"a,x,noon\nb,x,nine\n", "--time 3", "line 1: could not convert string to float: 'noon'"),
    (b"a,x,1\nb,x,nan\n", "--time 3", "line 2: the time is nan"),
    (b"a,x,1\nb,x,99999999999999999999\n", "--time 3", "line 2"),
    (b"a,x,2020-01-31\n\nb,x,5\n", "--time 3", "line 3: Invalid isoformat string: '5'"),
    (b"a,x,5\na,y,so\n", "--rating 3 --min-rating 1", "line 2: could not convert string to float: 'so'"),
    *((b"a,x\nb,%b\n" % missing, "", "is not an id") for missing in [b"NA", b"null", b"nan", b"None"]),
    (b"a,x\nb, \n", "", "line 2: '' is not an id"),
    (b'a,x\n"b\nc",y\n', "--quoted yes", "line 2: 'b\\nc' is not an id"),
    (b"a,x\nb,x\ty\n", "--separator ,", "line 2: 'x\\ty' is not an id"),
    (b'a,x\n"b,y\nc,x\n', "", "line 2: unexpected end of data"),
    (b"a" * 200_000, "", "field larger than field limit"),
    (b"u,i,event\na,x,buy\n", "--user u --event view --dedupe", "no interaction is left"),
]
UNREADABLE = (
    {
        "cut.gz": gzip.compress(b"a,x\n")[:-9],
        "spoilt.gz": gzip.compress(b"a,x\n")[:10] + b"\xff",  # no such kind of block
        "cut.xz": lzma.compress(b"a,x\n")[:-9],
        "two.zip": zipped({"a.csv": "a,x\n", "b.csv": "a,x\n"}),
        "secret.zip": zipped({"a.csv": ""}).replace(b"\x14\0\0\0", b"\x14\0\1\0"),  # takes a password
    }
    | dict.fromkeys(["plain.gz", "plain.bz2", "plain.xz", "plain.zip"], b"a,x\n")
)
ARCHIVES = ["a.tar", "a.tar.gz", "a.TAR.xz", "a.tgz", "a.7z", "a.rar", "a.csv.zst"]
REFUSED = [("log.csv", *bad) for bad in BAD_LOGS] + [("missing.csv", None, "", "missing.csv")]
REFUSED += [(name, b"a,x\n", "", f"{name} has a format that cannot be read") for name in ARCHIVES]
REFUSED += [(name, content, "", "a.csv, b.csv" * (name == "two.zip")) for name, content in UNREADABLE.items()]


@pytest.mark.parametrize("name, content, options, needle", REFUSED)
def test_convert_refuses_bad_logs_and_overwrites_nothing(name, content, options, needle, tmp_path):
    log, out = tmp_path / name, tmp_path / "out.txt"
    out.write_text("old")
    if content is not None:
        log.write_bytes(content)
    before = {*tmp_path.iterdir()}
    fails(["convert", log, "--user 1 --item 2", options, "--out", out], needle or tmp_path)
    assert out.read_text() == "old" and {*tmp_path.iterdir()} == before


CLASHES = [("x.items.tsv", "x"), ("x.users.tsv.tmp", "x")]
CLASHES += [("x", place) for place in ["x", "link", "hard", "folder/../x", "temporary", "folder", "", "pipe"]]


@pytest.mark.parametrize("name, place", CLASHES)
def test_out_spares_the_log_and_what_is_no_plain_file(name, place, tmp_path):
    log = tmp_path / name
    log.write_text("one column\n")  # refused later than the place
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.link(log, tmp_path / "hard")
    for link in ("link", "temporary.tmp"):
        (tmp_path / link).symlink_to(log)
    before, out = {*tmp_path.iterdir()}, tmp_path / place
    fails(["convert --user 1 --item 2", log, "--out", out], f"--out {out} would overwrite")
    assert log.read_text() == "one column\n" and {*tmp_path.iterdir()} == before


def test_out_may_be_a_link_but_not_below_a_file(tmp_path):
    log, link, target = tmp_path / "log.csv", tmp_path / "link.txt", tmp_path / "folder" / "table.txt"
    log.write_text("a,x\n")
    link.symlink_to(target)
    for _ in range(2):  # the target is missing, then there
        main("convert --user 1 --item 2", log, "--out", link)
        assert link.is_symlink() and pairs(target) == [(1, 1)] and names(link, "items") == b"1\tx\n"
    fails(["convert --user 1 --item 2", log, "--out", log / "y"], log / "y")
    assert log.read_text() == "a,x\n" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("command", ["", "ml-100k", "synthetic", "convert"])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command, "--help")
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 200
