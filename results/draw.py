"""Draw the tables and pictures of README.md and results/README.md from the JSON of results/runs alone.

    python results/draw.py     # the pictures where matplotlib is (requirements-figures.txt)

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Mean of seeds, in brackets their standard
deviation and number.
"""

import ast
import itertools
import json
import math
import re
import sys
from collections import Counter

import numpy as np
from run import (
    BETAS,
    DECAYED,
    DECAYED_BOTH,
    KINDS,
    LOSSES,
    PAIRS,
    PRIOR,
    ROOT,
    RUNS,
    SCENES,
    SEQUENCES,
    SETS,
    TEACHERS,
    TOGETHER,
    WAYS,
    better_search,
    chosen,
    figures,
    gains,
    processes,
    speed,
)
from scipy import stats

PAGES = ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))
MISSING = "not run"
OPERATIONS = (
    "conv3",
    "conv5",
    "dilated_conv3",
    "dilated_conv5",
    "avg_pool",
    "max_pool",
    "skip",
    "none",
    "mean",
)


class Missing(Exception):
    """A run that a table or a picture needs was not made."""


def made(name, claim="adarec"):
    """The JSON of a run; Missing if it was not made."""
    if found := figures(claim, name):
        return found
    raise Missing


def values(names, key="NDCG@10", claim="adarec"):
    """`key` of those of the runs `names` that were made."""
    return np.array([run[key] for run in (figures(claim, name) for name in names) if run])


def mean(names):
    """Their mean NDCG@10; Missing if none was made."""
    if len(of := values(names)) == 0:
        raise Missing
    return of.mean()


def spread(of, form="{:.4f}"):
    """Mean, and of several values their standard deviation and number."""
    if len(of) == 0:
        return MISSING
    more = f" ({form.format(of.std(ddof=1))}; {len(of)})" if len(of) > 1 else " (1 seed)"
    return form.format(of.mean()) + more


def table(head, rows):
    """A table in Markdown; Missing if no run of it was made."""
    if not rows:
        raise Missing
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# ---- AdaRec ----------------------------------------------------------------------------------------------

# on ml-1m these learnt from an earlier run of the same teacher
FIRST_TAUGHT = "ml-1m-emd-0", "ml-1m-one-to-one-0"
FIRST_TEACHER = "tried/ml-1m-teacher-of-seed-0"
SPEED = "ms_per_user", "ms_per_1000_users"


def students(scene, name):
    """Test NDCG@10 of the students `name` of a scene, over seeds."""
    return values(f"{scene}-{name}-{seed}" for seed in range(3))


def share(scene, name):
    """How much of their teacher's accuracy the students have."""
    runs = [run for seed in range(3) if figures("adarec", run := f"{scene}-{name}-{seed}")]
    taught = [FIRST_TEACHER if run in FIRST_TAUGHT else f"{scene}-teacher" for run in runs]
    tops = [made(name)["NDCG@10"] for name in taught]
    return f"{np.mean(values(runs) / tops):.1%}" if runs else ""


def teacher(scene):
    """What the teacher is, and its accuracy."""
    blocks, dim = (
        re.search(rf"--{name} (\d+)", SCENES[scene]["teacher"]).group(1) for name in ("blocks", "dim")
    )
    return f"{blocks} blocks of {dim}: {made(f'{scene}-teacher')['NDCG@10']:.4f}"


def trained(name, bold=""):
    """Of each scene, accuracy of the students `name`, and as a share of their teacher's."""

    def show(scene):
        of = students(scene, name)
        return f"{spread(of)}, {bold}{share(scene, name)}{bold}" if len(of) else ""

    return show


def of_students(data, name, key="NDCG@10"):
    """`key` of the students `name` of today, over seeds."""
    return values((f"{data}-{name}-{seed}" for seed in range(3)), key, "students")


