"""data/prepare.py against oracles of its own: plain Python loops, sums by hand and simulation."""

import errno
import gzip
import hashlib
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import prepare
import pytest
from scipy import stats

SCRIPT = Path(prepare.__file__)


def pairs(path):
    """The rows of a text table."""
    return [tuple(map(int, line.split(" "))) for line in Path(path).read_text().splitlines()]


def main(*words):
    """Run prepare.py; a string may hold several options, and anything else is one."""
    prepare.main(
        [part for word in words for part in (word.split() if isinstance(word, str) else [str(word)])]
    )


def fails(words, *needles):
    """The command must end with one line for stderr, status 1, that has all of `needles`."""
    with pytest.raises(SystemExit) as ended:
        main(*words)
    assert isinstance(ended.value.code, str) and "\n" not in ended.value.code
    for needle in needles:
        assert str(needle) in ended.value.code


# ---- MovieLens-100K ---------------------------------------------------------------------------------------

MEMBERS = {  # of the wheel, by name
    prepare.FOLDER + "ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "10\t3\t4\t50\n2\t1\t5\t70\n2\t3\t1\t60\n10\t2\t3\t50\n2\t2\t2\t60\n10\t1\t3\t9\n",
    prepare.FOLDER + "ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\n"
    "1\tToy Story\t1995\n2\tMisérables, Les\t1995\n3\tGoldenEye\t1995\n",
}


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel, with its checksums in place of the real ones."""
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in MEMBERS.items():
            archive.writestr(member, text)
            monkeypatch.setitem(prepare.SHA256, member, hashlib.sha256(text.encode()).hexdigest())
    return path


def test_ml_100k_sorts_by_user_and_time_and_keeps_ties_and_ids(wheel, tmp_path, capsys):
    out = tmp_path / "ml.txt"
    main("ml-100k --wheel", wheel, "--out", out)
    # By number, not by text (10 after 2); at times 50 and 60 the order of the file.
    assert out.read_bytes() == b"2 3\n2 2\n2 1\n10 1\n10 3\n10 2\n"
    titles = Path(f"{out}.items.tsv").read_bytes()
    assert titles == "1\tToy Story\n2\tMisérables, Les\n3\tGoldenEye\n".encode()
    assert "2 users, 3 items, 6 interactions" in capsys.readouterr().out


def test_ml_100k_downloads_the_wheel_and_installs_nothing(wheel, tmp_path, monkeypatch):
    commands = []

    def pip(command, **_):
        commands.append(command)
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", pip)
    main("ml-100k --out", tmp_path / "ml.txt")
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "recbole==1.2.1"
    assert not Path(command[command.index("--dest") + 1]).exists()  # the folder was a temporary one
    assert len(pairs(tmp_path / "ml.txt")) == 6


def test_ml_100k_without_a_network_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    fails(["ml-100k --out", tmp_path / "ml.txt"], "pip could not fetch", "--wheel")
    assert "No matching distribution" in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("spoilt", ["missing", "no zip", "no members", "cut", *MEMBERS])
def test_ml_100k_refuses_a_file_that_is_no_such_wheel(spoilt, wheel, tmp_path, monkeypatch):
    out = tmp_path / "ml.txt"
    out.write_text("old")
    if spoilt in MEMBERS:
        monkeypatch.setitem(prepare.SHA256, spoilt, "0" * 64)
    elif spoilt == "no members":
        zipfile.ZipFile(wheel, "w").close()
    else:
        whole = wheel.read_bytes()
        wheel.unlink()
        if spoilt != "missing":
            wheel.write_bytes(whole[:-30] if spoilt == "cut" else b"not a wheel")
    fails(["ml-100k --wheel", wheel, "--out", out], "SHA-256" if spoilt in MEMBERS else "")
    assert out.read_text() == "old" and {*tmp_path.iterdir()} <= {out, wheel}


# ---- Synthetic scenes -------------------------------------------------------------------------------------


def reference(world, lag, noise, history, taste):
    """The next item's distribution {item: probability}, written out for one user."""
    popularity, successors, groups = (array.tolist() for array in world)
    items = range(1, len(popularity) + 1)
    weights = {}
    for item in items:
        if lag is None:
            structure = (groups[item - 1] == taste) / groups.count(taste)
        elif len(history) > lag:
            places = successors[history[len(history) - 1 - lag] - 1]
            structure = 2 ** (3 - places.index(item - 1)) / 15 if item - 1 in places else 0
        else:
            structure = popularity[item - 1]
        weights[item] = 0 if item in history else (1 - noise) * structure + noise * popularity[item - 1]
    total = sum(weights.values())
    return {item: weight / total for item, weight in weights.items()}


