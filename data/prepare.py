"""Interactions for the scripts of this repository: MovieLens-100K, synthetic scenes, any rating log.

Every command writes one table of two integers, `user item`: one interaction a row, a user's rows together and
in time order, ids from 1, because 0 is padding. An --out that ends in .npy gets an int64 array [n, 2], any
other one text. data/README.md describes the format and the files beside it.

    python data/prepare.py ml-100k --out data/ml-100k.txt
    python data/prepare.py synthetic --scene lag --lag 4 --out data/lag4.txt
    python data/prepare.py convert ratings.dat --separator :: --user 1 --item 2 --rating 3 --time 4 \\
        --min-rating 4 --k-core 5 --out data/ml-1m.txt
    python data/prepare.py convert events.csv --user visitorid --item itemid --time timestamp --event view \\
        --k-core 5 --out data/retailrocket.txt
    python data/prepare.py convert ratings_Beauty.csv.gz --user 1 --item 2 --time 4 --out data/beauty.npy
"""

import argparse
import csv
import gzip
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from array import array
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

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


class BadInput(Exception):
    """Something the user can mend: `main` prints it as one line and ends with status 2."""


# ---- Writing ----------------------------------------------------------------------------------------------


def write_atomically(path, write):
    """Make `path` by `write(temporary path)` and a rename: an interrupted run leaves no half file.

    Parents are created. Raises BadInput when the place cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror or error}; choose another --out") from None


def save(out, table, **names):
    """Write `table` [n, 2] to `out`, text or .npy, and each of `names`, {id: name}, as `<out>.<its key>.tsv`.

    Prints what the table holds. Raises BadInput when a file cannot be written.
    """

    def write_table(temporary):
        with open(temporary, "wb") as file:  # an open file, because np.save adds .npy to a name
            if Path(out).suffix == ".npy":
                np.save(file, table)
                return
            for start in range(0, len(table), 1 << 16):  # in pieces: Python's numbers are bulky
                rows = table[start : start + (1 << 16)].tolist()
                file.write("".join([f"{user} {item}\n" for user, item in rows]).encode())

    write_atomically(out, write_table)
    for key, ids in names.items():
        text = "".join(f"{number}\t{name}\n" for number, name in ids.items())
        content = text.encode("utf-8", "surrogateescape")  # as `read_rows` decodes
        write_atomically(f"{out}.{key}.tsv", lambda path, content=content: path.write_bytes(content))
    users, items = (len(np.unique(column)) for column in table.T)
    print(f"{out}: {users:,} users, {items:,} items, {len(table):,} interactions")


def in_time_order(users, items, times=None):
    """The table [n, 2] of users [n] and items [n], by user and then by time [n]; ties stay as they come."""
    order = np.argsort(users, kind="stable") if times is None else np.lexsort((times, users))
    return np.stack([users, items], axis=1)[order].astype(np.int64)


# ---- MovieLens-100K ---------------------------------------------------------------------------------------


def download_wheel(folder):
    """Fetch the wheel into `folder` with pip, installing nothing; its path. Raises BadInput."""
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(pip + what, capture_output=True, text=True)
    wheels = sorted(Path(folder).glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise BadInput(
            f"pip could not fetch the wheel {WHEEL} (it said: {said}); check the network, or run "
            f"`pip download --no-deps {WHEEL}` where there is one and give the file with --wheel"
        )
    return wheels[0]


def read_wheel(wheel):
    """The texts of the wheel's members in SHA256. Raises BadInput unless they are the known ones."""
    mend, texts = f"take it anew with `pip download --no-deps {WHEEL}`", []
    for member, expected in SHA256.items():
        try:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
        except (OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            why = getattr(error, "strerror", None) or error
            raise BadInput(f"cannot read {member} in the wheel {wheel}: {why}; {mend}") from None
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise BadInput(f"{wheel}: {member} has SHA-256 {found}, expected {expected}; {mend}")
        texts.append(content.decode("utf-8"))
    return texts


def movielens(interactions, titles):
    """From the wheel's two texts, tab-separated below a header: the table [n, 2] and {item: title}.

    The ids stay MovieLens's own, which run from 1 without a gap.
    """
    log = np.array([line.split("\t") for line in interactions.splitlines()[1:]]).astype(np.int64)
    users, items, _, times = log.T  # [n] each
    rows = [line.split("\t") for line in titles.splitlines()[1:]]
    return in_time_order(users, items, times), {int(row[0]): row[1] for row in rows}


def ml_100k(args):
    """The command `ml-100k`. Raises BadInput."""
    with tempfile.TemporaryDirectory() as folder:
        if not args.wheel:
            print(f"fetching MovieLens-100K in the wheel {WHEEL} (2 MB) with pip", flush=True)
        table, titles = movielens(*read_wheel(args.wheel or download_wheel(folder)))
    save(args.out, table, items=titles)


# ---- Synthetic scenes -------------------------------------------------------------------------------------


class World(NamedTuple):
    """The hidden truth of a scene. Item i is column i - 1 of every array over items."""

    scene: str  # markov, lag or taste
    lag: int  # how many places before the last item its cause stands: 0 for markov
    noise: float  # share of popularity in the mixture
    popularity: np.ndarray  # [V], Zipf, sums to 1
    successors: np.ndarray  # [V, 4], columns
    groups: np.ndarray  # [V], each item's group


def make_world(scene, items, lag, noise, rng):
    """Draw the truth of a scene of `items` items from `rng`."""
    weights = 1 / (rng.permutation(items) + 1)
    steps = np.array([rng.choice(items - 1, len(SUCCESSORS), replace=False) for _ in range(items)])
    successors = (np.arange(items)[:, None] + 1 + steps) % items  # four different ones, never the item itself
    groups = rng.permutation(items) % GROUPS
    return World(scene, lag if scene == "lag" else 0, noise, weights / weights.sum(), successors, groups)


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
    """The command `synthetic`. Raises BadInput."""
    checks = {
        "users": (args.users >= 1, "at least 1"),
        "length": (args.length >= 3, "at least 3: to train, to validate and to test"),
        "items": (args.items >= max(5, args.length), "at least 5, and --length: no user has an item twice"),
        "noise": (0 < args.noise <= 1, "a share above 0 and up to 1"),
        "lag": (args.scene != "lag" or 1 <= args.lag <= args.length - 2, "from 1 to the length less 2"),
        "seed": (args.seed >= 0, "at least 0"),
    }
    for option, (good, give) in checks.items():
        if not good:
            raise BadInput(f"--{option} is {getattr(args, option)}; give {give}")
    rng = np.random.default_rng(args.seed)
    world = make_world(args.scene, args.items, args.lag, args.noise, rng)
    histories, _, (hr, ndcg) = simulate(world, args.users, args.length, rng)
    users = np.arange(1, args.users + 1).repeat(args.length)
    save(args.out, np.stack([users, histories.ravel()], axis=1))
    print(f"best possible on the test items: HR@10 {hr:.4f}, NDCG@10 {ndcg:.4f}")


# ---- Any rating log ---------------------------------------------------------------------------------------


def malformed(path, number, why):
    """The BadInput for line `number` of `path`."""
    mend = "mend or remove it, or check --separator and the columns (a header needs a column by name)"
    return BadInput(f"{path}, line {number}: {why}; {mend}")


def read_rows(path, separator):
    """Yield (line number, fields) of each line of a text file or a .gz, but blank ones. Raises BadInput."""
    opener = gzip.open if str(path).endswith(".gz") else open
    quoting = csv.QUOTE_NONE if separator == "::" else csv.QUOTE_MINIMAL
    number = 1
    try:
        # surrogateescape: bytes that are not UTF-8 pass through unharmed.
        with opener(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = (line.replace("::", "\x1f") for line in file) if separator == "::" else file
            delimiter = "\x1f" if separator == "::" else separator  # csv wants a single character
            rows = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
            for fields in rows:
                if fields:
                    yield number, fields
                number = rows.line_num + 1  # where the next row begins; quoted fields may span lines
    except csv.Error as error:
        raise malformed(path, number, f"quotes that do not match ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or error
        raise BadInput(f"cannot read {path}: {why}; check the path, and that a .gz file is whole") from None


def locate(fields, columns):
    """Places from 0 of the `columns` {option: name or number from 1} in the first line. Raises ValueError."""
    names = [field.strip() for field in fields]
    places = {}
    for option, column in columns.items():
        if column.isdecimal() and 1 <= int(column) <= len(names):
            places[option] = int(column) - 1
        elif column in names:
            places[option] = names.index(column)
        else:
            there = f"{len(names)} column(s): {', '.join(names)[:200]}"
            raise ValueError(f"no column {column} for --{option} among its {there}")
    return places


def finite(text, what):
    """The number in `text`. Raises ValueError, which names `what`, unless it is a finite one."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise ValueError(f"the {what} {text!r} is not a number")


def code_of(text, codes, what):
    """The number of the id `text` in `codes`; a new id gets the next, from 0. Raises ValueError."""
    name = text.strip()
    code = codes.get(name)
    if code is None:
        if "\t" in name or len(name.splitlines()) != 1:  # it would break the map of ids
            raise ValueError(f"the {what} {name[:80]!r} is empty or has a tab or a line break in it")
        code = codes[name] = len(codes)
    return code


def read_log(path, separator, columns, event=None, min_rating=None):
    """Read the rows of a log that have `event` and at least `min_rating`, in the file's order.

    columns: {"user", "item" and, if wanted, "rating", "time", "event-column": name or number from 1}; if any
    is a name, the first line is a header. Returns users [n] and items [n], numbered from 0 as they appear;
    times [n] or None; the users' and the items' original ids. Raises BadInput.
    """
    users, items, times = array("q"), array("q"), array("q")
    user_codes, item_codes, at = {}, {}, None
    for number, fields in read_rows(path, separator):
        try:
            if at is None:
                at, width = locate(fields, columns), len(fields)
                if not all(column.isdecimal() for column in columns.values()):
                    continue  # a header
            if len(fields) != width:  # say, a comma in a field without quotes: it would shift the columns
                raise ValueError(f"{len(fields)} column(s) where the first line has {width}")
            if event is not None and fields[at["event-column"]].strip() != event:
                continue
            if min_rating is not None and finite(fields[at["rating"]], "rating") < min_rating:
                continue
            users.append(code_of(fields[at["user"]], user_codes, "user"))
            items.append(code_of(fields[at["item"]], item_codes, "item"))
            if "time" in at:
                try:
                    moment = int(fields[at["time"]])  # exact: a float would blur nanoseconds into ties
                except ValueError:
                    moment = finite(fields[at["time"]], "time")
                    times = times if times.typecode == "d" else array("d", times)
                times.append(moment)
        except (ValueError, OverflowError) as error:
            raise malformed(path, number, error) from None
    if not users:
        why = "no interaction is left" if at else "it is empty"
        raise BadInput(f"{path}: {why}; give one interaction a line, and check --event and --min-rating")
    times = np.asarray(times) if "time" in at else None
    return np.asarray(users), np.asarray(items), times, list(user_codes), list(item_codes)


def k_core(users, items, k):
    """Indices of the rows that stay when users and items with fewer than k rows go, until none is left."""
    keep = np.arange(len(users))
    while True:
        enough = np.ones(len(keep), dtype=bool)
        for side in (users[keep], items[keep]):
            enough &= np.bincount(side)[side] >= k
        if enough.all():
            return keep
        keep = keep[enough]


def renumber(codes, names):
    """New ids [n] from 1 in order of first appearance in `codes` [n], and {new id: names[code]}."""
    unique, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    ids = np.empty(len(unique), dtype=np.int64)
    ids[order] = np.arange(1, len(unique) + 1)
    return ids[inverse], {new: names[code] for new, code in enumerate(unique[order], 1)}


def convert(args):
    """The command `convert`. Raises BadInput."""
    if args.min_rating is not None and args.rating is None:
        raise BadInput("--min-rating needs a rating; give its column with --rating")
    made = [args.out, f"{args.out}.users.tsv", f"{args.out}.items.tsv"]
    if os.path.realpath(args.log) in map(os.path.realpath, made):
        raise BadInput(f"--out {args.out} would overwrite the log {args.log}; choose another --out")
    columns = {"user": args.user, "item": args.item, "rating": args.rating, "time": args.time}
    columns["event-column"] = args.event_column if args.event is not None else None
    columns = {option: column for option, column in columns.items() if column is not None}
    separator = "\t" if args.separator == "tab" else args.separator
    users, items, times, *names = read_log(args.log, separator, columns, args.event, args.min_rating)
    keep = k_core(users, items, args.k_core)
    if not len(keep):
        raise BadInput(f"{args.log}: no interaction is left with --k-core {args.k_core}; give a smaller one")
    users, user_names = renumber(users[keep], names[0])
    items, item_names = renumber(items[keep], names[1])
    table = in_time_order(users, items, None if times is None else times[keep])
    save(args.out, table, users=user_names, items=item_names)


# ---- The command line -------------------------------------------------------------------------------------


def main(argv=None):
    """Run one command; its exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="{ml-100k,synthetic,convert}")

    about = "MovieLens-100K with its own ids; <out>.items.tsv has the titles"
    command = commands.add_parser("ml-100k", help=about, description=about)
    add = command.add_argument
    add("--wheel", metavar="FILE", help=f"the wheel {WHEEL}, if it is here already (default: pip fetches it)")
    command.set_defaults(run=ml_100k)

    about = "a scene whose truth is known, and the best HR@10 and NDCG@10 that a model can reach on it"
    command = commands.add_parser("synthetic", help=about, description=about)
    add = command.add_argument
    scenes = "the next item depends on the last one (markov), on the one --lag places before that (lag), or "
    scenes += f"on the user's group of items, one of {GROUPS} (taste: have items / {GROUPS} above the length)"
    add("--scene", required=True, choices=["markov", "lag", "taste"], help=scenes)
    add("--lag", type=int, default=4, help="scene lag: places before the last item, from 1 (%(default)s)")
    add("--users", type=int, default=2000, help="number of users (%(default)s)")
    add("--items", type=int, default=200, help="number of items (%(default)s)")
    add("--length", type=int, default=30, help="interactions a user, no item twice (%(default)s)")
    add("--noise", type=float, default=0.2, help="share of Zipf popularity, above 0 (%(default)s)")
    add("--seed", type=int, default=0, help="the same seed gives the same file (%(default)s)")
    command.set_defaults(run=synthetic)

    about = "any log of ratings or events; <out>.users.tsv and <out>.items.tsv have the original ids"
    rules = "A column is a number from 1 or a name; one name makes the first line a header. New ids count "
    rules += "from 1 in order of first appearance among the lines kept. Repeated interactions are kept."
    command = commands.add_parser("convert", help=about, description=f"{about}. {rules}")
    add = command.add_argument
    add("log", help="one interaction a line; a .gz file is unpacked as it is read")
    separators = [",", "tab", "\t", "::"]
    add("--separator", default=",", choices=separators, metavar="SEP", help="a comma (default), tab or ::")
    add("--user", required=True, metavar="COLUMN", help="the user")
    add("--item", required=True, metavar="COLUMN", help="the item")
    time = "when, a whole or decimal number; ties keep the file's order (default: all keeps it)"
    add("--time", metavar="COLUMN", help=time)
    add("--rating", metavar="COLUMN", help="the rating, for --min-rating")
    add("--min-rating", type=float, metavar="R", help="keep ratings of at least R (default: all)")
    add("--event", metavar="KIND", help="keep events of this kind, such as view (default: all)")
    add("--event-column", default="event", metavar="COLUMN", help="the kind, for --event (%(default)s)")
    core = "remove users and items with fewer than K interactions until none is left (default: none)"
    add("--k-core", type=int, default=1, metavar="K", help=core)
    command.set_defaults(run=convert)

    for command in commands.choices.values():
        command.add_argument("--out", required=True, metavar="FILE", help="where to write; .npy for an array")
    args = parser.parse_args(argv)
    try:
        if not Path(args.out).name:
            raise BadInput(f"--out {args.out!r} names no file; give one such as data/log.txt")
        args.run(args)
    except BadInput as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
