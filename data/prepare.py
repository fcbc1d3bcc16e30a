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
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from array import array
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path

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


def write_file(path, content):
    """Write the bytes `content` to `path`, under another name first: no reader ever finds half a file."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk, Ctrl-C: half a file is of no use


def save(out, table, **names):
    """Write `table` [n, 2] to `out`, text or .npy, and lists of names, of ids from 1 on, to <out>.<key>.tsv.

    Prints what the table holds.
    """
    content = io.BytesIO()
    if out.endswith(".npy"):
        np.save(content, table)
    else:
        np.savetxt(content, table, "%d")
    write_file(out, content.getvalue())
    for key, of_ids in names.items():
        text = "".join(f"{number}\t{name}\n" for number, name in enumerate(of_ids, 1))
        write_file(f"{out}.{key}.tsv", text.encode("utf-8", "surrogateescape"))  # as `open_text` decodes
    users, items = (len(np.unique(column)) for column in table.T)
    print(f"{out}: {users:,} users, {items:,} items, {len(table):,} interactions")


def in_time_order(users, items, times):
    """The table [n, 2] of users [n] and items [n], by user and then by time [n]; ties stay as they come."""
    return np.stack([users, items], axis=1)[np.lexsort((times, users))]


# ---- MovieLens-100K ---------------------------------------------------------------------------------------


def download_wheel(folder):
    """Fetch the wheel into `folder` with pip, installing nothing; its path."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if subprocess.run([*pip, "--dest", folder, WHEEL]).returncode:
        sys.exit(f"pip could not fetch {WHEEL}; take it elsewhere and give it with --wheel")
    return next(Path(folder).glob("*.whl"))


def ml_100k(args):
    """MovieLens-100K with its own ids; <out>.items.tsv has the titles."""
    with tempfile.TemporaryDirectory() as folder:
        wheel = args.wheel or download_wheel(folder)
        with zipfile.ZipFile(wheel) as archive:
            contents = [archive.read(member) for member in SHA256 if member in archive.namelist()]
    if [hashlib.sha256(content).hexdigest() for content in contents] != list(SHA256.values()):
        sys.exit(f"{wheel} does not hold MovieLens-100K as {WHEEL} does: its SHA-256 is another")
    # Tab-separated, below a header; the ids run from 1 without a gap, the titles in their order.
    log, titles = ([line.split("\t") for line in text.decode().splitlines()[1:]] for text in contents)
    users, items, _, times = np.array(log).astype(np.int64).T  # [n] each
    save(args.out, in_time_order(users, items, times), items=[row[1] for row in titles])


# ---- Synthetic scenes -------------------------------------------------------------------------------------


def make_world(items, rng):
    """Draw the hidden truth of a scene of V `items` from `rng`. Item i is place i - 1 of its arrays.

    popularity [V]: Zipf's, sums to 1; successors [V, 4]: places of four others, never the item itself;
    groups [V].
    """
    weights = 1 / (rng.permutation(items) + 1)
    steps = np.array([rng.choice(items - 1, len(SUCCESSORS), replace=False) for _ in range(items)])
    successors = (np.arange(items)[:, None] + 1 + steps) % items
    return weights / weights.sum(), successors, rng.permutation(items) % GROUPS


def conditional(world, lag, noise, history, tastes):
    """The next item's distribution p [U, V] after histories [U, t], for users of hidden groups `tastes` [U].

    p(i | history) ∝ [i not in history] · ((1 − noise) · structure(i) + noise · popularity(i))

    The structure is 8:4:2:1 over the successors of the item `lag` places before the last one (popularity
    where the history is too short); if `lag` is None, it is uniform over the user's group. No item comes
    twice, because targets are ranked among unseen items only.
    """
    popularity, successors, groups = world
    structure = np.zeros((len(history), len(popularity)))
    if lag is None:
        structure += (groups == tastes[:, None]) / np.bincount(groups)[tastes, None]
    elif history.shape[1] > lag:
        np.put_along_axis(structure, successors[history[:, -1 - lag] - 1], SUCCESSORS[None], axis=1)
    else:
        structure += popularity
    p = (1 - noise) * structure + noise * popularity
    np.put_along_axis(p, history - 1, 0, axis=1)
    return p / p.sum(axis=1, keepdims=True)