def rank_of(scores, target, seen):
    """METHODS §5: 1 + #{better} + #{equal}/2 among the items not in the history."""
    others = [score for item, score in scores.items() if item not in seen and item != target]
    better = sum(score > scores[target] for score in others)
    return 1 + better + sum(score == scores[target] for score in others) / 2


SCENES = pytest.mark.parametrize("scene, lag", [("markov", 0), ("lag", 2), ("taste", None)])


@SCENES
def test_conditional_is_the_formula(scene, lag):
    rng = np.random.default_rng(1)
    world = prepare.make_world(23, rng)
    for past in [0, 1, 2, 3, 9, 22]:
        histories = np.array([rng.permutation(23)[:past] + 1 for _ in range(4)]).reshape(4, past)
        tastes = rng.integers(prepare.GROUPS, size=4)
        found = prepare.conditional(world, lag, 0.3, histories, tastes)
        for row, history, taste in zip(found, histories.tolist(), tastes, strict=True):
            expected = list(reference(world, lag, 0.3, history, taste).values())
            np.testing.assert_allclose(row, expected, atol=1e-14)


def test_a_world_is_zipf_with_four_other_successors_and_even_groups():
    popularity, successors, groups = prepare.make_world(40, np.random.default_rng(0))
    zipf = 1 / np.arange(1, 41)
    np.testing.assert_allclose(np.sort(popularity)[::-1], zipf / zipf.sum())
    for item, others in enumerate(successors.tolist()):
        assert len({*others, item}) == 5 and {*others} <= set(range(40))
    assert Counter(groups.tolist()) == dict.fromkeys(range(5), 8)


def test_best_possible_by_hand():
    p = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    by_hand = (0.8 + 1) / 2, (0.5 + 0.3 / np.log2(3) + 1) / 2
    assert prepare.best_possible(p, at=2) == pytest.approx(by_hand)
    assert prepare.best_possible(p, at=10)[0] == pytest.approx(1)  # fewer items than `at`


@SCENES
def test_the_best_possible_figure_is_what_an_oracle_scores_in_simulation(scene, lag):
    rng = np.random.default_rng(2)
    world = prepare.make_world(60, rng)
    histories, tastes, best = prepare.simulate(world, lag, 0.4, 40, 9, rng)
    ranks, popular, by_popularity = [], [], dict(enumerate(world[0], 1))
    for history, taste in zip(histories[:, :-1].tolist(), tastes, strict=True):
        p = reference(world, lag, 0.4, history, taste)
        rank = {item: rank_of(p, item, history) for item in p if p[item]}
        for item in rng.choice(list(p), size=500, p=list(p.values())):
            ranks.append(rank[item])
            popular.append(rank_of(by_popularity, item, history) <= 10)
    hits = np.array(ranks) <= 10
    for samples, expected in zip((hits, hits / np.log2(np.array(ranks) + 1)), best, strict=True):
        assert abs(samples.mean() - expected) < 3 * samples.std() / np.sqrt(len(samples))
    assert np.mean(popular) < best[0] - 0.05  # another ranking gets less


@SCENES
def test_whole_histories_follow_the_process(scene, lag):
    """Chi-square over every history of four of six items, the users' groups mixed evenly."""
    rng = np.random.default_rng(3)
    world = prepare.make_world(6, rng)
    drawn, tastes, _ = prepare.simulate(world, lag, 0.5, 40_000, 4, rng)
    expected, counts = [], Counter(map(tuple, drawn.tolist()))
    for history in permutations(range(1, 7), 4):
        chances = [
            np.prod([reference(world, lag, 0.5, history[:t], taste)[history[t]] for t in range(4)])
            for taste in range(prepare.GROUPS)
        ]
        expected.append((counts.pop(history, 0), 40_000 * np.mean(chances)))
    assert not counts  # nothing with an item twice
    observed, expected = np.array(expected).T
    rare = expected < 5
    observed, expected = (np.append(side[~rare], side[rare].sum()) for side in (observed, expected))
    assert stats.chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3
    assert stats.chisquare(np.bincount(tastes)).pvalue > 1e-3