def front():
    """AdaRec's students of today on three data sets."""

    def teacher_of(data):
        blocks = re.search(r"--blocks (\d+)", SETS[data]["teacher"])[1]
        return f"{made(f'{data}-teacher', 'students')['NDCG@10']:.4f} ({blocks} blocks, 128 wide)"

    def accuracy(name):
        def show(data):
            found = of_students(data, name)
            share = found / made(f"{data}-teacher", "students")["NDCG@10"]
            return f"{spread(found)}, **{share.mean():.1%}**" if len(found) else "–"

        return show

    def p(data):
        runs = {name: [figures("students", f"{data}-64-{name}-{s}") for s in range(3)] for name in KIND}
        pairs = [pair for pair in zip(*runs.values(), strict=True) if all(pair)]
        if not pairs:
            return "–"
        gap = np.mean([gains(one["ranks"], 10) - gains(two["ranks"], 10) for one, two in pairs], 0)
        return f"{stats.ttest_1samp(gap, 0).pvalue:.0e}"

    def faster(keys):
        def show(data):
            found = figures("students", f"{data}-latency").get("models")
            return "; ".join(f"{found[0][k] / found[1][k]:.1f}x" for k in keys) if found else "–"

        return show

    KIND = "taught", "alone"
    compiled = [f"{key}_compiled" for key in SPEED]
    rows = {"teacher": teacher_of, "student, 64 wide, distilled": accuracy("64-taught")}
    rows |= {"the same student, alone": accuracy("64-alone"), "p, distilled against alone": p}
    rows |= {"student, 128 wide, distilled": accuracy("128-taught")}
    rows |= {"student, 32 wide, distilled": accuracy("32-taught")}
    rows |= {"operations of the students' cells": lambda data: f"`{better_search(data)}`"}
    rows |= {"64 wide: multiply-adds, fewer": faster(["macs"])}
    rows |= {"64 wide, compiled: faster for one request; in batches": faster(compiled)}
    return table(["", *SETS], [[what, *map(show, SETS)] for what, show in rows.items()])


def serving():
    """How much faster students of three widths are than their teachers, as a service runs them."""
    names = {"ml-1m": "ml-1m, users as they are", "ml-1m-long": "ml-1m, 200 items each"}
    names |= {"games": "games, 50 items at most", "beauty5": "Beauty 5-core, 50 at most"}
    keys, rows = ("macs", *SPEED, *(f"{key}_compiled" for key in SPEED)), []
    for data, name in names.items():
        teacher, *found = made(data, "serving")["models"]
        for dim, student in zip((32, 64, 128), found, strict=True):
            ratios = [teacher[key] / student[key] for key in keys]
            rows.append([name, dim, *(f"{ratio:.{int(ratio < 20)}f}x" for ratio in ratios)])
    head = ["requests", "width", "multiply-adds, fewer", "eager: one", "batches of 256", "compiled: one"]
    return table([*head, "batches of 256"], rows)


def mappings():
    """Ways to match the layers of student and teacher."""
    ways = {"EMD": "emd", "one-to-one": "one-to-one", "last layer": "last", "alone": "none"}
    rows = [[what, *(trained(name)(data) for data in ("ml-1m", "games"))] for what, name in ways.items()]
    return table(["", "ml-1m", "games"], [["teacher", teacher("ml-1m"), teacher("games")], *rows])


def transfer():
    """Architectures of one scene trained on another, without a teacher, and architectures of chance."""
    rows, last = [], []
    for source in SCENES:
        row = [source]
        for scene in SCENES:
            name = f"search-{chosen(scene)}-alone" if source == scene else f"from-{source}"
            row.append(spread(values(f"{scene}-{name}-{seed}" for seed in range(2))))
        rows.append(row)
    row = ["random, of equal cost"]
    for scene in SCENES:
        own = mean(f"{scene}-search-{chosen(scene)}-alone-{seed}" for seed in range(2))
        chance = [mean(f"{scene}-chance{k}-{seed}" for seed in range(2)) for k in range(5)]
        chance = np.array(chance)  # an architecture is one value
        row.append(spread(chance))
        t = (own - chance.mean()) / chance.std(ddof=1) / math.sqrt(1 + 1 / len(chance))
        last.append(f"{(own > chance).sum()} of {len(chance)}, p {stats.t.sf(t, len(chance) - 1):.2f}")
    rows += [row, ["the searched one is better than", *last]]
    return table(["architecture of \\ trained on", *SCENES], rows)


