"""data/prepare.py against oracles of its own: plain Python loops, sums by hand and simulation."""

import csv
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
INTERACTIONS, TITLES = prepare.SHA256  # names of the wheel's members


def pairs(path):
    """The rows of a text table."""
    return [tuple(map(int, line.split(" "))) for line in Path(path).read_text().splitlines()]


def fails(capsys, argv, *needles):
    """`argv` must end with status 2 and one line on stderr that has all of `needles`."""
    assert prepare.main([str(word) for word in argv]) == 2
    error = capsys.readouterr().err
    assert error.startswith("prepare.py: ") and error.count("\n") == 1, error
    for needle in needles:
        assert str(needle) in error, error


# ---- MovieLens-100K ---------------------------------------------------------------------------------------

INTER = (
    "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "10\t3\t4\t50\n2\t1\t5\t70\n2\t3\t1\t60\n10\t2\t3\t50\n2\t2\t2\t60\n10\t1\t3\t9\n"
)
ITEM = (
    "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
    "1\tToy Story\t1995\tComedy\n2\tMisérables, Les\t1995\tDrama\n3\tGoldenEye\t1995\tAction\n"
)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A tiny wheel, with its checksums in place of the real ones."""
    path = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(INTERACTIONS, INTER)
        archive.writestr(TITLES, ITEM)
    for member, text in [(INTERACTIONS, INTER), (TITLES, ITEM)]:
        monkeypatch.setitem(prepare.SHA256, member, hashlib.sha256(text.encode()).hexdigest())
    return path


def test_ml_100k_sorts_by_user_and_time_and_keeps_ties_and_ids(wheel, tmp_path, capsys):
    out = tmp_path / "ml.txt"
    assert prepare.main(["ml-100k", "--wheel", str(wheel), "--out", str(out)]) == 0
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
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    assert prepare.main(["ml-100k", "--out", str(tmp_path / "ml.txt")]) == 0
    (command,) = commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command and command[-1] == "recbole==1.2.1"
    assert not Path(command[command.index("--dest") + 1]).exists()  # the folder was a temporary one
    assert len(pairs(tmp_path / "ml.txt")) == 6


@pytest.mark.parametrize("member", [INTERACTIONS, TITLES])
def test_ml_100k_refuses_a_wheel_with_the_wrong_checksum(member, wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(prepare.SHA256, member, "0" * 64)
    out = tmp_path / "ml.txt"
    out.write_text("old")
    fails(capsys, ["ml-100k", "--wheel", wheel, "--out", out], wheel, member, "SHA-256", "pip download")
    assert out.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ml.txt", wheel.name]


@pytest.mark.parametrize("kind", ["missing", "not a zip", "without the members", "cut short"])
def test_ml_100k_refuses_a_file_that_is_no_such_wheel(kind, wheel, tmp_path, capsys):
    if kind == "missing":
        wheel.unlink()
    elif kind == "not a zip":
        wheel.write_text("not a wheel")
    elif kind == "without the members":
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("other.txt", "")
    else:
        wheel.write_bytes(wheel.read_bytes()[:-30])
    fails(capsys, ["ml-100k", "--wheel", wheel, "--out", tmp_path / "ml.txt"], wheel, "pip download")
    assert not (tmp_path / "ml.txt").exists()


def test_ml_100k_without_a_network_says_so_in_one_line(tmp_path):
    out, empty = tmp_path / "ml.txt", tmp_path / "empty"
    out.write_text("old")
    empty.mkdir()
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(empty)}
    command = [sys.executable, str(SCRIPT), "ml-100k", "--out", str(out)]
    done = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("prepare.py: pip could not fetch") and done.stderr.count("\n") == 1
    assert "No matching distribution" in done.stderr and "--wheel" in done.stderr
    assert out.read_text() == "old"


# ---- Synthetic scenes -------------------------------------------------------------------------------------

SCENES = ["markov", "lag", "taste"]


def reference(world, history, taste):
    """The next item's distribution {item: probability}, written out for one user."""
    items = range(1, len(world.popularity) + 1)
    weights = {}
    for item in items:
        if world.scene == "taste":
            group = [other for other in items if world.groups[other - 1] == taste]
            structure = (item in group) / len(group)
        elif len(history) >= world.lag + 1:
            cause = history[len(history) - 1 - world.lag]
            successors = [column + 1 for column in world.successors[cause - 1]]
            shares = dict(zip(successors, [8 / 15, 4 / 15, 2 / 15, 1 / 15], strict=True))
            structure = shares.get(item, 0)
        else:
            structure = world.popularity[item - 1]
        mixed = (1 - world.noise) * structure + world.noise * world.popularity[item - 1]
        weights[item] = 0 if item in history else mixed
    total = sum(weights.values())
    return {item: weight / total for item, weight in weights.items()}


