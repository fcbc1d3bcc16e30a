"""Make the data file that the scripts read: MovieLens-100K, a synthetic log, or any rating log.

Every command writes a table of two integers, `user item`, with one interaction in each row. A user's rows
stand together, in time order. Ids count from 1, because 0 is padding. A file that ends in .npy gets an
int64 array [n, 2], and any other file gets text. data/README.md describes the format.

    python data/prepare.py ml-100k --out data/ml-100k.txt
    python data/prepare.py synthetic --scene lag --lag 4 --out data/lag4.txt

    python data/prepare.py convert ratings.dat --user 1 --item 2 --rating 3 --time 4 --min-rating 4 \\
        --k-core 5 --out data/ml-1m.txt
"""

import argparse
import bz2
import csv
import gzip
import hashlib
import io
import lzma
import math
import re
import subprocess
import sys
import tempfile
import zlib
from datetime import datetime, timezone
from itertools import chain, islice
from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

WHEEL = "recbole==1.2.1"  # a package that carries MovieLens-100K as its example
MEMBERS = [f"recbole/dataset_example/ml-100k/ml-100k.{kind}" for kind in ("inter", "item")]
SHA256 = "00ca7badbed2eef44dab473ae9ee2801fc0e1d415774a8cba3bc1b0350a8124d"  # of the members, joined
SUCCESSOR_P = np.array([8, 4, 2, 1]) / 15  # probabilities of an item's four successors
NUM_GROUPS = 5  # groups of items in the scene taste
MAX_PROBABILITIES = 4_000_000  # a simulation holds so many at once, 32 MB
MISSING = ["", "NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null", "None", r"\N"]  # they stand for no id


# ---- Output files ----------------------------------------------------------------------------------------


def check_outputs(out, inputs):
    """Stop if the command would overwrite one of `inputs`, a directory, a device or another special file."""
    targets = [Path(out + end).resolve() for end in ("", ".users.tsv", ".items.tsv")]
    for path in [*targets, *(Path(f"{target}.tmp") for target in targets)]:
        if path.exists() and (not path.is_file() or any(map(path.samefile, inputs))):
            sys.exit(f"--out {out} would overwrite {path}, an input or no plain file; choose another --out")