def planted():
    """Which operations the searches of each planted lag found, and how often."""
    rows = []
    for lag in (2, 4, 6):
        found = Counter(made(f"lag-{lag}-{seed}", "planted")["edges"] for seed in range(10))
        rows.append([f"`lag {lag}`", ", ".join(f"`{name}` {n}" for name, n in found.most_common())])
    return table(["data", "operations found"], rows)


# ---- Bidirectional distillation --------------------------------------------------------------------------


def p_value(runs, alone, kind, k):
    """That going on alone is as good, by a paired t-test of users' NDCG@k, means of seeds; "" if unknown."""
    pairs = [(runs[s][kind], alone[s][kind]) for s in runs.keys() & alone.keys()]
    if not pairs or runs is alone or not all("ranks" in one for one in itertools.chain(*pairs)):
        return ""
    gap = np.mean([gains(one["ranks"], k) - gains(other["ranks"], k) for one, other in pairs], 0)
    return f"{stats.ttest_1samp(gap, 0).pvalue:.0e}" if gap.any() else "1"


def of_seeds(name):
    """The JSON of three seeds, empty where a run was not made."""
    return [figures("bidirectional", f"{name}-{seed}") for seed in range(3)]


def bidirectional(base, k, ways):
    """Rows of HR@k / NDCG@k of both models, their p-values; for the notebooks' data also as these count, and
    for the others validation NDCG@10 of the last epoch, as the best is often none. Each way is compared with
    `alone`, and a student that has a decay beside its teacher with one that has it alone.
    """
    notebooks, rows, found = k == 50, [], {}
    for how in ways:
        found[how] = {s: run for s, run in enumerate(of_seeds(f"{base}-{how}")) if "student" in run}
        if not found[how]:
            continue
        row = [f"{how} ({len(found[how])})" if notebooks else f"{base}, {how} ({len(found[how])})"]
        for kind in KINDS:
            if how.startswith("alone-decay") and kind == "teacher":  # the same student, without a decay
                row += [""] * 3
                continue
            of = [run[kind] for run in found[how].values()]
            mean = lambda key, of=of: f"{np.mean([one[key] for one in of]):.4f}"  # noqa: E731
            row.append(f"{mean(f'HR@{k}')} / {mean(f'NDCG@{k}')}")
            if notebooks:
                row.append(f"{mean(f'published HR@{k}')} / {mean(f'published NDCG@{k}')}")
            decayed = how.startswith("published-decay") and kind == "student"
            beside = how.replace("published", "alone") if decayed else "alone"
            row.append(p_value(found[how], found.get(beside, {}), kind, k))
            if not notebooks:
                row.append(mean("valid last"))
        rows.append(row)
    return rows


def pair():
    """Both bases' teacher and student before, alone, and with bidirectional distillation, in short."""
    drawn = {"bpr": "published", "cdae": "published-uniform"}  # as published, whose negatives differ
    ways = {"before": "start", "alone": "alone", "BD, the paper's sign": "paper", "BD as published": "{}"}
    ways |= {"the same, every label 1/2": "{}-half", "the same, τ 10": "{}-tau-10"}
    rows = []
    for base, kind in itertools.product(drawn, KINDS):
        rows.append([f"{base.upper()}, {kind}"])
        for way in ways.values():
            runs = of_seeds(f"{base}-{way.format(drawn[base])}")
            found = np.array([run[kind]["NDCG@50"] for run in runs if run])
            rows[-1].append(spread(found))
    return table(["citeulike, NDCG@50", *ways], rows)


def notebooks(base, ways):
    """The table of the published notebooks, and its controls."""
    head = [name for kind in KINDS for name in (kind, f"{kind}, as published", "p")]
    return table(["", *head], bidirectional(base, 50, ways))


def in_words(base, ways):
    """HR@50 / NDCG@50 of both models by way, with the words for each."""
    rows = bidirectional(base, 50, ways)
    if len(rows) < len(ways):
        raise Missing
    rows = [
        [words, *row[1::2][:1], row[3], row[4], row[6]]
        for words, row in zip(ways.values(), rows, strict=True)
    ]
    return table([f"{base.upper()}, citeulike", "teacher", "p", "student", "p"], rows)


def bpr():
    """BPR's way as published, and its controls."""
    ways = {"start": "before", "alone": "alone", "published": "BD as published"}
    ways |= {"published-half": "the same, every label 1/2", "published-lambda-0": "the same without L_BD"}
    ways |= {
        "published-uniform": "the same, uniform negatives",
        "paper": "the paper's sign, uniform negatives",
    }
    return in_words("bpr", ways)