def rank_of(scores, target, seen):
    """METHODS §5: 1 + #{better} + #{equal}/2 among the items not in the history."""
    others = [score for item, score in scores.items() if item not in seen and item != target]
    better = sum(score > scores[target] for score in others)
    return 1 + better + sum(score == scores[target] for score in others) / 2


def assert_within_three_errors(samples, expected):
    samples = np.asarray(samples, dtype=float)
    assert abs(samples.mean() - expected) < 3 * samples.std() / np.sqrt(len(samples))


@pytest.mark.parametrize("scene", SCENES)
def test_conditional_is_the_formula(scene):
    rng = np.random.default_rng(1)
    world = prepare.make_world(scene, 23, 2, 0.3, rng)
    for past in [0, 1, 2, 3, 9, 22]:
        histories = np.array([rng.permutation(23)[:past] + 1 for _ in range(4)]).reshape(4, past)
        tastes = rng.integers(prepare.GROUPS, size=4)
        found = prepare.conditional(world, histories, tastes)
        for row, history, taste in zip(found, histories.tolist(), tastes, strict=True):
            np.testing.assert_allclose(row, list(reference(world, history, taste).values()), atol=1e-14)


def test_a_world_is_zipf_with_four_other_successors_and_even_groups():
    world = prepare.make_world("lag", 40, 3, 0.2, np.random.default_rng(0))
    zipf = [1 / rank for rank in range(1, 41)]
    np.testing.assert_allclose(np.sort(world.popularity)[::-1], np.array(zipf) / sum(zipf))
    for item, successors in enumerate(world.successors.tolist()):
        assert len({*successors, item}) == 5 and {*successors} <= set(range(40))
    assert sorted(Counter(world.groups.tolist()).items()) == [(group, 8) for group in range(5)]
    assert world.lag == 3 and prepare.make_world("markov", 40, 3, 0.2, np.random.default_rng(0)).lag == 0


