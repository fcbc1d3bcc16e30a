"""Interactions for the scripts of this repository: MovieLens-100K, synthetic scenes, any rating log.

Every command writes one table of two integers, `user item`: one interaction a row, a user's rows together and
in time order, ids from 1, because 0 is padding. An --out that ends in .npy gets an int64 array [n, 2], any
other one text. data/README.md describes the format and the files beside it.

    python data/prepare.py ml-100k --out data/ml-100k.txt
    python data/prepare.py synthetic --scene lag --lag 4 --out data/lag4.txt
    python data/prepare.py convert ratings.dat --user 1 --item 2 --rating 3 --time 4 --min-rating 4 \\
        --k-core 5 --out data/ml-1m.txt
    python data/prepare.py convert events.csv --user visitorid --item itemid --time timestamp --event view \\
        --k-core 5 --out data/retailrocket.txt
    python data/prepare.py convert ratings_Beauty.csv.gz --user 1 --item 2 --time 4 --out data/beauty.npy
"""

import argparse
import csv
import gzip
import hashlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from array import array
from contextlib import suppress
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np

WHEEL = "recbole==1.2.1"  # a package that carries MovieLens-100K as its example
FOLDER = "recbole/dataset_example/ml-100k/"
SHA256 = {
    FOLDER + "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
    FOLDER + "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
}
SUCCESSORS = np.array([8, 4, 2, 1]) / 15  # markov, lag: how likely an item's four successors are
GROUPS = 5  # taste: groups of items
SLICE = 4_000_000  # probabilities held at once, 32 MB: users × items never are


# ---- Writing ----------------------------------------------------------------------------------------------