def cdae_chief():
    """CDAE's way as published, softer labels, and labels that say nothing."""
    ways = {"start": "before", "alone": "alone", "published-uniform": "BD as published"}
    ways |= {"published-uniform-tau-10": "the same, temperature 10"}
    ways |= {"published-uniform-half": "the same, every label 1/2"}
    return in_words("cdae", ways)


def bpr_more():
    """All ways that BPR went."""
    return notebooks("bpr", ["start", *TOGETHER, *DECAYED])


def cdae():
    """The same of CDAE."""
    return notebooks("cdae", ["start", "early", *TOGETHER, *DECAYED_BOTH])


def temperatures():
    """CDAE's gains over going on alone, by temperature: in validation NDCG@10, on which it is chosen, and in
    NDCG@50; p that there is none of the latter, and p that labels of 1/2 are as good.
    """
    ways = {"alone": "alone", "2": "published-uniform", "10": "published-uniform-tau-10"}
    ways["∞: labels of 1/2"] = "published-uniform-half"
    of = {tau: of_seeds(f"cdae-{way}") for tau, way in ways.items()}
    if not all(itertools.chain(*of.values())):
        raise Missing
    of, rows = {tau: dict(enumerate(runs)) for tau, runs in of.items()}, []
    for tau in list(of)[1:]:
        rows.append([tau])
        for kind in KINDS:
            for key in "valid", "NDCG@50":
                ours, alone = (sum(run[kind][key] for run in of[way].values()) for way in (tau, "alone"))
                rows[-1].append(f"{ours / alone - 1:+.1%}")
            rows[-1] += [p_value(of[tau], of[other], kind, 50) for other in ("alone", "∞: labels of 1/2")]
    head = [name for kind in KINDS for name in (f"{kind}, validation", "test", "p", "p against 1/2")]
    return table(["τ", *head], rows)


def pairs():
    """Two sizes of SASRec that go on together."""
    head = [name for kind in KINDS for name in (kind, "p", "at the end")]
    return table(["", *head], [row for scene in PAIRS for row in bidirectional(scene, 10, SEQUENCES)])


# ---- The teacher, beta, speed, scale, and the published code -----------------------------------------------

PUBLISHED_FIGURES = {
    "ml-1m": ("", 0.3152, 0.1821),
    "beauty": ("", 0.0533, 0.0327),
    "games": ("sampled ", 0.741, 0.536),
}
DEVIATIONS = {
    "leak": "convolutions and pools pad on both sides",
    "rate": "`alpha` learns at 2e-5",
    "kl": "KL summed over 50 positions and turned round",
    "cost": "costs 0.57, 2.13 and 0.48, beta 8",
    "history": "the validation item is missing in the test input",
}


def teachers():
    """SASRec beside published figures: SASRec's own for games, arXiv 2309.07602's for the others."""
    of = {
        f"`{name}`: `{how}`": ("teacher", [f"{name}-{s}" for s in range(3)]) for name, how in TEACHERS.items()
    }
    of |= {"`beauty-forward` of `run.py related`": ("related", [f"beauty-forward-{s}" for s in range(3)])}
    rows = []
    for what, (claim, names) in of.items():
        kind, *published = next(of for data, of in PUBLISHED_FIGURES.items() if names[0].startswith(data))
        hr, ndcg = (values(names, f"{kind}{key}@10", claim) for key in ("HR", "NDCG"))
        if len(hr):
            rows.append([what, spread(hr), published[0], spread(ndcg), published[1]])
    return table(["", "HR@10", "published", "NDCG@10", "published"], rows)


def betas():
    """What the cost loss trades: size and accuracy of the architectures found on games."""
    rows = []
    for beta in BETAS:
        runs = [name for seed in range(2) if figures("cost", name := f"games-{beta}-{seed}")]
        if runs:
            found = ", ".join(f"`{figures('cost', name)['edges']}`" for name in runs)
            alone = spread(values((f"games-{beta}-alone-{seed}" for seed in range(2)), claim="cost"))
            rows.append([beta, found, spread(values(runs, "cost", "cost"), "{:.3f}"), alone])
    return table(["beta", "operations found", "cost", "NDCG@10"], rows)