def test_best_possible_by_hand():
    p = np.array([[0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
    hr, ndcg = prepare.best_possible(p, at=2)
    assert hr == pytest.approx((0.8 + 1) / 2)
    assert ndcg == pytest.approx((0.5 + 0.3 / np.log2(3) + 1) / 2)
    assert prepare.best_possible(p, at=10)[0] == pytest.approx(1)  # fewer items than `at`


@pytest.mark.parametrize("scene", SCENES)
def test_the_best_possible_figure_is_what_an_oracle_scores_in_simulation(scene):
    rng = np.random.default_rng(2)
    world = prepare.make_world(scene, 60, 2, 0.4, rng)
    histories, tastes, best = prepare.simulate(world, 40, 9, rng)
    hits, gains, popular = [], [], []
    for history, taste in zip(histories[:, :-1].tolist(), tastes, strict=True):
        p = reference(world, history, taste)
        rank = {item: rank_of(p, item, history) for item in p if p[item]}
        by_popularity = dict(enumerate(world.popularity, 1))
        for item in rng.choice(list(p), size=500, p=list(p.values())):
            hits.append(rank[item] <= 10)
            gains.append((rank[item] <= 10) / np.log2(rank[item] + 1))
            popular.append(rank_of(by_popularity, item, history) <= 10)
    assert_within_three_errors(hits, best[0])
    assert_within_three_errors(gains, best[1])
    assert np.mean(popular) < best[0] - 0.05  # another ranking gets less


@pytest.mark.parametrize("scene", SCENES)
def test_the_printed_figure_is_that_of_the_written_file(scene, tmp_path, capsys):
    out = tmp_path / "scene.txt"
    options = ["--scene", scene, "--lag", "2", "--users", "1500", "--items", "30", "--length", "6"]
    options += ["--noise", "0.3", "--seed", "7"]
    assert prepare.main(["synthetic", *options, "--out", str(out)]) == 0
    hr, ndcg = map(float, re.search(r"HR@10 ([\d.]+), NDCG@10 ([\d.]+)", capsys.readouterr().out).groups())
    rng = np.random.default_rng(7)
    world = prepare.make_world(scene, 30, 2, 0.3, rng)
    histories, tastes, _ = prepare.simulate(world, 1500, 6, rng)
    assert pairs(out) == [(user, item) for user, row in enumerate(histories, 1) for item in row]
    hits, gains = [], []
    for (*history, target), taste in zip(histories.tolist(), tastes, strict=True):
        rank = rank_of(reference(world, history, taste), target, history)
        hits.append(rank <= 10)
        gains.append((rank <= 10) / np.log2(rank + 1))
    assert_within_three_errors(hits, hr)
    assert_within_three_errors(gains, ndcg)


@pytest.mark.parametrize("scene", SCENES)
def test_whole_histories_follow_the_process(scene):
    """Chi-square over every history of three of seven items, the users' groups mixed evenly."""
    rng = np.random.default_rng(3)
    world = prepare.make_world(scene, 7, 1, 0.5, rng)
    drawn, tastes, _ = prepare.simulate(world, 40_000, 3, rng)
    expected, counts = [], Counter(map(tuple, drawn.tolist()))
    for history in permutations(range(1, 8), 3):
        chances = []
        for taste in range(prepare.GROUPS):
            first, second, third = (reference(world, history[:t], taste)[history[t]] for t in range(3))
            chances.append(first * second * third)
        expected.append((counts.pop(history, 0), 40_000 * np.mean(chances)))
    assert not counts  # nothing with an item twice
    observed, expected = np.array(expected).T
    rare = expected < 5
    observed, expected = (np.append(side[~rare], side[rare].sum()) for side in (observed, expected))
    keep = expected > 0
    assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
    assert stats.chisquare(np.bincount(tastes)).pvalue > 1e-3


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_lag_is_where_the_structure_stands(lag):
    rng = np.random.default_rng(4)
    world = prepare.make_world("lag" if lag else "markov", 200, lag, 0.1, rng)
    histories, _, _ = prepare.simulate(world, 400, 20, rng)
    shares = []
    for other in range(8):
        hits = [
            row[t] - 1 in world.successors[row[t - 1 - other] - 1] for row in histories for t in range(10, 20)
        ]
        shares.append(np.mean(hits))
    assert shares.pop(lag) > 0.8  # 0.9 less what is lost to items that the user has had
    assert max(shares) < 0.08  # chance: four successors of 200, more for popular ones


@pytest.mark.parametrize("scene", SCENES)
def test_synthetic_is_the_same_byte_for_byte_and_in_slices(scene, tmp_path, monkeypatch, capsys):
    def make(name, seed):
        options = ["--scene", scene, "--users", "50", "--items", "30", "--length", "8", "--seed", seed]
        assert prepare.main(["synthetic", *options, "--out", str(tmp_path / name)]) == 0
        return (tmp_path / name).read_bytes(), capsys.readouterr().out.splitlines()[-1]

    whole = make("a.txt", "5")
    assert make("b.txt", "5") == whole
    assert make("c.txt", "6")[0] != whole[0]
    monkeypatch.setattr(prepare, "SLICE", 30 * 7)  # 7 users at a time; the last slice has 1
    assert make("d.txt", "5") == whole


def test_synthetic_defaults_give_full_histories_without_repeats(tmp_path, capsys):
    out = tmp_path / "taste.npy"
    assert prepare.main(["synthetic", "--scene", "taste", "--out", str(out)]) == 0
    table = np.load(out, mmap_mode="r")
    assert table.dtype == np.int64 and table.shape == (60_000, 2)
    assert len({tuple(row) for row in table.tolist()}) == 60_000  # no user has an item twice
    assert (table.min(axis=0) == 1).all() and (table.max(axis=0) == [2000, 200]).all()
    assert "2,000 users, 200 items, 60,000 interactions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, needle",
    [
        (["--users", 0], "--users is 0"),
        (["--length", 2], "--length is 2"),
        (["--items", 29], "--items is 29"),
        (["--items", 4, "--length", 3], "--items is 4"),
        (["--noise", 0], "--noise is 0.0"),
        (["--noise", 1.1], "--noise is 1.1"),
        (["--noise", "nan"], "--noise is nan"),
        (["--lag", 0], "--lag is 0"),
        (["--lag", 29], "--lag is 29"),
        (["--seed", -1], "--seed is -1"),
        (["--out", "."], "names no file"),
    ],
)
def test_synthetic_refuses_what_makes_no_scene(options, needle, tmp_path, capsys):
    fails(capsys, ["synthetic", "--scene", "lag", "--out", tmp_path / "x.txt", *options], needle, "give")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extreme", [["--lag", 28], ["--length", 200, "--users", 5], ["--noise", 1]])
def test_synthetic_runs_at_the_limits(extreme, tmp_path):
    options = ["--users", 20, "--scene", "lag", *extreme, "--out", tmp_path / "x.txt"]
    assert prepare.main(["synthetic", *map(str, options)]) == 0


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
    return [
        (
            f"u{random.randrange(60)}",
            f"i{random.randrange(70)}",
            random.choice([1, 2.5, 4, 5]),
            random.randrange(30),
            random.choice(["view", "view", "buy"]),
        )
        for _ in range(900)
    ]


@pytest.mark.parametrize("separator", [",", "tab", "\t", "::"])
@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("end", [".csv", ".gz"])
def test_convert_agrees_with_a_plain_reference(separator, header, end, tmp_path, capsys):
    rows = random_log(1)
    mark = "\t" if separator == "tab" else separator
    lines = [mark.join(map(str, [row[3], row[0], row[4], row[2], row[1]])) for row in rows]
    if header:
        lines.insert(0, mark.join(["when", "who", "kind", "stars", "what"]))
    text = "\n".join(lines) + "\n"
    log, out = tmp_path / f"log{end}", tmp_path / "out.txt"
    log.write_bytes(gzip.compress(text.encode()) if end == ".gz" else text.encode())
    when, user, kind, rating, item = ("when who kind stars what" if header else "1 2 3 4 5").split()
    options = f"--user {user} --item {item} --time {when} --rating {rating} --event-column {kind}"
    options += f" --event view --min-rating 2.5 --k-core 4 --out {out}"
    assert prepare.main(["convert", str(log), "--separator", separator, *options.split()]) == 0
    table, users, items = convert_slowly(rows, event="view", min_rating=2.5, k=4)
    uncut = convert_slowly(rows, event="view", min_rating=2.5)[0]
    assert len(uncut) > len(table) > 0  # the core cuts
    assert pairs(out) == table
    assert Path(f"{out}.users.tsv").read_text() == users
    assert Path(f"{out}.items.tsv").read_text() == items
    assert f"{len(table):,} interactions" in capsys.readouterr().out


@pytest.mark.parametrize("timed", [True, False])
def test_convert_needs_no_filter_and_no_time_and_keeps_repeats(timed, tmp_path):
    rows = random_log(2)
    log = tmp_path / "log.csv"
    with open(log, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    argv = ["convert", str(log), "--user", "1", "--item", "2", *(["--time", "4"] if timed else [])]
    assert prepare.main([*argv, "--out", str(tmp_path / "out.npy")]) == 0
    table = np.load(tmp_path / "out.npy")
    assert table.dtype == np.int64 and table.shape == (900, 2) and len(np.unique(table, axis=0)) < 900
    assert list(map(tuple, table.tolist())) == convert_slowly(rows, timed=timed)[0]


def test_k_core_goes_on_until_nothing_changes():
    # Item 3 falls first, then user 2, then item 2; users 0, 1 and items 0, 1 hold each other.
    users = np.array([0, 0, 1, 1, 2, 2, 0])
    items = np.array([0, 1, 0, 1, 2, 3, 2])
    assert prepare.k_core(users, items, 2).tolist() == [0, 1, 2, 3]
    assert prepare.k_core(users, items, 1).tolist() == list(range(7))
    assert prepare.k_core(users, items, 3).tolist() == []


def converted(tmp_path, content, *options):
    """What `convert` makes of the bytes `content` with columns 1 user, 2 item: the table and both maps."""
    log, out = tmp_path / "log.csv", tmp_path / "out.txt"
    log.write_bytes(content)
    assert prepare.main(["convert", str(log), "--user", "1", "--item", "2", *options, "--out", str(out)]) == 0
    return pairs(out), *(Path(f"{out}.{side}.tsv").read_bytes() for side in ("users", "items"))


@pytest.mark.parametrize(
    "times, order",
    [
        (["1600000000000000002", "1600000000000000001", "1600000000000000003"], [2, 1, 3]),  # nanoseconds
        (["20", "3.5", "3"], [3, 2, 1]),
        (["3.5", "1e1", "-1"], [3, 1, 2]),
        (["7", "7.0", "7"], [1, 2, 3]),
    ],
)
def test_times_are_numbers_and_exact(times, order, tmp_path):
    log = "".join(f"a,{item},{time}\n" for item, time in zip("xyz", times, strict=True))
    table, _, _ = converted(tmp_path, log.encode(), "--time", "3")
    assert table == [(1, item) for item in order]


def test_ids_count_by_first_appearance_among_the_rows_that_stay(tmp_path):
    # b comes first in the file, but its row with x goes, and with it a's row comes before b's.
    table, users, items = converted(tmp_path, b"b,x\na,y\nb,y\na,z\nb,z\n", "--k-core", "2")
    assert (table, users, items) == ([(1, 1), (1, 2), (2, 1), (2, 2)], b"1\ta\n2\tb\n", b"1\ty\n2\tz\n")


def test_quotes_blank_lines_line_ends_marks_and_odd_bytes(tmp_path):
    content = b'\xef\xbb\xbf"Doe, J",x\r\n\r\n Ann ,"say ""hi"""\r\nAnn,caf\xe9\r\n'
    table, users, items = converted(tmp_path, content)
    assert table == [(1, 1), (2, 2), (2, 3)]
    assert users == b"1\tDoe, J\n2\tAnn\n"
    assert items == b'1\tx\n2\tsay "hi"\n3\tcaf\xe9\n'  # latin-1 as it came


def test_double_colons_take_quotes_as_they_are(tmp_path):
    table, users, _ = converted(tmp_path, b'"a::x\nb"c::x\n', "--separator", "::")
    assert (table, users) == ([(1, 1), (2, 1)], b'1\t"a\n2\tb"c\n')


def test_rating_at_the_limit_is_kept(tmp_path):
    table, users, _ = converted(tmp_path, b"a,x,3.9\nb,x,4\nc,x,4.0\n", "--rating", "3", "--min-rating", "4")
    assert users == b"1\tb\n2\tc\n"


def test_the_readme_example(tmp_path, monkeypatch):
    readme = (SCRIPT.parent / "README.md").read_text()
    log, table = re.findall(r"```\n(.*?)```", readme, re.DOTALL)
    command = re.search(r"`python data/prepare.py (convert log.csv .*?)`", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("log.csv").write_text(log)
    assert prepare.main(command.split()) == 0
    assert Path("log.txt").read_text() == table and table.count("\n") == 10
    assert Path("log.txt.items.tsv").read_text() == "1\tmug\n2\tpen\n3\tcup\n4\tlamp\n"


def test_two_hundred_thousand_rows_in_a_fifth_of_15_seconds(tmp_path):
    rows = "".join(f"user{n * 7919 % 50_000},item{n * 104729 % 20_011},{n % 999}.5\n" for n in range(200_000))
    started = time.process_time()
    table, _, _ = converted(tmp_path, rows.encode(), "--time", "3", "--k-core", "2")
    assert time.process_time() - started < 3 and len(table) == 200_000


BAD_LOGS = {  # content, options beyond --user 1 --item 2, what the message must have
    "empty": (b"", [], ["it is empty"]),
    "only blank lines": (b"\n\n", [], ["it is empty"]),
    "only a header": (b"u,i\n", ["--user", "u"], ["no interaction is left"]),
    "too few columns": (b"a,x\nb,y\n\nb\n", [], ["line 4", "1 column(s)", "has 2", "--separator"]),
    "too many columns": (b"a,x\nb,y,z\n", [], ["line 2", "3 column(s)", "has 2"]),
    "wrong separator": (b"a::x::1\n", [], ["line 1", "no column 2 for --item", "--separator"]),
    "no such number": (b"a,x\n", ["--time", "3"], ["line 1", "no column 3 for --time"]),
    "column 0": (b"a,x\n", ["--time", "0"], ["line 1", "no column 0 for --time"]),
    "no such name": (b"u,i\na,x\n", ["--time", "when"], ["line 1", "no column when", "u, i"]),
    "no event column": (b"u,i\na,x\n", ["--event", "view"], ["no column event for --event-column"]),
    "header by number": (b"u,i,t\na,x,1\n", ["--time", "3"], ["line 1", "'t' is not a number", "header"]),
    "time in words": (b"a,x,1\nb,x,noon\n", ["--time", "3"], ["line 2", "time 'noon' is not a number"]),
    "time without end": (b"a,x,1\nb,x,nan\n", ["--time", "3"], ["line 2", "time 'nan'"]),
    "time too large": (b"a,x,1\nb,x,99999999999999999999\n", ["--time", "3"], ["line 2"]),
    "rating in words": (b"a,x,5\na,y,\n", ["--rating", "3", "--min-rating", "1"], ["line 2", "rating ''"]),
    "user missing": (b"a,x\n,y\n", [], ["line 2", "user '' is empty"]),
    "item missing": (b"a,x\nb, \n", [], ["line 2", "item '' is empty"]),
    "line break in an id": (b'a,x\n"b\nc",y\n', [], ["line 2", "line break"]),
    "tab in an id": (b"a,x\nb,x\ty\n", [], ["line 2", "tab"]),
    "after a field of two lines": (b'a,x,"1\n2"\nb,y\n', [], ["line 3", "2 column(s)", "has 3"]),
    "quote never closed": (b'a,x\n"b,y\nc,x\n', [], ["line 2", "quotes"]),
    "nothing in the core": (b"a,x\nb,y\n", ["--k-core", "2"], ["no interaction is left", "--k-core 2"]),
    "no such event": (b"u,i,event\na,x,buy\n", ["--user", "u", "--event", "view"], ["--event"]),
    "rating without column": (b"a,x\n", ["--min-rating", "4"], ["--rating"]),
}


@pytest.mark.parametrize("case", BAD_LOGS)
def test_convert_refuses_bad_logs_and_overwrites_nothing(case, tmp_path, capsys):
    content, options, needles = BAD_LOGS[case]
    log, out = tmp_path / "log.csv", tmp_path / "out.txt"
    log.write_bytes(content)
    old = {out: "old", Path(f"{out}.users.tsv"): "old users", Path(f"{out}.items.tsv"): "old items"}
    for path, text in old.items():
        path.write_text(text)
    named = [] if case == "rating without column" else [log]
    fails(capsys, ["convert", log, "--user", 1, "--item", 2, *options, "--out", out], *named, *needles)
    assert {path: path.read_text() for path in old} == old
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("name", ["missing.csv", "folder", "plain.gz", "cut.gz", "spoilt.gz"])
def test_convert_refuses_what_it_cannot_read(name, tmp_path, capsys):
    packed = bytearray(gzip.compress(b"a,x\n" * 9999))
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain.gz").write_bytes(b"a,x\n")
    (tmp_path / "cut.gz").write_bytes(packed[:40])
    packed[10] = 255  # no such kind of block
    (tmp_path / "spoilt.gz").write_bytes(packed)
    log, out = tmp_path / name, tmp_path / "out.txt"
    fails(capsys, ["convert", log, "--user", 1, "--item", 2, "--out", out], log, "cannot read", "check")
    assert not out.exists()


# ---- Writing ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_file_whole(stop, tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise stop

    with pytest.raises(prepare.BadInput if isinstance(stop, OSError) else KeyboardInterrupt):
        prepare.write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["log.txt", "log.npy"])
def test_a_command_killed_while_it_writes_leaves_the_old_file_whole(name, tmp_path):
    """The process dies at its first rename, with everything written to the temporary file."""
    out = tmp_path / name
    out.write_text("old")
    code = "import os, sys, prepare; os.replace = lambda *_: os._exit(9); prepare.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "synthetic", "--scene", "taste", "--users", "9", "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SCRIPT.parent)})
    assert done.returncode == 9 and out.read_text() == "old"