@SCENES
def test_the_command_writes_what_the_seed_draws_in_slices_too(scene, lag, tmp_path, monkeypatch, capsys):
    def make(seed):
        size = f"--lag 2 --users 50 --items 30 --length 8 --noise 0.3 --seed {seed}"
        main("synthetic --scene", scene, size, "--out", tmp_path / "x")
        return (tmp_path / "x").read_bytes(), capsys.readouterr().out

    whole = make(5)
    rng = np.random.default_rng(5)
    histories, _, best = prepare.simulate(prepare.make_world(30, rng), lag, 0.3, 50, 8, rng)
    assert pairs(tmp_path / "x") == [(user, item) for user, row in enumerate(histories, 1) for item in row]
    assert "best possible on the test items: HR@10 {:.4f}, NDCG@10 {:.4f}\n".format(*best) in whole[1]
    assert make(6)[0] != whole[0]
    monkeypatch.setattr(prepare, "SLICE", 30 * 7)  # 8 slices of 6 or 7 users
    assert make(5) == whole


def test_synthetic_defaults_give_full_histories_without_repeats(tmp_path, capsys):
    out = tmp_path / "a" / "b" / "taste.npy"  # the folders are made
    main("synthetic --scene taste --out", out)
    table = np.load(out, mmap_mode="r")
    assert table.dtype == np.int64 and table.shape == (60_000, 2)
    assert len({tuple(row) for row in table.tolist()}) == 60_000  # no user has an item twice
    assert (table.min(axis=0) == 1).all() and (table.max(axis=0) == [2000, 200]).all()
    assert [path.name for path in out.parent.iterdir()] == ["taste.npy"]
    assert "2,000 users, 200 items, 60,000 interactions" in capsys.readouterr().out


OUTSIDE = ["--users 0", "--length 2 --lag 1", "--items 29", "--items 4 --length 4 --lag 1", "--noise 0"]
OUTSIDE += ["--noise 1.1", "--noise nan", "--lag 0", "--lag 29", "--seed -1"]


@pytest.mark.parametrize("options", OUTSIDE)
def test_synthetic_refuses_what_makes_no_scene(options, tmp_path):
    fails(["synthetic --scene lag --out", tmp_path / "x.txt", options], options.split()[0][2:])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extreme", ["--lag 28", "--length 200 --users 5", "--noise 1", "--items 30"])
def test_synthetic_runs_at_the_limits(extreme, tmp_path):
    main("synthetic --users 20 --scene lag", extreme, "--out", tmp_path / "x.txt")
    assert len({*pairs(tmp_path / "x.txt")}) == (1000 if "200" in extreme else 600)  # no item twice


# ---- Any rating log ---------------------------------------------------------------------------------------


def convert_slowly(rows, event=None, min_rating=None, k=1, timed=True):
    """The table and both maps that `convert` must give for rows (user, item, rating, time, event)."""
    rows = [row for row in rows if event in (None, row[4]) and (min_rating is None or row[2] >= min_rating)]
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= k and items[row[1]] >= k]
        if len(kept) == len(rows):
            break
        rows = kept
    users, items = {}, {}
    for row in rows:
        users.setdefault(row[0], len(users) + 1)
        items.setdefault(row[1], len(items) + 1)
    rows = sorted(rows, key=lambda row: (users[row[0]], row[3] if timed else 0))  # sorted() keeps ties
    table = [(users[row[0]], items[row[1]]) for row in rows]
    return table, *("".join(f"{new}\t{old}\n" for old, new in ids.items()) for ids in (users, items))


def random_log(seed):
    """900 rows (user, item, rating, time, event) with repeats, and with few times so that there are ties."""
    random.seed(seed)
    draw = random.randrange
    stars, kinds = [1, 2.5, 4, 5], ["view", "view", "buy"]
    return [(f"u{draw(60)}", f"i{draw(70)}", stars[draw(4)], draw(30), kinds[draw(3)]) for _ in range(900)]