def write(path, content):
    """Write the bytes `content` to `path`, under another name first: no reader ever finds half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(out, table, **names):
    """Write `table` [n, 2] to `out`, text or .npy, and each of `names`, {id: name}, as `<out>.<its key>.tsv`.

    Prints what the table holds.
    """
    if not Path(out).name:
        sys.exit(f"--out {out!r} names no file; give one such as data/log.txt")
    content = io.BytesIO()
    if Path(out).suffix == ".npy":
        np.save(content, table)
    else:
        np.savetxt(content, table, "%d")
    write(out, content.getvalue())
    for key, ids in names.items():
        text = "".join(f"{number}\t{name}\n" for number, name in ids.items())
        write(f"{out}.{key}.tsv", text.encode("utf-8", "surrogateescape"))  # as `open_text` decodes
    users, items = (len(np.unique(column)) for column in table.T)
    print(f"{out}: {users:,} users, {items:,} items, {len(table):,} interactions")


def in_time_order(users, items, times):
    """The table [n, 2] of users [n] and items [n], by user and then by time [n]; ties stay as they come."""
    return np.stack([users, items], axis=1)[np.lexsort((times, users))]


# ---- MovieLens-100K ---------------------------------------------------------------------------------------


def download_wheel(folder):
    """Fetch the wheel into `folder` with pip, installing nothing; its path."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", folder, WHEEL]
    done = subprocess.run(pip + what, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        sys.exit(f"pip could not fetch {WHEEL} (it said: {said}); take it elsewhere and give it with --wheel")
    return next(Path(folder).glob("*.whl"))


def read_wheel(wheel):
    """The texts of the wheel's members in SHA256; exits unless they are the known ones."""
    with zipfile.ZipFile(wheel) as archive:
        contents = [archive.read(member) for member in SHA256 if member in archive.namelist()]
    if [hashlib.sha256(content).hexdigest() for content in contents] != list(SHA256.values()):
        sys.exit(f"{wheel} does not hold MovieLens-100K as {WHEEL} does: its SHA-256 is another")
    return [content.decode() for content in contents]


def movielens(interactions, titles):
    """From the wheel's two texts, tab-separated below a header: the table [n, 2] and {item: title}.

    The ids stay MovieLens's own, which run from 1 without a gap.
    """
    log = np.array([line.split("\t") for line in interactions.splitlines()[1:]]).astype(np.int64)
    users, items, _, times = log.T  # [n] each
    rows = [line.split("\t") for line in titles.splitlines()[1:]]
    return in_time_order(users, items, times), {int(row[0]): row[1] for row in rows}


def ml_100k(args):
    """MovieLens-100K with its own ids; <out>.items.tsv has the titles."""
    with tempfile.TemporaryDirectory() as folder:
        table, titles = movielens(*read_wheel(args.source or download_wheel(folder)))
    save(args.out, table, items=titles)


# ---- Synthetic scenes -------------------------------------------------------------------------------------


def make_world(scene, items, lag, noise, rng):
    """Draw the hidden truth of a scene of V `items` from `rng`. Item i is place i - 1 of its arrays.

    scene; noise; lag: the cause's distance from the last item, 0 for markov; popularity [V]: Zipf,
    sums to 1; successors [V, 4]: places; groups [V].
    """
    world = SimpleNamespace(scene=scene, lag=lag if scene == "lag" else 0, noise=noise)
    weights = 1 / (rng.permutation(items) + 1)
    world.popularity = weights / weights.sum()
    steps = np.array([rng.choice(items - 1, len(SUCCESSORS), replace=False) for _ in range(items)])
    world.successors = (np.arange(items)[:, None] + 1 + steps) % items  # four others, never the item itself
    world.groups = rng.permutation(items) % GROUPS
    return world


def conditional(world, history, tastes):
    """The next item's distribution p [U, V] after histories [U, t], for users of hidden groups `tastes` [U].

    p(i | history) ∝ [i not in history] · ((1 − noise) · structure(i) + noise · popularity(i))

    The structure is 8:4:2:1 over the successors of the item `lag` places before the last one (popularity
    where the history is too short), or uniform over the user's group. No item comes twice, because targets
    are ranked among unseen items only.
    """
    users, past = history.shape
    rows = np.arange(users)[:, None]
    if world.scene == "taste":
        structure = (world.groups == tastes[:, None]).astype(np.float64)  # [U, V]
        structure /= structure.sum(axis=1, keepdims=True)
    elif past > world.lag:
        structure = np.zeros((users, len(world.popularity)))
        structure[rows, world.successors[history[:, -1 - world.lag] - 1]] = SUCCESSORS
    else:
        structure = world.popularity[None].repeat(users, axis=0)
    p = (1 - world.noise) * structure + world.noise * world.popularity
    p[rows, history - 1] = 0
    return p / p.sum(axis=1, keepdims=True)


def best_possible(p, at=10):
    """HR@at and NDCG@at that the best of all models reaches in expectation if p [U, V] is the truth.

    Ranking by p is best: with p_(k) the k-th largest probability, HR = Σ_{k≤at} p_(k) and
    NDCG = Σ_{k≤at} p_(k) / log2(k + 1), averaged over users.
    """
    top = -np.sort(-p, axis=1)[:, :at]
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    return top.sum(axis=1).mean(), (top * discount).sum(axis=1).mean()


def simulate(world, users, length, rng):
    """Draw histories [U, length] and groups [U]; also the process's own (HR@10, NDCG@10) at the last item."""
    tastes = rng.integers(GROUPS, size=users)
    dice = rng.random((users, length))
    histories, best = np.zeros((users, length), dtype=np.int64), np.zeros(2)
    step = max(1, SLICE // len(world.popularity))  # users
    for start in range(0, users, step):
        part = slice(start, start + step)
        for t in range(length):
            p = conditional(world, histories[part, :t], tastes[part])  # [slice, V]
            edges = p.cumsum(axis=1)  # the die is scaled by the last edge, which rounding may leave beside 1
            histories[part, t] = (edges <= dice[part, t, None] * edges[:, -1:]).sum(axis=1) + 1
        best += np.array(best_possible(p)) * len(p) / users  # p is now that of the last item, the test item
    return histories, tastes, best


def synthetic(args):
    """A scene whose truth is known, and the best HR@10 and NDCG@10 that a model can reach on it.

    The next item depends on the last one (markov), on the one --lag places before that (lag), or on the group
    of items that the user likes, one of five (taste: have more than five times as many items as the length).
    """
    needs = {
        "users": (args.users >= 1, "at least 1"),
        "length": (args.length >= 3, "at least 3: to train, to validate and to test"),
        "items": (args.items >= max(5, args.length), "at least 5, and --length: no user has an item twice"),
        "noise": (0 < args.noise <= 1, "a share above 0 and up to 1"),
        "lag": (args.scene != "lag" or 1 <= args.lag <= args.length - 2, "from 1 to the length less 2"),
        "seed": (args.seed >= 0, "at least 0"),
    }
    for option, (good, need) in needs.items():
        if not good:
            sys.exit(f"--{option} is {getattr(args, option)}; give {need}")
    rng = np.random.default_rng(args.seed)
    world = make_world(args.scene, args.items, args.lag, args.noise, rng)
    histories, _, (hr, ndcg) = simulate(world, args.users, args.length, rng)
    users = np.arange(1, args.users + 1).repeat(args.length)
    save(args.out, np.stack([users, histories.ravel()], axis=1))
    print(f"best possible on the test items: HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}")


# ---- Any rating log ---------------------------------------------------------------------------------------


def open_text(path):
    """Open a text file, a .gz or the only member of a .zip, with its line ends as they are."""
    if path.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            if len(members) != 1:
                sys.exit(f"{path} holds {len(members)} files; unpack the one you want: {', '.join(members)}")
            file = archive.open(members[0])
    else:
        opener = gzip.open if path.endswith(".gz") else open
        file = opener(path, "rb")
    # surrogateescape: bytes that are not UTF-8 pass through unharmed.
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def split_rows(lines, separator, strict=True):
    """A csv reader of `lines`."""
    if separator != "::":
        return csv.reader(lines, delimiter=separator, strict=strict)
    lines = (line.replace("::", "\x1f") for line in lines)  # csv wants one character
    return csv.reader(lines, delimiter="\x1f", quoting=csv.QUOTE_NONE)  # such files do not quote


def guess_separator(line):
    """What `line` has most of outside quotes: ::, tab, ;, | or the comma; a space if it has none of them."""
    bare = re.sub('"[^"]*"', "", line)
    separator = max("::", "\t", ";", "|", ",", key=bare.count)
    return separator if separator in bare else " "


def is_header(first, second, places):
    """Whether rating and time (ids, if there is neither) have digits in row `second`, but none in `first`."""
    telling = [places[option] for option in ("rating", "time") if option in places]
    telling = telling or [places["user"], places["item"]]
    digits = [[re.search(r"\d", row[place]) for place in telling] for row in (first, second)]
    return not any(digits[0]) and all(digits[1])


def read_layout(path, lines, separator, columns):
    """Places from 0 of `columns` in the first of `lines`, how many columns it has, lines of the header."""
    rows = split_rows(lines, separator, strict=False)
    first = [field.strip() for field in next(filter(None, rows), [])]
    above, second = rows.line_num, next(filter(None, rows), [])
    known = {name: first.index(name) for name in first} | {str(n + 1): n for n in range(len(first))}
    if missing := [f"{column} for --{option}" for option, column in columns.items() if column not in known]:
        there = f"{len(first)} column(s), {first}"[:300]
        sys.exit(f"{path}: no column {missing[0]}; its first line has {there}; check --separator")
    places = {option: known[column] for option, column in columns.items()}
    if all(column.isdecimal() for column in columns.values()):
        if len(first) != len(second) or not is_header(first, second, places):
            return places, len(first), 0
        print(f"{path}: line {above} is taken for a header and passed over", file=sys.stderr)
    return places, len(first), above


def moment(text):
    """The time in `text`: ("number", value) or ("date", seconds since 1970 in UTC). Raises ValueError."""
    with suppress(ValueError):
        return "number", int(text)  # exact: a float would blur nanoseconds into ties
    with suppress(ValueError):
        if math.isfinite(float(text)):
            return "number", float(text)
    with suppress(ValueError):
        date = datetime.fromisoformat(re.sub("( UTC|Z)$", "+00:00", text.strip()))
        return "date", date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
    raise ValueError(f"the time {text!r} is neither a number nor an ISO date")


def code_of(text, codes):
    """The number of the id `text` in `codes`; a new id gets the next, from 0. Raises ValueError."""
    name = text.strip()
    if name not in codes and ("\t" in name or len(name.splitlines()) != 1):  # it would break the map of ids
        raise ValueError(f"the id {name[:80]!r} is empty or has a tab or a line break in it")
    return codes.setdefault(name, len(codes))


def read_log(path, separator, columns, event=None, min_rating=None, skip_bad=False):
    """Read the rows of a log that have `event` and at least `min_rating`, in the file's order.

    columns: {"user", "item" and, if wanted, "rating", "time", "event-column": name or number from 1}; if any
    is a name, the first line is a header. Returns users [n] and items [n], numbered from 0 as they appear;
    times [n]; the users' and the items' original ids.
    """
    users, items, times, user_codes, item_codes = array("q"), array("q"), array("q"), {}, {}
    bad, first_bad, first_kind = 0, None, None
    with open_text(path) as file:
        head = list(islice(file, 100))
        separator = separator or guess_separator(next(filter(str.strip, head), ""))
        at, width, above = read_layout(path, head, separator, columns)
        rows = split_rows(chain(head, file), separator)
        while True:
            number = rows.line_num + 1  # where the next row begins; quoted fields may span lines
            try:
                fields = next(rows, None)
                if fields is None:
                    break
                if not fields or number <= above:
                    continue
                if len(fields) != width:  # say, a comma in a field without quotes: it would shift the columns
                    raise ValueError(f"{len(fields)} column(s) where the first line has {width}")
                if event is not None and fields[at["event-column"]].strip() != event:
                    continue
                if min_rating is not None and not float(fields[at["rating"]]) >= min_rating:
                    continue
                user, item = code_of(fields[at["user"]], user_codes), code_of(fields[at["item"]], item_codes)
                kind, time = moment(fields[at["time"]]) if "time" in at else ("place", number)
                first_kind = first_kind or kind
                if kind != first_kind:
                    raise ValueError(f"the time is a {kind}, but a {first_kind} in the lines before")
                times = array("d", times) if isinstance(time, float) and times.typecode == "q" else times
                times.append(time)
                users.append(user)
                items.append(item)
            except (csv.Error, ValueError, OverflowError) as error:
                first_bad = first_bad or f"{path}, line {number}: {error}"
                if not skip_bad:
                    sys.exit(f"{first_bad}; mend the line, check --separator, or give --skip-bad")
                bad += rows.line_num + 1 - number
    if bad:
        print(f"{bad:,} bad line(s) passed over, the first is {first_bad}", file=sys.stderr)
    if not users:
        sys.exit(f"{path}: no interaction is left; check --event and --min-rating")
    return *map(np.asarray, (users, items, times)), list(user_codes), list(item_codes)


def first_meetings(users, items, times):
    """Indices, in the file's order, of each user's earliest row with each item; of equals, the first."""
    order = np.argsort(times, kind="stable")
    pairs = users * (items.max() + 1) + items
    return np.sort(order[np.unique(pairs[order], return_index=True)[1]])


def k_core(users, items, k):
    """Indices of the rows that stay when users and items with fewer than k rows go, until none is left."""
    keep, before = np.arange(len(users)), -1
    while len(keep) != before:
        before = len(keep)
        for side in (users, items):
            keep = keep[np.bincount(side[keep])[side[keep]] >= k]
    return keep


def renumber(codes, names):
    """New ids [n] from 1 in order of first appearance in `codes` [n], and {new id: names[code]}."""
    unique, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    ids = np.empty(len(unique), dtype=np.int64)
    ids[order] = np.arange(1, len(unique) + 1)
    return ids[inverse], {new: names[code] for new, code in enumerate(unique[order], 1)}


def tell_spellings(what, names):
    """Say so on stderr if two of `names` spell the same number, such as 1 and 1.0 or 01."""
    spellings = {}
    for name in names:
        number = re.fullmatch(r"0*(\d+?)(\.0*)?", name)
        if number and (other := spellings.setdefault(number[1], name)) != name:
            print(f"{what}s {other} and {name} are the same number but stay two", file=sys.stderr)
            break


def convert(args):
    """Any log of ratings or events; <out>.users.tsv and <out>.items.tsv have the original ids.

    A column is a number from 1 or a name; one name makes the first line a header. New ids count from 1 in
    order of first appearance among the lines kept.
    """
    made = [args.out, f"{args.out}.users.tsv", f"{args.out}.items.tsv"]
    if os.path.realpath(args.source) in map(os.path.realpath, made):
        sys.exit(f"--out {args.out} would overwrite the log {args.source}; choose another --out")
    separator = "\t" if args.separator == "tab" else args.separator
    if separator not in (None, "::") and (len(separator) != 1 or separator in '"\r\n'):
        sys.exit(f"--separator {separator!r} is neither one character nor :: nor the word tab")
    columns = {"user": args.user, "item": args.item, "time": args.time}
    columns["rating"] = None if args.min_rating is None else args.rating
    columns["event-column"] = None if args.event is None else args.event_column
    columns = {option: column for option, column in columns.items() if column is not None}
    log = read_log(args.source, separator, columns, args.event, args.min_rating, args.skip_bad)
    users, items, times, user_names, item_names = log
    keep = first_meetings(users, items, times) if args.dedupe else np.arange(len(users))
    keep = keep[k_core(users[keep], items[keep], args.k_core)]
    if not len(keep):
        sys.exit(f"{args.source}: no interaction is left with --k-core {args.k_core}; give a smaller one")
    users, user_names = renumber(users[keep], user_names)
    items, item_names = renumber(items[keep], item_names)
    tell_spellings("user", user_names.values())
    tell_spellings("item", item_names.values())
    save(args.out, in_time_order(users, items, times[keep]), users=user_names, items=item_names)


# ---- The command line -------------------------------------------------------------------------------------


def main(argv=None):
    """Run one command."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="{ml-100k,synthetic,convert}")
    adders = []
    for name, run in (("ml-100k", ml_100k), ("synthetic", synthetic), ("convert", convert)):
        command = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        command.add_argument("--out", required=True, metavar="FILE", help="where to write; .npy for an array")
        command.set_defaults(run=run)
        adders.append(command.add_argument)
    movies, scene, log = adders
    movies("--wheel", dest="source", metavar="FILE", help=f"{WHEEL}, if it is here (default: pip fetches it)")
    scene("--scene", required=True, choices=["markov", "lag", "taste"], help="what the next item depends on")
    scene("--lag", type=int, default=4, help="scene lag: places before the last item, from 1 (%(default)s)")
    scene("--users", type=int, default=2000, help="number of users (%(default)s)")
    scene("--items", type=int, default=200, help="number of items (%(default)s)")
    scene("--length", type=int, default=30, help="interactions a user, no item twice (%(default)s)")
    scene("--noise", type=float, default=0.2, help="share of Zipf popularity, above 0 (%(default)s)")
    scene("--seed", type=int, default=0, help="the same seed gives the same file (%(default)s)")
    log("source", metavar="log", help="one interaction a line; a .gz, or a .zip of one file, is unpacked")
    log("--separator", metavar="SEP", help="one character, :: or the word tab (told from the first line)")
    log("--user", required=True, metavar="COLUMN", help="the user")
    log("--item", required=True, metavar="COLUMN", help="the item")
    log("--time", metavar="COLUMN", help="numbers or ISO dates (without it, the order of the file decides)")
    log("--rating", default="rating", metavar="COLUMN", help="the rating, for --min-rating (%(default)s)")
    log("--min-rating", type=float, metavar="R", help="keep ratings of at least R (all)")
    log("--event", metavar="KIND", help="keep events of this kind, such as view (all)")
    log("--event-column", default="event", metavar="COLUMN", help="the kind, for --event (%(default)s)")
    log("--dedupe", action="store_true", help="keep a user's first interaction with each item alone")
    log("--k-core", type=int, default=1, metavar="K", help="keep users and items with K interactions or more")
    log("--skip-bad", action="store_true", help="pass over lines that do not fit, and count them")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (EOFError, RuntimeError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"cannot unpack {args.source}: {error}")
    except OSError as error:
        sys.exit(f"{error.filename2 or error.filename or args.out}: {error.strerror or error}")


if __name__ == "__main__":
    main()