def write_file(path, content):
    """Write the bytes `content` to `path`. A symbolic link stays, and its target is written.

    Write a temporary file first: no reader ever finds half a file.
    """
    path = Path(path).resolve()
    temporary = Path(f"{path}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # after a full disk or Ctrl-C


def write_table(out, users, items, times, names):
    """Write n interactions to `out`, sorted by user and then by time. Rows of equal times keep their order.

    `names` maps "users" or "items" to the names of the ids 1, 2, 3 ..., which go to <out>.users.tsv or
    <out>.items.tsv.
    """
    table = np.stack([users, items], axis=1)[np.lexsort((times, users))]  # [n, 2]
    content = io.BytesIO()
    if out.endswith(".npy"):
        np.save(content, table)
    else:
        np.savetxt(content, table, "%d")
    write_file(out, content.getvalue())
    for side, side_names in names.items():
        text = "".join(f"{new_id}\t{name}\n" for new_id, name in enumerate(side_names, 1))
        write_file(f"{out}.{side}.tsv", text.encode("utf-8", "surrogateescape"))  # as `open_text` decodes
    num_users, num_items = (len(np.unique(column)) for column in table.T)
    print(f"{out}: {num_users:,} users, {num_items:,} items, {len(table):,} interactions")


# ---- MovieLens-100K --------------------------------------------------------------------------------------


def ml_100k(args):
    """MovieLens-100K with its own ids. <out>.items.tsv holds the titles."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.wheel:  # pip downloads the package and installs nothing
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            if subprocess.run([*pip, "--dest", folder, WHEEL]).returncode:
                sys.exit(f"pip could not download {WHEEL}; get the file elsewhere and give it with --wheel")
            args.wheel = next(Path(folder).glob("*.whl"))
        with ZipFile(args.wheel) as archive:
            contents = [archive.read(member) for member in MEMBERS if member in archive.namelist()]
    if hashlib.sha256(b"".join(contents)).hexdigest() != SHA256:
        sys.exit(f"{args.wheel} does not hold the MovieLens-100K of {WHEEL}: the SHA-256 differs")
    # Both members are tab-separated, below a header. The titles are in the order of the ids, without a gap.
    log, titles = ([line.split("\t") for line in text.decode().splitlines()[1:]] for text in contents)
    users, items, _, times = np.array(log).astype(np.int64).T  # [n] each
    write_table(args.out, users, items, times, {"items": [row[1] for row in titles]})


# ---- Synthetic logs --------------------------------------------------------------------------------------


def draw_world(num_items, rng):
    """Draw the structure of a synthetic log of V items, which models have to infer. Item i has index i - 1.

    Returns the popularity [V], Zipf's law in random order, with sum 1; the successors [V, 4], indices of four
    other items; and the groups [V].
    """
    weights = 1 / (rng.permutation(num_items) + 1)
    steps = np.array([rng.choice(num_items - 1, len(SUCCESSOR_P), replace=False) for _ in range(num_items)])
    successors = (np.arange(num_items)[:, None] + 1 + steps) % num_items
    return weights / weights.sum(), successors, rng.permutation(num_items) % NUM_GROUPS


def next_item_distribution(world, lag, noise, history, user_groups):
    """Compute p [U, V], the distribution of the next item after `history` [U, t].

    p(i | history) ∝ [i not in history] · ((1 − noise) · structure(i) + noise · popularity(i))

    Take the item that stands `lag` places before the last one. The structure gives its four successors the
    weights 8:4:2:1. If the history is too short, the structure is the popularity. If `lag` is None, the
    structure is uniform over the user's group. No item comes twice, because evaluation ranks unseen items.
    """
    popularity, successors, groups = world
    structure = np.zeros((len(history), len(popularity)))
    if lag is None:
        structure += (groups == user_groups[:, None]) / np.bincount(groups)[user_groups, None]
    elif history.shape[1] > lag:
        np.put_along_axis(structure, successors[history[:, -1 - lag] - 1], SUCCESSOR_P[None], axis=1)
    else:
        structure += popularity
    p = (1 - noise) * structure + noise * popularity
    np.put_along_axis(p, history - 1, 0, axis=1)
    return p / p.sum(axis=1, keepdims=True)


def best_possible(p, k=10):
    """Compute the best HR@k and NDCG@k that a model can reach in expectation, if p [U, V] is the truth.

    The best model ranks by p. Let p_(j) be the j-th largest probability. In the mean over users,

    HR = Σ_{j≤k} p_(j)   and   NDCG = Σ_{j≤k} p_(j) / log2(j + 1)
    """
    largest = -np.sort(-p, axis=1)[:, :k]
    discount = 1 / np.log2(np.arange(2, largest.shape[1] + 2))
    return largest.sum(axis=1).mean(), (largest * discount).sum(axis=1).mean()


def simulate(world, lag, noise, num_users, length, rng):
    """Draw histories [U, length] and user groups [U].

    The third value is the best (HR@10, NDCG@10) that a model can reach in expectation at the last item.
    """
    user_groups = rng.integers(NUM_GROUPS, size=num_users)
    uniform = rng.random((num_users, length))
    histories, best = np.zeros((num_users, length), dtype=np.int64), np.zeros(2)
    for users in np.array_split(np.arange(num_users), num_users * len(world[0]) // MAX_PROBABILITIES + 1):
        for t in range(length):
            p = next_item_distribution(world, lag, noise, histories[users, :t], user_groups[users])
            cumulative = p.cumsum(axis=1)  # its last column is 1 only up to rounding
            histories[users, t] = (cumulative <= uniform[users, t, None] * cumulative[:, -1:]).sum(axis=1) + 1
        best += np.array(best_possible(p)) * len(users) / num_users  # p is now that of the last item
    return histories, user_groups, best


def synthetic(args):
    """A log with a known distribution, and the best HR@10 and NDCG@10 that a model can reach on it.

    The scene is what the next item depends on. In markov, it depends on the last item. In lag, it depends on
    the item --lag places before the last one. In taste, it depends on the user's group of items, one of five.
    The scene taste needs more than five times as many items as the length.
    """
    if args.items < args.length or (args.scene == "lag" and args.lag > args.length - 2):
        sys.exit("--items must be at least --length, and --lag in the scene lag at most --length - 2")
    lag = {"markov": 0, "lag": args.lag, "taste": None}[args.scene]
    rng = np.random.default_rng(args.seed)
    world = draw_world(args.items, rng)
    histories, _, (hr, ndcg) = simulate(world, lag, args.noise, args.users, args.length, rng)
    users, times = np.indices(histories.shape)
    write_table(args.out, users.ravel() + 1, histories.ravel(), times.ravel(), {})
    print(f"best possible on the test items: HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}")


# ---- Any rating log --------------------------------------------------------------------------------------


def open_text(path):
    """Open a text file, also one in a .gz, .bz2 or .xz or alone in a .zip. Line ends stay as they are."""
    suffix = Path(path).suffix.lower()
    if re.search(r"\.(tar|tar\.(gz|bz2|xz)|tgz|tbz2?|txz|7z|rar|zst)$", path.lower()):
        sys.exit(f"{path} has a format that cannot be read; unpack it, and give the log in it")
    if suffix == ".zip":
        with ZipFile(path) as archive:
            members = [name for name in archive.namelist() if not name.endswith("/")]
            if len(members) != 1:
                sys.exit(f"{path} holds {len(members)} files; unpack the one you want: {', '.join(members)}")
            file = archive.open(members[0])
    else:
        file = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(suffix, open)(path, "rb")
    # surrogateescape keeps bytes that are not UTF-8 as they are
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def split_rows(args, head, lines, strict=True):
    """Return a csv reader of `lines`. The first line of `head` decides where the options are not given.

    A run of blanks is one separator. By default, fields may be in quotes, but not between tabs or between
    separators of several characters.
    """
    outside_quotes = re.sub('"[^"]*"', "", next(filter(str.strip, head), ""))
    most_frequent = max("::", "\t", ";", "|", ",", key=outside_quotes.count)
    guess = most_frequent if most_frequent in outside_quotes else " "
    separator = {None: guess, "tab": "\t"}.get(args.separator, args.separator)
    quoted = args.quoted == "yes" or (args.quoted is None and len(separator) == 1 and separator != "\t")
    if not re.fullmatch('[^"\r\n]' if quoted else '[^"\r\n]+', separator):
        sys.exit(f"--separator {separator!r} cannot be used; between quoted fields, it is one character")
    delimiter = separator if len(separator) == 1 else "\x1f"  # csv needs one character
    blank = separator == " "
    lines = (line.rstrip(" \r\n" if blank else "\r\n").replace(separator, delimiter) + "\n" for line in lines)
    quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(lines, delimiter=delimiter, quoting=quoting, skipinitialspace=blank, strict=strict)


def read_layout(path, rows, columns):
    """Find `columns` in the first row. Returns their indices, the number of all columns, the header's lines.

    If a column is given by name, the first row is a header. Otherwise it is one if its rating and time have
    no digit, but those of the second row have. Without rating and time, the user and the item decide.
    """
    first = [field.strip() for field in next(filter(None, rows), [])]
    header_lines = rows.line_num
    second = next(filter(None, rows), [])
    index_of = {name: first.index(name) for name in first} | {str(n + 1): n for n in range(len(first))}
    if missing := [f"{name} for --{option}" for option, name in columns.items() if name not in index_of]:
        sys.exit(f"{path}: no column {missing[0]}; see --separator and --quoted; columns: {first}"[:300])
    indices = {option: index_of[column] for option, column in columns.items()}
    by_name = not all(map(str.isdecimal, columns.values()))
    deciding = [indices[option] for option in indices.keys() & {"rating", "time"} or ("user", "item")]
    digit = re.compile(r"\d").search
    is_header = len(first) == len(second) and all(digit(second[n]) and not digit(first[n]) for n in deciding)
    if is_header and not by_name:
        print(f"{path}: line {header_lines} is taken for a header and passed over", file=sys.stderr)
    return indices, len(first), header_lines if is_header or by_name else 0


def parse_time(text, is_date):
    """Return the time in `text`: a number, or the seconds from 1970 to an ISO date. Raises ValueError."""
    if is_date:
        date = datetime.fromisoformat(re.sub("( UTC|Z)$", "+00:00", text))
        return date.replace(tzinfo=date.tzinfo or timezone.utc).timestamp()
    # a whole number stays exact, because nanoseconds would become equal as floats
    time = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    if not abs(time) < 2**63:
        raise ValueError(f"the time is {text}")
    return time


def index_id(name, index_of):
    """Return the index of the id `name`. A new id gets the next one, from 0. Raises ValueError."""
    if name not in index_of and (name in MISSING or "\t" in name or len(name.splitlines()) > 1):
        raise ValueError(f"{name[:80]!r} is not an id: it is missing, or has a tab or a line end in it")
    return index_of.setdefault(name, len(index_of))


def read_log(args, columns):
    """Read the rows with args.event and at least args.min_rating, in the order of the log.

    `columns` maps "user", "item" and, if needed, "rating", "time" and "event" to a name or a number from 1.
    Returns users [n] and items [n], indices in order of appearance; times [n]; the ids of users and items.
    """
    pairs, times, index_of_user, index_of_item, num_bad, is_date = [], [], {}, {}, 0, None
    with open_text(args.log) as file:
        head = list(islice(file, 100))
        first_rows = split_rows(args, head, head, strict=False)
        indices, num_columns, header_lines = read_layout(args.log, first_rows, columns)
        rows = split_rows(args, head, chain(head, file))
        while True:
            start = rows.line_num + 1  # where the next row begins
            try:
                fields = next(rows, None)
                if fields is None:
                    break
                if rows.line_num > start and args.quoted != "yes":  # a quote that is text may swallow rows
                    raise ValueError("a field in quotes has a line end in it")
                if not fields or start <= header_lines:
                    continue
                if len(fields) != num_columns:  # a separator in a field without quotes shifts the columns
                    raise ValueError(f"{len(fields)} column(s) where the first line has {num_columns}")
                row = {option: fields[index].strip() for option, index in indices.items()}
                if row.get("event") != args.event or not float(row.get("rating", 0)) >= args.min_rating:
                    continue
                pair = index_id(row["user"], index_of_user), index_id(row["item"], index_of_item)
                time = row.get("time", "0")  # if all are equal, the order of the log decides
                is_date = is_date if times else re.match(r"\d+-", time)
                times.append(parse_time(time, is_date))
                pairs.extend(pair)
            except (csv.Error, ValueError, OverflowError) as error:
                if not args.skip_bad:
                    sys.exit(f"{args.log}, line {start}: {error}; see --separator, --quoted and --skip-bad")
                num_bad += rows.line_num + 1 - start
    if num_bad:
        print(f"{args.log}: {num_bad:,} bad line(s) passed over", file=sys.stderr)
    users, items = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return users, items, np.array(times), list(index_of_user), list(index_of_item)


def first_meetings(users, items, times):
    """Return the indices of each user's earliest row with each item; of rows with equal times, the first."""
    order = np.argsort(times, kind="stable")
    pairs = users * (items.max(initial=0) + 1) + items
    return np.sort(order[np.unique(pairs[order], return_index=True)[1]])


def k_core(users, items, k):
    """Remove users and items with fewer than k rows until none is left. Returns the indices of the rest."""
    keep, num_before = np.arange(len(users)), -1
    while len(keep) != num_before:
        num_before = len(keep)
        for side in (users, items):
            keep = keep[np.bincount(side[keep])[side[keep]] >= k]
    return keep


def renumber(side, indices, names):
    """Return new ids [n], from 1 in order of first appearance in `indices` [n], and their names.

    A notice on stderr says if two names may mean one number. Scientific notation may have lost digits.
    """
    _, first_rows, inverse = np.unique(indices, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first_rows))
    names = [names[index] for index in indices[np.sort(first_rows)]]
    plain = {re.sub(r"^0*(\d+?)(\.0*)?$", r"\1", name) for name in names}
    if len(plain) < len(names) or any(re.fullmatch(r"\d(\.\d+E\+?|E\+)\d+", name.upper()) for name in names):
        print(f"some {side}s may be the same number, as 1, 1.0 and 1e+0 are, but stay apart", file=sys.stderr)
    return rank[inverse] + 1, names