def speeds():
    """Seconds of an epoch of ours and of the other side."""
    rows = []
    for name in dict(speed()):
        if run := figures("speed", name):
            ours, other = np.median(run["seconds_of_epoch"], 0)
            rows.append([name, f"{ours:.2f} s", f"{other:.2f} s", f"{other / ours:.2f}x"])
    return table(["", "ours", "other", "ratio"], rows)


def scripts():
    """Two processes against one, and the cost of a checkpoint."""
    rows = []
    for name in dict(processes()):
        if run := figures("processes", name):
            one, two = np.median(run["seconds_of_epoch"], 0)
            share = run["checkpoint_seconds"] / one
            rows.append([f"`{name}.py`", f"{one:.1f} s", f"{two:.1f} s", f"{one / two:.2f}x", f"{share:.2%}"])
    return table(["an epoch of ml-1m", "one process", "two", "faster", "a checkpoint costs"], rows)


def scale():
    """Seconds and peak memory of large logs and catalogues."""
    found = {}
    for row in made("table", "scale"):
        size = row["interactions"], row["items"]
        found.setdefault(size, {})[row["what"]] = f"{row['seconds']:.0f} s, {row['MiB'] / 1024:.1f} GiB"
    head = list(dict.fromkeys(what for of in found.values() for what in of))
    rows = [
        [*map("{:,}".format, size), *(found[size].get(what, "") for what in head)] for size in sorted(found)
    ]
    return table(["interactions", "items", *(f"`{what}`" for what in head)], rows)


def deviations():
    """Test NDCG@10 of the demo's student with each deviation of the published code put back."""
    here = {"teacher": "teacher", "alone": "student, alone", "student": "student, distilled, no deviation"}
    rows = [
        [what, spread(values((f"{n}-{seed}" for seed in range(3)), claim="demo"))] for n, what in here.items()
    ]
    for name, what in DEVIATIONS.items():
        rows.append(
            [f"{what} (`{name}`)", spread(values((f"{name}-{s}" for s in range(3)), claim="published"))]
        )
    return table(["ml-100k, the demo", "NDCG@10"], rows)


def neighbours(names):
    """NDCG@10 of runs of related/, and of users with short histories where it was measured."""
    keys = ["NDCG@10", *(f"NDCG@10 to {most}" for most in (5, 10, 20))]
    runs = {name: [run for s in range(3) if (run := figures("related", f"{name}-{s}"))] for name in names}
    runs = {name: found for name, found in runs.items() if found}
    if not runs:
        raise Missing
    keys = [key for key in keys if key in next(iter(runs.values()))[0]]
    rows = [
        [
            f"`{name.removeprefix('beauty-')}`",
            *(spread(np.array([run[key] for run in found])) for key in keys),
        ]
        for name, found in runs.items()
    ]
    return table(["", *(key.replace("NDCG@10 to", "history of at most") for key in keys)], rows)


def neighbours_distil():
    """Ways to distil, on ml-100k."""
    return neighbours(["four", *WAYS, "emd"])


def neighbours_domain():
    """From one domain to another, on ml-100k."""
    return neighbours(["source", *("-".join(["domain", *losses.split()]) for losses in LOSSES)])


def neighbours_beauty():
    """ASReP and DT4SR beside SASRec, on Beauty."""
    return neighbours([f"beauty-{name}" for name in ("forward", "dt4sr", *PRIOR, "backward-read")])


TABLES = (
    teachers,
    betas,
    speeds,
    scripts,
    scale,
    deviations,
    front,
    serving,
    mappings,
    transfer,
    planted,
    pair,
    bpr,
    bpr_more,
    cdae,
    cdae_chief,
    temperatures,
    pairs,
    neighbours_distil,
    neighbours_domain,
    neighbours_beauty,
)
TABLES = {table.__name__: table for table in TABLES}


def drawn(name):
    """A table; without the runs that it needs only a word."""
    try:
        return TABLES[name]()
    except Missing:
        return MISSING