@pytest.mark.parametrize("separator", [",", "\t", "::", ";", "|", " ", "^", "tab", "--"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", [".csv", ".gz", ".zip"])
def test_convert_agrees_with_a_plain_reference(separator, header, end, tmp_path, capsys):
    rows, names = random_log(1), "when who kind stars what"
    given = f"--separator={separator}" if separator in ("^", "tab", "--") else ""  # others are found
    separator = "\t" if separator == "tab" else separator
    lines = [separator.join(map(str, [row[3], row[0], row[4], row[2], row[1]])) for row in rows]
    content = "\n".join([separator.join(names.split())] * header + lines).encode()
    log, out = tmp_path / f"log{end}", tmp_path / "out.txt"
    if end == ".zip":
        with zipfile.ZipFile(log, "w") as archive:
            archive.writestr("folder/", "")
            archive.writestr("folder/log.csv", content)
    else:
        log.write_bytes(gzip.compress(content) if end == ".gz" else content)
    when, user, kind, rating, item = (names if header else "1 2 3 4 5").split()
    options = f"--user {user} --item {item} --time {when} --rating {rating} --event-column {kind} {given}"
    main("convert", log, options, "--event view --min-rating 2.5 --k-core 4 --out", out)
    table, users, items = convert_slowly(rows, event="view", min_rating=2.5, k=4)
    assert len(convert_slowly(rows, event="view", min_rating=2.5)[0]) > len(table) > 0  # the core cuts
    assert pairs(out) == table
    assert Path(f"{out}.users.tsv").read_text() == users
    assert Path(f"{out}.items.tsv").read_text() == items
    said = capsys.readouterr()
    assert f"{len(table):,} interactions" in said.out and not said.err


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("dedupe, k", [(False, 1), (True, 1), (True, 7)])
def test_convert_without_filters_without_time_and_without_repeats(timed, dedupe, k, tmp_path):
    rows = random_log(2)
    log, out = tmp_path / "log.csv", tmp_path / "out.npy"
    log.write_text("".join(",".join(map(str, row)) + "\n" for row in rows))
    options = f"--user 1 --item 2 --k-core {k}" + " --time 4" * timed + " --dedupe" * dedupe
    main("convert", log, options, "--out", out)
    if dedupe:
        first = {}
        for row in sorted(rows, key=lambda row: row[3] * timed):  # sorted() keeps ties
            first.setdefault(row[:2], row)
        kept = {id(row) for row in first.values()}
        rows = [row for row in rows if id(row) in kept]
    table = np.load(out)
    assert table.dtype == np.int64 and len(table) > 0
    assert list(map(tuple, table.tolist())) == convert_slowly(rows, k=k, timed=timed)[0]


def test_k_core_goes_on_until_nothing_changes():
    # Item 3 falls first, then user 2, then item 2; users 0, 1 and items 0, 1 hold each other.
    users, items = np.array([0, 0, 1, 1, 2, 2, 0]), np.array([0, 1, 0, 1, 2, 3, 2])
    for k, kept in [(1, [0, 1, 2, 3, 4, 5, 6]), (2, [0, 1, 2, 3]), (3, [])]:
        assert prepare.k_core(users, items, k).tolist() == kept


def converted(tmp_path, content, options=""):
    """What `convert` makes of the bytes `content` with columns 1 user, 2 item: the table and both maps."""
    log, out = tmp_path / "log.csv", tmp_path / "out.txt"
    log.write_bytes(content)
    main("convert", log, "--user 1 --item 2", options, "--out", out)
    return pairs(out), *(Path(f"{out}.{side}.tsv").read_bytes() for side in ("users", "items"))


TIMES = [  # three times, and their order
    ("1600000000000000002 1600000000000000001 1600000000000000003", [2, 1, 3]),  # nanoseconds
    ("20 3.5 3", [3, 2, 1]),
    ("3.5 1e1 -1", [3, 1, 2]),
    ("7 7.0 7", [1, 2, 3]),
    ("2014-04-07T10:51:09.277Z 2014-04-07T10:51:09.276Z 2014-04-06", [3, 2, 1]),
    ("2020-01-01T01:00:00+02:00 2020-01-01T00:00:00 2019-12-31T22:59:59", [3, 1, 2]),  # no zone is UTC
    ("2017-04-20_00:05:15_UTC 2017-04-20_01:05:14+01:00 2017-04-20", [3, 2, 1]),
]


@pytest.mark.parametrize("times, order", TIMES)
def test_times_are_numbers_or_dates_and_exact(times, order, tmp_path):
    log = "".join(f"a,{item},{time}\n" for item, time in zip("xyz", times.split(), strict=True))
    table, _, _ = converted(tmp_path, log.replace("_", " ").encode(), "--time 3")
    assert table == [(1, item) for item in order]


NOTES = [  # a log, options, how many rows it makes, what is said on stderr
    (b"user,item,time\na,x,1\nb,y,2\n", "--time 3", 2, "log.csv: line 1 is taken for a header"),
    (b"\nuser;item\n1;5\n2;5\n", "", 2, "log.csv: line 2 is taken for a header"),
    (b"user,item,rating\na,x,5\n", "--rating 3 --min-rating 1", 1, "line 1 is taken for a header"),
    (b"ann,mug\n5,pen\n", "", 2, ""),
    (b"ann,mug,1\nbob2,pen2,2\n", "--time 3", 2, ""),
    (b"a,1\nb,2\nb,1.0\n", "", 3, "some items are the same number"),
    (b"07,1\n7,2\n70,1\n", "", 3, "some users are the same number"),
    (b"1,a1\n10,a1.0\n100,a01\n", "", 3, ""),
    (b"a,1\nb,1.0\na,2\nb,2\na,3\nb,3\n", "--k-core 2", 4, ""),  # 1 and 1.0 go
    (b"a,x,1\nb,y\n,y,1\nc,y,noon\nd,z,4\n", "--time 3 --skip-bad", 2, "log.csv: 3 bad"),
    (b'a,x\n"b"b,y\nc,y\n', "--skip-bad", 2, "1 bad"),
    (b'a,x\nb,"y\nc,y\n', "--skip-bad", 1, "2 bad"),  # the open quote takes the last line too
    (b"a,x\n", "--skip-bad", 1, ""),
]


@pytest.mark.parametrize("content, options, rows, note", NOTES)
def test_what_is_told_in_one_line(content, options, rows, note, tmp_path, capsys):
    assert len(converted(tmp_path, content, options)[0]) == rows
    said = capsys.readouterr().err
    assert note in said and said.count("\n") == bool(note)


CONVERTED = [  # content, options, the table, the users' and the items' original ids
    # b comes first in the file, but its row with x goes, and with it a's row comes before b's.
    (b"b,x\na,y\nb,y\na,z\nb,z\n", "--k-core 2", "1 1 1 2 2 1 2 2", b"a b", b"y z"),
    (b"a,x,1\nb,y,noon\na,,2\na,z,0\n", "--time 3 --skip-bad", "1 2 1 1", b"a", b"x z"),
    (b"a,x,-\na,y,-\na,z,1\nb,x,1\n", "--time 3 --skip-bad --dedupe", "1 1 2 2", b"a b", b"z x"),
    (b"a,x,3.9\nb,x,4\nc,x,4.0\nd,x,nan\n", "--rating 3 --min-rating 4", "1 1 2 1", b"b c", b"x"),
    (b'"Do,e",x\n a ,"say""hi"""\na,y\n', "", "1 1 2 2 2 3", b"Do,e a", b'x say"hi" y'),
    (b'a,x,"1\n2"\nb,x,3\n', "", "1 1 2 1", b"a b", b"x"),  # a field of two lines
    (b"a,x\r\n\r\nb,x\r\n", "", "1 1 2 1", b"a b", b"x"),
    (b"\xef\xbb\xbfa,caf\xe9\n", "", "1 1", b"a", b"caf\xe9"),  # a byte order mark, Latin-1
    (b'"a::x\nb"c::x\n', "", "1 1 2 1", b'"a b"c', b"x"),
    (b"a::1:2::x\n", "", "1 1", b"a", b"1:2"),
    (b"a;1,5;2,5\n", "", "1 1", b"a", b"1,5"),
    (b'"a;b;c;d","x",3\n', "", "1 1", b"a;b;c;d", b"x"),
    (b"a,x,2020-01-01 10:00:00 UTC\n", "", "1 1", b"a", b"x"),
]


@pytest.mark.parametrize("content, options, table, users, items", CONVERTED)
def test_small_logs(content, options, table, users, items, tmp_path):
    found, *maps = converted(tmp_path, content, options)
    assert " ".join(f"{user} {item}" for user, item in found) == table
    for side, ids in zip(maps, (users, items), strict=True):
        assert side == b"".join(b"%d\t%s\n" % pair for pair in enumerate(ids.split(), 1))


def test_the_readme_example(tmp_path, monkeypatch):
    readme = (SCRIPT.parent / "README.md").read_text()
    log, table = re.findall(r"```\n(.*?)```", readme, re.DOTALL)
    command = re.search(r"`python data/prepare.py (convert log.csv .*?)`", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(log)
    main(command)
    assert Path("log.txt").read_text() == table and table.count("\n") == 10
    assert Path("log.txt.items.tsv").read_text() == "1\tmug\n2\tpen\n3\tcup\n4\tlamp\n"


def test_two_hundred_thousand_rows_in_a_fifth_of_15_seconds(tmp_path):
    rows = "".join(f"user{n * 7919 % 50_000},item{n * 104729 % 20_011},{n % 999}.5\n" for n in range(200_000))
    started = time.process_time()
    table, _, _ = converted(tmp_path, rows.encode(), "--time 3 --k-core 2")
    assert time.process_time() - started < 3 and len(table) == 200_000


BAD_LOGS = [  # content, options beyond --user 1 --item 2, what the message must have
    (b"", "", "no column 1 for --user"),
    (b"\n\n", "", "no column 1 for --user"),
    (b"u,i\n", "--user u", "no interaction is left"),
    (b"a,x\nb,y\n\nb\n", "", "line 4: 1 column(s) where the first line has 2"),
    (b"a,x\nb,y,z\n", "", "line 2: 3 column(s) where the first line has 2"),
    (b'a,x,"1\n2"\nb,y\n', "", "line 3: 2 column(s) where the first line has 3"),
    (b"a::x::1\n", "--separator ,", "no column 2 for --item; check --separator; its columns: ['a::x::1']"),
    (b"a,x\n", "--time 0", "no column 0 for --time"),
    (b"u,i\na,x\n", "--time when", "no column when for --time"),
    (b"u,i\na,x\n", "--event view", "no column event for --event"),
    (b"a,x\n", "--min-rating 4", "no column rating for --rating"),
    (b"a,x,1\nb,x,noon\n", "--time 3", "line 2: could not convert string to float: 'noon'"),
    (b"a,x,noon\nb,x,nine\n", "--time 3", "line 1: could not convert"),
    (b"a,x,1\nb,x,nan\n", "--time 3", "line 2: the time is nan"),
    (b"a,x,1\nb,x,99999999999999999999\n", "--time 3", "line 2"),
    (b"a,x,2020-01-31\nb,x,2020-02-31\n", "--time 3", "line 2: day is out of range"),
    (b"a,x,2020-01-31\n\nb,x,5\n", "--time 3", "line 3: Invalid isoformat string: '5'"),
    (b"a,x,5\nb,x,2020-01-31\n", "--time 3", "line 2: could not convert string to float"),
    (b"a,x,5\na,y,so\n", "--rating 3 --min-rating 1", "line 2: could not convert string to float: 'so'"),
    (b"a,x\n,y\n", "", "line 2: the id '' is empty"),
    (b"a,x\nb, \n", "", "line 2: the id '' is empty"),
    (b'a,x\n"b\nc",y\n', "", "line 2: the id 'b\\nc'"),
    (b"a,x\nb,x\ty\n", "--separator ,", "line 2: the id 'x\\ty'"),
    (b'a,x\n"b,y\nc,x\n', "", "line 2: unexpected end of data"),
    (b",x\n,x\n", "--skip-bad", "no interaction is left"),
    (b"a,x\nb,y\n", "--k-core 2 --dedupe", "no interaction is left"),
    (b"u,i,event\na,x,buy\n", "--user u --event view --dedupe", "no interaction is left"),
]


@pytest.mark.parametrize("content, options, needle", BAD_LOGS)
def test_convert_refuses_bad_logs_and_overwrites_nothing(content, options, needle, tmp_path):
    log, out = tmp_path / "log.csv", tmp_path / "out.txt"
    log.write_bytes(content)
    old = {out: "old", Path(f"{out}.users.tsv"): "old users", Path(f"{out}.items.tsv"): "old items"}
    for path, text in old.items():
        path.write_text(text)
    fails(["convert", log, "--user 1 --item 2", options, "--out", out], log, needle)
    assert {path: path.read_text() for path in old} == old and len(list(tmp_path.iterdir())) == 4


UNREADABLE = ["missing.csv", "folder", "plain.gz", "cut.gz", "spoilt.gz"]
UNREADABLE += ["plain.zip", "none.zip", "two.zip", "secret.zip"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_convert_refuses_what_it_cannot_read(name, tmp_path):
    packed = bytearray(gzip.compress(b"a,x\n" * 9999))
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.gz").write_bytes(b"a,x\n")
    (tmp_path / "plain.zip").write_bytes(b"a,x\n")
    (tmp_path / "cut.gz").write_bytes(packed[:40])
    packed[10] = 255  # no such kind of block
    (tmp_path / "spoilt.gz").write_bytes(packed)
    for archive, members in [("none.zip", []), ("two.zip", ["a.csv", "b.csv"]), ("secret.zip", ["a.csv"])]:
        with zipfile.ZipFile(tmp_path / archive, "w") as file:
            for member in members:
                file.writestr(member, "a,x\n")
    secret = bytearray((tmp_path / "secret.zip").read_bytes())
    secret[6] = secret[secret.index(b"PK\1\2") + 8] = 1  # says that it takes a password
    (tmp_path / "secret.zip").write_bytes(secret)
    out = tmp_path / "out.txt"
    fails(
        ["convert", tmp_path / name, "--user 1 --item 2 --out", out],
        "a.csv, b.csv" if name == "two.zip" else out,
    )
    assert not out.exists()


# ---- Writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize(
    "name, step", [("log.txt", "write_bytes"), ("log.npy", "write_bytes"), ("log.txt", "replace")]
)
def test_an_interrupted_write_leaves_the_old_file_whole(stop, name, step, tmp_path, monkeypatch):
    out, write_bytes = tmp_path / name, Path.write_bytes

    def half(path, what):
        if step == "write_bytes":
            write_bytes(path, what[: len(what) // 2])
        assert path != out
        raise stop

    out.write_text("old")
    monkeypatch.setattr(Path, step, half)
    with pytest.raises(SystemExit if isinstance(stop, OSError) else KeyboardInterrupt) as ended:
        main("synthetic --scene taste --users 9 --out", out)
    assert isinstance(stop, KeyboardInterrupt) or ended.value.code == f"{out} is not made: {stop}"
    assert out.read_text() == "old" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", ["ml-100k --wheel", "synthetic --scene", "convert --user 1 --item 2"])
@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_out_that_cannot_be_written(command, place, wheel, tmp_path):
    log, folder = tmp_path / "log.csv", tmp_path / "folder"
    log.write_text("a,x\n")
    folder.mkdir()
    source = {"m": wheel, "s": "markov", "c": log}[command[0]]
    out = log / "out.txt" if place == "below a file" else folder
    fails([command, source, "--out", out], f"{out} is not made: ")
    assert log.read_text() == "a,x\n" and {*tmp_path.glob("**/*")} == {log, wheel, folder}


@pytest.mark.parametrize("name", ["log.csv", "log.csv.items.tsv", "log.csv.tmp", "log.csv.users.tsv.tmp"])
def test_convert_never_overwrites_its_own_log(name, tmp_path):
    log = tmp_path / name
    log.write_text("a,x\n")
    fails(["convert", log, "--user 1 --item 2 --out", tmp_path / "log.csv"], log, "would overwrite")
    assert log.read_text() == "a,x\n"


@pytest.mark.parametrize("command", ["", "ml-100k", "synthetic", "convert"])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command, "--help")
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 200