def convert(args):
    """Any log of ratings or events. <out>.users.tsv and <out>.items.tsv hold the original ids.

    A column is a number from 1 or a name. If one is a name, the first line is the header. New ids count from
    1, in order of first appearance among the rows that are kept. Line ends in a field need --quoted yes.
    """
    columns = {"user": args.user, "item": args.item, "time": args.time}
    columns["rating"] = None if args.min_rating == -math.inf else args.rating
    columns["event"] = None if args.event is None else args.event_column
    columns = {option: column for option, column in columns.items() if column is not None}
    users, items, times, user_names, item_names = read_log(args, columns)
    keep = first_meetings(users, items, times) if args.dedupe else np.arange(len(users))
    keep = keep[k_core(users[keep], items[keep], args.k_core)]
    if not len(keep):
        sys.exit(f"{args.log}: no interaction is left; check --event, --min-rating and --k-core")
    users, user_names = renumber("user", users[keep], user_names)
    items, item_names = renumber("item", items[keep], item_names)
    write_table(args.out, users, items, times[keep], {"users": user_names, "items": item_names})


# ---- The command line ------------------------------------------------------------------------------------


def number(kind, low, high=1e30):
    """The `type` of an option: a number of `kind`, int or float, from `low` to `high`."""

    def convert(text):
        if not low <= kind(text) <= high:  # NaN fails, too
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
        return kind(text)

    convert.__name__ = kind.__name__
    return convert