def line_of(name, script):
    """The line of a top-level name, or of a method Class.method, of a script."""
    scope, line = ast.parse((ROOT / script).read_text()), None
    for part in name.split("."):
        scope = next(
            node
            for node in scope.body
            if part
            in [
                getattr(node, "name", None),
                *(t.id for t in getattr(node, "targets", ()) if hasattr(t, "id")),
            ]
        )
        line = scope.lineno
    return line


def filled(page):
    """The text of a page, each of its tables drawn anew, and its links to functions with their lines."""
    pattern = re.compile(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
    page = pattern.sub(lambda m: f"{m[1]}{drawn(m[2])}\n{m[3]}", page)
    links = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)")
    return links.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", page)


# ---- Pictures --------------------------------------------------------------------------------------------


COLOURS = "#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442"


def draw_scenes(plt):
    """Accuracy over multiply-adds and latency: teacher and students of each data set, one mark per seed."""
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.4), layout="constrained", sharey="col")
    kinds = {"teacher": ("teacher", "s"), "128-taught": ("student 128 wide, distilled", "^")}
    kinds |= {
        "64-taught": ("64 wide", "o"),
        "32-taught": ("32 wide", "D"),
        "64-alone": ("64 wide, alone", "v"),
    }
    for (above, below), data in zip(axes.T, SETS, strict=True):
        top = made(f"{data}-teacher", "students")["NDCG@10"]
        latency = {m["model"].split(f"{data}-")[1]: m for m in made(f"{data}-latency", "students")["models"]}
        for (name, (label, marker)), colour in zip(kinds.items(), COLOURS, strict=False):
            runs = (
                [f"{data}-teacher"] if name == "teacher" else [f"{data}-{name}-{seed}" for seed in range(3)]
            )
            look = {"color": colour, "label": label, "ms": 7, "mec": "white", "mew": 0.6}
            y = values(runs, claim="students")
            above.plot(values(runs, "macs", "students") / 1e6, y, marker, **look)
            file = "teacher.pt2" if name == "teacher" else f"{name.split('-')[0]}-untrained.pt2"
            if len(y) and file in latency:
                below.plot(latency[file]["ms_per_1000_users_compiled"], y.mean(), marker, **look)
        for axis in (above, below):
            axis.axhline(top, color="#000000", lw=0.8, ls=":")
            axis.set(xscale="log", ylim=(0.8 * top, 1.06 * top))
            axis.minorticks_off()
        above.set(title=data, xlabel="million multiply-adds", xlim=(0.05, 500))
        below.set(xlabel="ms for 1,000 users, compiled", xlim=(10, 20_000))
    for axis in axes[:, 0]:
        axis.set_ylabel("test NDCG@10")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_cells(plt):
    """The cells that the search found in each scene, as graphs: node 0 is the input."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 1.7), layout="constrained")
    for axis, scene in zip(axes, SCENES, strict=True):
        found = made(f"{scene}-search-{chosen(scene)}")["edges"]
        for j, row in enumerate(found.split(";"), 1):
            for i, name in enumerate(row.split(",")):
                bend, high = ("arc3,rad=-0.5", 0.42) if j - i > 1 else ("arc3", 0.07)
                arrow = {"arrowstyle": "-|>", "connectionstyle": bend, "shrinkA": 12, "shrinkB": 12}
                arrow |= {"color": "#999999" if name == "none" else "#0072B2"}
                axis.annotate("", (j, 0), (i, 0), arrowprops=arrow)
                axis.text((i + j) / 2, high, name, ha="center", va="bottom")
        for node in range(3):
            axis.text(node, 0, node, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
        axis.set(title=scene, xlim=(-0.3, 2.3), ylim=(-0.3, 0.8))
        axis.axis("off")
    return figure


def draw_search(plt):
    """softmax(alpha) of each edge, and the temperature, over the epochs of the demo's search."""
    alpha = np.array(json.loads(made("search-0", "demo")["alpha"]))  # [epochs, E, |O|]
    p = np.exp(alpha) / np.exp(alpha).sum(-1, keepdims=True)
    figure, axes = plt.subplots(1, p.shape[1], figsize=(9, 2.6), layout="constrained", sharey=True)
    for axis, edge, name in zip(axes, p.swapaxes(0, 1), ("0 to 1", "0 to 2", "1 to 2"), strict=True):
        for operation, colour, y in zip(OPERATIONS, COLOURS, edge.T, strict=True):
            axis.plot(np.arange(1, len(y) + 1), y, color=colour, label=operation, lw=1.4)
        tau = 0.8 ** (np.arange(len(edge)) // 5)
        axis.plot(np.arange(1, len(edge) + 1), tau, color="#000000", ls=":", lw=1, label="tau")
        axis.set(title=f"edge {name}", xlabel="epoch")
    axes[0].set_ylabel("softmax(alpha)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def draw_flow(plt):
    """How much of the flow goes between which layers, over the epochs; four blocks teach two."""
    flow = np.array(json.loads(made("emd-0", "related")["flow"]))  # [epochs, L_S, L_T]
    figure, axis = plt.subplots(figsize=(6, 1.8), layout="constrained")
    image = axis.imshow(flow.reshape(len(flow), -1).T, aspect="auto", cmap="cividis", vmin=0)
    pairs = [f"student {i + 1}, teacher {j + 1}" for i, j in np.ndindex(flow.shape[1:])]
    axis.set(yticks=range(len(pairs)), yticklabels=pairs, xlabel="epoch", title="flow F between layers")
    figure.colorbar(image)
    return figure


def draw_bidirectional(plt):
    """Validation NDCG@10 over the epochs in which a pair of SASRec on ml-1m goes on; mean of 3 seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        ways = (
            "alone",
            "paper",
            "published-uniform",
            "paper-gentle",
            "top",
            "top-gentle",
            "sampled-uniform",
            "paper-half",
        )
        for how, colour in zip(ways, COLOURS, strict=False):
            runs = [made(f"ml-1m-{how}-{seed}", "bidirectional") for seed in range(3)]
            axis.plot(
                np.mean([json.loads(run[kind]["validation"]) for run in runs], 0), color=colour, label=how
            )
        axis.set(title=kind, xlabel="epoch")
    axes[0].set_ylabel("validation NDCG@10")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", frameon=False)
    return figure


def draw_scale(plt):
    """Seconds and peak memory over interactions, with 100,000 items, and over items, with 5 million."""
    rows = [row for row in made("table", "scale") if row["what"] in ("sasrec_teacher", "evaluate")]
    if not rows:
        raise Missing
    figure, axes = plt.subplots(1, 4, figsize=(10, 2.5), layout="constrained")
    for n, (key, fixed, value) in enumerate(
        (("interactions", "items", 10**5), ("items", "interactions", 5 * 10**6))
    ):
        for what, colour, marker in (("sasrec_teacher", "#0072B2", "o"), ("evaluate", "#E69F00", "v")):
            some = sorted(
                (row[key], row["seconds"], row["MiB"])
                for row in rows
                if row["what"] == what and row[fixed] == value
            )
            x, seconds, memory = zip(*some, strict=True)
            axes[2 * n].plot(x, seconds, marker=marker, color=colour, label=what)
            axes[2 * n + 1].plot(x, memory, marker=marker, color=colour, label=what)
        for axis, name in zip(axes[2 * n : 2 * n + 2], ("seconds", "peak MiB"), strict=True):
            axis.set(title=name, xlabel=key, xscale="log", yscale="log")
    axes[0].legend(frameon=False)
    return figure


PICTURES = {"scenes": draw_scenes, "cells": draw_cells, "search": draw_search, "flow": draw_flow}
PICTURES |= {"bidirectional": draw_bidirectional, "scale": draw_scale}


def main():
    """Draw all."""
    for page in PAGES:
        text = page.read_text()
        if (new := filled(text)) != text:
            page.write_text(new)
            print(f"{page.relative_to(ROOT)}: tables drawn")
    try:
        import matplotlib
    except ImportError:
        sys.exit("no matplotlib: the pictures stay as they are (pip install -r requirements-figures.txt)")
    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.hashsalt": "results",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    from matplotlib import pyplot as plt

    for name, draw in PICTURES.items():
        path = RUNS.parent / "pictures" / f"{name}.svg"
        path.parent.mkdir(exist_ok=True)
        try:
            draw(plt).savefig(path, metadata={"Date": None})
            print(path.relative_to(ROOT))
        except Missing:
            print(f"{path.relative_to(ROOT)}: {MISSING}")


if __name__ == "__main__":
    main()