@pytest.mark.parametrize("command", ["ml-100k", "synthetic", "convert"])
@pytest.mark.parametrize("place", ["below a file", "a folder"])
def test_out_that_cannot_be_written(command, place, wheel, tmp_path, capsys):
    log = tmp_path / "log.csv"
    log.write_text("a,x\n")
    out = log / "out.txt" if place == "below a file" else tmp_path / "out.txt"
    if place == "a folder":
        out.mkdir()
    options = {
        "ml-100k": ["--wheel", wheel],
        "synthetic": ["--scene", "markov", "--users", 9],
        "convert": [log, "--user", 1, "--item", 2],
    }
    fails(capsys, [command, *options[command], "--out", out], f"cannot write {out}", "choose another --out")
    assert log.read_text() == "a,x\n"
    expected = {log, wheel} | ({out} if place == "a folder" else set())
    assert set(tmp_path.iterdir()) == expected and (place != "a folder" or not list(out.iterdir()))


@pytest.mark.parametrize("name", ["log.csv", "log.csv.items.tsv"])
def test_convert_never_overwrites_its_own_log(name, tmp_path, capsys):
    log = tmp_path / name
    log.write_text("a,x\n")
    options = ["--user", 1, "--item", 2, "--out", tmp_path / "log.csv"]
    fails(capsys, ["convert", log, *options], log, "would overwrite", "choose another --out")
    assert log.read_text() == "a,x\n"


def test_out_makes_its_parents(tmp_path):
    out = tmp_path / "a" / "b" / "x.txt"
    assert prepare.main(["synthetic", "--scene", "markov", "--users", "3", "--out", str(out)]) == 0
    assert [path.name for path in out.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("command", [[], ["ml-100k"], ["synthetic"], ["convert"]])
def test_help_is_there(command, capsys):
    with pytest.raises(SystemExit) as ended:
        prepare.main([*command, "--help"])
    assert ended.value.code == 0 and len(capsys.readouterr().out) > 200