def main(argv=None):
    """Read the command line and run one command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="{ml-100k,synthetic,convert}")

    for run in (ml_100k, synthetic, convert):
        name, text = run.__name__.replace("_", "-"), run.__doc__
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        command.set_defaults(run=run)
        command.add_argument("--out", required=True, metavar="FILE", help="file to write; .npy for an array")
    add = commands.choices["ml-100k"].add_argument
    add("--wheel", metavar="FILE", help=f"{WHEEL}, if you have it (default: pip downloads it)")
    add = commands.choices["synthetic"].add_argument
    add("--scene", required=True, choices=["markov", "lag", "taste"], help="what the next item depends on")
    add("--lag", type=number(int, 1), default=4, help="scene lag: places before the last item (%(default)s)")
    add("--users", type=number(int, 1), default=2000, help="number of users (%(default)s)")
    add("--items", type=number(int, 5), default=200, help="number of items (%(default)s)")
    add("--length", type=number(int, 3), default=30, help="interactions of each user (%(default)s)")
    add("--noise", type=number(float, 1e-9, 1), default=0.2, help="weight of the popularity (%(default)s)")
    add("--seed", type=number(int, 0), default=0, help="the same seed gives the same file (%(default)s)")
    add = commands.choices["convert"].add_argument
    add("log", help="one interaction a line, as text, in a .gz, .bz2 or .xz, or alone in a .zip")
    add("--separator", metavar="SEP", help="such as , or :: or the word tab (default: by the first line)")
    add("--quoted", choices=["yes", "no"], help="fields may be in quotes (default: no for tab and ::)")
    add("--user", required=True, metavar="COLUMN", help="the user")
    add("--item", required=True, metavar="COLUMN", help="the item")
    add("--time", metavar="COLUMN", help="numbers or ISO dates (default: the order of the log decides)")
    add("--rating", default="rating", metavar="COLUMN", help="the rating, for --min-rating (%(default)s)")
    add("--min-rating", type=float, default=-math.inf, metavar="R", help="keep ratings of at least R (all)")
    add("--event", metavar="KIND", help="keep events of this kind, such as view (all)")
    add("--event-column", default="event", metavar="COLUMN", help="the kind, for --event (%(default)s)")
    add("--dedupe", action="store_true", help="keep a user's first interaction with each item alone")
    add("--k-core", type=number(int, 1), default=1, metavar="K", help="K rows or more per user and per item")
    add("--skip-bad", action="store_true", help="pass over lines that do not fit, and count them")
    args = parser.parse_args(argv)
    try:
        check_outputs(args.out, [vars(args)[name] for name in ("wheel", "log") if vars(args).get(name)])
        args.run(args)
    except (OSError, EOFError, RuntimeError, csv.Error, BadZipFile, zlib.error, lzma.LZMAError) as error:
        sys.exit(f"{args.out} is not made: {error}")


if __name__ == "__main__":
    main()