def best_possible(p, at=10):
    """HR@at and NDCG@at that the best of all models reaches in expectation if p [U, V] is the truth.

    Ranking by p is best: with p_(k) the k-th largest probability, HR = Σ_{k≤at} p_(k) and
    NDCG = Σ_{k≤at} p_(k) / log2(k + 1), averaged over users.
    """
    top = -np.sort(-p, axis=1)[:, :at]
    discount = 1 / np.log2(np.arange(2, top.shape[1] + 2))
    return top.sum(axis=1).mean(), (top * discount).sum(axis=1).mean()


def simulate(world, lag, noise, users, length, rng):
    """Draw histories [U, length] and groups [U]; also the process's own (HR@10, NDCG@10) at the last item."""
    tastes = rng.integers(GROUPS, size=users)
    dice = rng.random((users, length))
    histories, best = np.zeros((users, length), dtype=np.int64), np.zeros(2)
    for part in np.array_split(np.arange(users), users * len(world[0]) // SLICE + 1):
        for t in range(length):
            p = conditional(world, lag, noise, histories[part, :t], tastes[part])  # [slice, V]
            edges = p.cumsum(axis=1)  # the die is scaled by the last edge, which rounding may leave beside 1
            histories[part, t] = (edges <= dice[part, t, None] * edges[:, -1:]).sum(axis=1) + 1
        best += np.array(best_possible(p)) * len(p) / users  # p is now that of the last item, the test item
    return histories, tastes, best


def synthetic(args):
    """A scene whose truth is known, and the best HR@10 and NDCG@10 that a model can reach on it.

    The next item depends on the last one (markov), on the one --lag places before that (lag), or on the group
    of items that the user likes, one of five (taste: have more than five times as many items as the length).
    """
    lag = {"markov": 0, "lag": args.lag, "taste": None}[args.scene]
    sizes = args.users > 0 and args.seed >= 0 and args.items > 4 and args.items >= args.length > 2
    if not (sizes and 0 < args.noise <= 1 and (args.scene != "lag" or 0 < lag < args.length - 1)):
        needs = "users > 0, seed >= 0, items > 4, items >= length > 2, 0 < noise <= 1, 0 < lag < length - 1"
        sys.exit(f"a scene needs {needs}")
    rng = np.random.default_rng(args.seed)
    world = make_world(args.items, rng)
    histories, _, (hr, ndcg) = simulate(world, lag, args.noise, args.users, args.length, rng)
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
        file = (gzip.open if path.endswith(".gz") else open)(path, "rb")
    # surrogateescape: bytes that are not UTF-8 pass through unharmed.
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def split_rows(lines, separator, strict=True):
    """A csv reader of `lines`; between separators of two characters or more, quotes mean nothing."""
    if len(separator) == 1:
        return csv.reader(lines, delimiter=separator, strict=strict)
    lines = (line.replace(separator, "\x1f") for line in lines)  # csv wants one character
    return csv.reader(lines, delimiter="\x1f", quoting=csv.QUOTE_NONE)


def read_layout(path, lines, separator, columns):
    """Places from 0 of `columns` in the first of `lines`, how many columns it has, lines of the header.

    If all columns are given by number, it is a header if its rating and time (its ids, if neither is wanted)
    have no digit in them, and those of the next row do.
    """
    rows = split_rows(lines, separator, strict=False)
    first = [field.strip() for field in next(filter(None, rows), [])]
    above, second = rows.line_num, next(filter(None, rows), [])
    known = {name: first.index(name) for name in first} | {str(n + 1): n for n in range(len(first))}
    if missing := [f"{column} for --{option}" for option, column in columns.items() if column not in known]:
        sys.exit(f"{path}: no column {missing[0]}; check --separator; its columns: {first}"[:300])
    places = {option: known[column] for option, column in columns.items()}
    named = not all(column.isdecimal() for column in columns.values())
    telling = [places[option] for option in places.keys() & {"rating", "time"} or ("user", "item")]
    digit = re.compile(r"\d").search
    likely = len(first) == len(second) and all(digit(second[n]) and not digit(first[n]) for n in telling)
    if likely and not named:
        print(f"{path}: line {above} is taken for a header and passed over", file=sys.stderr)
    return places, len(first), above if likely or named else 0


def moment(text, is_date):
    """The time in `text`, a number or, if `is_date`, an ISO date in seconds since 1970. Raises ValueError."""
    if is_date:
        date = datetime.fromisoformat(re.sub("( UTC|Z)$", "+00:00", text))
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
    # Exact where it is whole: a float would blur nanoseconds into ties.
    time = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if not abs(time) < np.inf:
        raise ValueError(f"the time is {text}")
    return time


def code_of(name, codes):
    """The number of the id `name` in `codes`; a new id gets the next, from 0. Raises ValueError."""
    if name not in codes and ("\t" in name or len(name.splitlines()) != 1):  # it would break the map of ids
        raise ValueError(f"the id {name[:80]!r} is empty or has a tab or a line break in it")
    return codes.setdefault(name, len(codes))


def read_log(args, columns):
    """The rows of args.log that have args.event and at least args.min_rating, in the file's order.

    columns: {"user", "item" and, if wanted, "rating", "time", "event": name or number from 1}; if any
    is a name, the first line is a header. Returns users [n] and items [n], numbered from 0 as they appear;
    times [n]; the users' and the items' original ids.
    """
    pairs, times, users, items, bad, is_date = array("q"), array("q"), {}, {}, 0, None
    with open_text(args.log) as file:
        head = list(islice(file, 100))
        bare = re.sub('"[^"]*"', "", next(filter(str.strip, head), ""))  # what is in quotes does not tell
        most = max("::", "\t", ";", "|", ",", key=bare.count)
        separator = args.separator or (most if most in bare else " ")
        separator = "\t" if separator == "tab" else separator
        places, width, above = read_layout(args.log, head, separator, columns)
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
                row = {option: fields[place].strip() for option, place in places.items()}
                if row.get("event") != args.event or not float(row.get("rating", 0)) >= args.min_rating:
                    continue
                pair = code_of(row["user"], users), code_of(row["item"], items)
                is_date = is_date if times else re.match(r"\d+-", row.get("time", ""))  # the first one tells
                time = moment(row["time"], is_date) if "time" in row else number
                times = array("d", times) if isinstance(time, float) and times.typecode == "q" else times
                times.append(time)
                pairs.extend(pair)
            except (csv.Error, ValueError, OverflowError) as error:
                if not args.skip_bad:
                    sys.exit(f"{args.log}, line {number}: {error}; check --separator, or give --skip-bad")
                bad += rows.line_num + 1 - number
    if bad:
        print(f"{args.log}: {bad:,} bad line(s) passed over", file=sys.stderr)
    return *np.asarray(pairs).reshape(-1, 2).T, np.asarray(times), list(users), list(items)


def first_meetings(users, items, times):
    """Indices, in the file's order, of each user's earliest row with each item; of equals, the first."""
    order = np.argsort(times, kind="stable")
    pairs = users * (items.max(initial=0) + 1) + items
    return np.sort(order[np.unique(pairs[order], return_index=True)[1]])


def k_core(users, items, k):
    """Indices of the rows that stay when users and items with fewer than k rows go, until none is left."""
    keep, before = np.arange(len(users)), -1
    while len(keep) != before:
        before = len(keep)
        for side in (users, items):
            keep = keep[np.bincount(side[keep])[side[keep]] >= k]
    return keep


def renumber(what, codes, names):
    """New ids [n] from 1 in order of first appearance in `codes` [n], and their names.

    Tells on stderr if two names are the same number, such as 1 and 1.0 or 01.
    """
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    names = [names[code] for code in codes[np.sort(first)]]
    if len({re.sub(r"^0*(\d+?)(\.0*)?$", r"\1", name) for name in names}) < len(names):
        print(f"some {what}s are the same number, as 1 and 1.0 are, but stay apart", file=sys.stderr)
    return rank[inverse] + 1, names


def convert(args):
    """Any log of ratings or events; <out>.users.tsv and <out>.items.tsv have the original ids.

    A column is a number from 1 or a name; one name makes the first line a header. New ids count from 1 in
    order of first appearance among the lines kept.
    """
    made = [f"{args.out}{end}" for end in ("", ".users.tsv", ".items.tsv")]
    if Path(args.log).resolve() in [Path(path + end).resolve() for path in made for end in ("", ".tmp")]:
        sys.exit(f"--out {args.out} would overwrite the log {args.log}; choose another --out")
    columns = {"user": args.user, "item": args.item, "time": args.time}
    columns["rating"] = None if args.min_rating == -np.inf else args.rating
    columns["event"] = None if args.event is None else args.event_column
    columns = {option: column for option, column in columns.items() if column is not None}
    users, items, times, user_names, item_names = read_log(args, columns)
    keep = first_meetings(users, items, times) if args.dedupe else np.arange(len(users))
    keep = keep[k_core(users[keep], items[keep], args.k_core)]
    if not len(keep):
        sys.exit(f"{args.log}: no interaction is left; check --event, --min-rating and --k-core")
    users, user_names = renumber("user", users[keep], user_names)
    items, item_names = renumber("item", items[keep], item_names)
    save(args.out, in_time_order(users, items, times[keep]), users=user_names, items=item_names)


# ---- The command line -------------------------------------------------------------------------------------


def main(argv=None):
    """Run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{ml-100k,synthetic,convert}")

    def command(run):
        name = run.__name__.replace("_", "-")
        added = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__)
        added.set_defaults(run=run)
        added.add_argument("--out", required=True, metavar="FILE", help="where to write; .npy for an array")
        return added.add_argument

    movies, scene, log = map(command, (ml_100k, synthetic, convert))
    movies("--wheel", metavar="FILE", help=f"{WHEEL}, if it is here (default: pip fetches it)")
    scene("--scene", required=True, choices=["markov", "lag", "taste"], help="what the next item depends on")
    scene("--lag", type=int, default=4, help="scene lag: places before the last item, from 1 (%(default)s)")
    scene("--users", type=int, default=2000, help="number of users (%(default)s)")
    scene("--items", type=int, default=200, help="number of items (%(default)s)")
    scene("--length", type=int, default=30, help="interactions a user, no item twice (%(default)s)")
    scene("--noise", type=float, default=0.2, help="share of Zipf popularity, above 0 (%(default)s)")
    scene("--seed", type=int, default=0, help="the same seed gives the same file (%(default)s)")
    log("log", help="one interaction a line; a .gz, or a .zip of one file, is unpacked")
    log("--separator", metavar="SEP", help="such as , or :: or the word tab (told from the first line)")
    log("--user", required=True, metavar="COLUMN", help="the user")
    log("--item", required=True, metavar="COLUMN", help="the item")
    log("--time", metavar="COLUMN", help="numbers or ISO dates (without it, the order of the file decides)")
    log("--rating", default="rating", metavar="COLUMN", help="the rating, for --min-rating (%(default)s)")
    log("--min-rating", type=float, default=-np.inf, metavar="R", help="keep ratings of at least R (all)")
    log("--event", metavar="KIND", help="keep events of this kind, such as view (all)")
    log("--event-column", default="event", metavar="COLUMN", help="the kind, for --event (%(default)s)")
    log("--dedupe", action="store_true", help="keep a user's first interaction with each item alone")
    log("--k-core", type=int, default=1, metavar="K", help="keep users and items with K interactions or more")
    log("--skip-bad", action="store_true", help="pass over lines that do not fit, and count them")
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except (OSError, EOFError, RuntimeError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
        sys.exit(f"{args.out} is not made: {error}")


if __name__ == "__main__":
    main()
