"""Draw the tables and pictures of README.md and results/*.md from the JSON of results/runs alone.

    python results/draw.py     # the pictures where matplotlib is (requirements-figures.txt)

A table stands between `<!-- table NAME -->` and `<!-- end -->`, drawn by the function NAME. `0.16 (0.01; 3)`
are the mean, the standard deviation and the number of seeds.
"""

import ast
import json
import re
import sys
from collections import Counter

import numpy as np
from run import KINDS, ROOT, RUNS, figures, gains, runs_of
from scipy import stats

sys.path.append(str(ROOT))
from adarec_search import OPERATIONS  # noqa: E402

PAGES = ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))
MISSING = "not run"
SETS = {"ml-1m": "ml-1m", "games": "games", "beauty5": "Beauty 5-core"}
SPEED = "ms_per_user", "ms_per_1000_users"


class Missing(Exception):
    """A run that a table or a picture needs was not made."""


def made(claim, name):
    """The JSON of a run; Missing if it was not made."""
    if found := figures(claim, name):
        return found
    raise Missing


def seeds(claim, name, number=3):
    """The JSON of the runs NAME-0, NAME-1 and so on that were made."""
    return [run for seed in range(number) if (run := figures(claim, f"{name}-{seed}"))]


def values(claim, name, key="NDCG@10", number=3):
    """`key` of the runs NAME-0, NAME-1 and so on that were made."""
    return np.array([run[key] for run in seeds(claim, name, number)])


def spread(numbers, form="{:.4f}"):
    """Mean, and of several numbers their standard deviation and number."""
    if len(numbers) == 0:
        return MISSING
    more = f" ({form.format(np.std(numbers, ddof=1))}; {len(numbers)})" if len(numbers) > 1 else " (1 seed)"
    return form.format(np.mean(numbers)) + more


def table(head, rows):
    """A table in Markdown; Missing if no run of it was made."""
    if not rows or all(MISSING in cell or not cell for row in rows for cell in map(str, row[1:])):
        raise Missing
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
    return re.sub(r"(\d)%", r"\1 %", text)


def p_value(ranks, other, k=10):
    """p that both are equally good: a paired t-test over users of NDCG@k, means of the seeds that both have.

    `ranks` and `other` have a string of ranks for each seed. "" if they are the same or share no seed.
    """
    pairs = [(gains(ranks[seed], k), gains(other[seed], k)) for seed in sorted(ranks.keys() & other.keys())]
    if not pairs or ranks == other:
        return ""
    gap = np.mean([one - two for one, two in pairs], 0)
    p = stats.ttest_1samp(gap, 0).pvalue if gap.any() else 1
    return f"{p:.0e}" if p < 0.01 else f"{p:.1g}"


def ranks_of(claim, name, number=3):
    """The ranks of the runs NAME-0, NAME-1 and so on, by seed."""
    found = {seed: figures(claim, f"{name}-{seed}").get("ranks") for seed in range(number)}
    return {seed: ranks for seed, ranks in found.items() if ranks}


# ---- AdaRec ----------------------------------------------------------------------------------------------


WIDTH = {"ml-1m": 128, "games": 64, "beauty5": 64}  # of the students
TAUGHT, ALONE = "students/{}-{}-taught", "students/{}-{}-alone"
# with 6 epochs; with 8 epochs and all items in the softmax
ALONE_OTHERWISE = "students/{}-from-with", "ways/{}-alone"


def teacher_of(data):
    """The teacher's NDCG@10."""
    return f"{made('students', f'{data}-teacher')['NDCG@10']:.4f}"


def accuracy(*names):
    """A function of a data set: the best of the runs CLAIM/NAME, and its share of the teacher."""

    def show(data):
        found = [values(*name.format(data, WIDTH[data]).split("/")) for name in names]
        best = max(found, key=lambda numbers: np.mean(numbers) if len(numbers) else 0)
        return f"{spread(best)}, **{np.mean(best) / float(teacher_of(data)):.1%}**" if len(best) else "–"

    return show


def faster(*keys):
    """A function of a data set: how many times lower `keys` of the student are than the teacher's."""

    def show(data):
        models = made("students", f"{data}-latency")["models"]
        student = models[[64, 128].index(WIDTH[data]) + 1]  # after the teacher
        return "; ".join(f"{models[0][key] / student[key]:.1f}x" for key in keys)

    return show


def findings():
    """The README's table: the first lines of `front`, with shares of the teacher alone."""
    names = "", "MovieLens-1M", "Amazon Games", "Amazon Beauty"
    rows = re.sub(r"[\d.]+ \([^)]*\), \*\*([\d.]+ %)\*\*", r"\1", front()).splitlines()
    kept = [row for row in rows[2:] if not re.match(r"\| (width|p|a student|times faster)", row)]
    text = "\n".join(["| " + " | ".join(names) + " |", rows[1], *kept])
    text = text.replace("teacher, 128 wide", "NDCG@10 of the teacher").replace("trained with", "with")
    return re.sub(r"(student.*?)( found)? \|", r"\1: share of the teacher's NDCG@10 |", text)


def front():
    """AdaRec's students on three data sets: 128 wide on ml-1m, 64 wide on the others."""

    def against_alone(data):
        taught, alone = (ranks_of(*name.format(data, WIDTH[data]).split("/")) for name in (TAUGHT, ALONE))
        return p_value(taught, alone) or "–"

    def against_teacher(data):
        taught = ranks_of(*TAUGHT.format(data, WIDTH[data]).split("/"))
        return p_value(taught, dict.fromkeys(taught, made("students", f"{data}-teacher")["ranks"])) or "–"

    times = [f"{key}_compiled" for key in SPEED]
    rows = {"teacher, 128 wide": teacher_of, "width of the student": WIDTH.get}
    rows |= {"student, trained with the teacher": accuracy(TAUGHT), "p, against the teacher": against_teacher}
    rows |= {"the same student *alone*, same settings": accuracy(ALONE)}
    rows |= {"p, against the student with the teacher": against_alone}
    rows |= {"the same student *alone*, best settings found": accuracy(ALONE, *ALONE_OTHERWISE)}
    rows |= {"times fewer multiply-adds; parameters": faster("macs", "parameters")}
    rows |= {"times faster than the teacher: one request; batches": faster(*times)}
    rows |= {"a student 32 wide, with the teacher": accuracy("students/{}-32-taught")}
    return table(["", *SETS.values()], [[what, *map(show, SETS)] for what, show in rows.items()])


def serving():
    """How much faster students of three widths are than their teachers, as a service runs them."""
    names = {"ml-1m": "ml-1m, real histories (median 94)", "ml-1m-long": "ml-1m, 200 items each"}
    names |= {"games": "games, real histories, at most 50", "beauty5": "Beauty 5-core, real, at most 50"}
    keys, rows = ("macs", *SPEED, *(f"{key}_compiled" for key in SPEED)), []
    for data, name in names.items():
        teacher, *found = made("serving", data)["models"]
        for dim, student in zip((32, 64, 128), found, strict=True):
            ratios = [teacher[key] / student[key] for key in keys]
            rows.append([name, dim, *(f"{ratio:.{int(ratio < 20)}f}x" for ratio in ratios)])
    head = [
        "requests",
        "student width",
        "multiply-adds",
        "eager, 1",
        "eager, 256",
        "compiled, 1",
        "compiled, 256",
    ]
    return table(head, rows)


def random_runs(data):
    """NDCG@10 of the random architectures of a data set [k, 2 seeds], and their edges.

    An architecture that was drawn twice counts once.
    """
    found = [seeds("students", f"{data}-random{k}", 2) for k in range(14)]
    found = {runs[0]["edges"]: runs for runs in found if len(runs) == 2}
    return np.array([[run["NDCG@10"] for run in runs] for runs in found.values()]), list(found)


def alpha_score(data, edges):
    """The sum over edges of log softmax(alpha), for the operations of an architecture, after the search."""
    alpha = np.array(json.loads(made("students", f"{data}-search-with")["alpha"])[-1])
    log_p = alpha - np.log(np.exp(alpha).sum(-1, keepdims=True))
    chosen = re.split("[;,]", edges)
    return sum(row[list(OPERATIONS).index(name)] for row, name in zip(log_p, chosen, strict=True))


def architectures(idea=False):
    """What a search can gain: random architectures of one cost, the searched one, and what ranks them."""
    names = ["mean of random architectures", "deviation between them", "deviation between seeds"]
    names += ["the best of them", "the one of them that the supernet ranks first", "the searched one"]
    names += ["searched, idea 1", "searched, idea 2"]
    judges = "`alpha`", "the supernet", "the supernet, idea 1", "the supernet, idea 2"
    names += [f"rank correlation of NDCG@10 and {judge} (p)" for judge in judges]
    rows = {name: [] for name in names}
    for data in SETS:
        valid = [made("students", f"{data}-supernet{way}")["valid"] for way in ("", "-paths", "-held-out")]
        runs, edges = random_runs(data)
        ndcg, noise = runs.mean(1), np.sqrt(runs.var(1, ddof=1).mean())
        column = [f"{ndcg.mean():.4f}", f"{ndcg.std(ddof=1):.4f}", f"{noise:.4f}"]
        column += [f"{ndcg.max():.4f}, {ndcg.max() / ndcg.mean() - 1:+.1%}"]
        scores = [
            [alpha_score(data, one) for one in edges],
            *([judge[one] for one in edges] for judge in valid),
        ]
        found = [values("students", f"{data}-from-{how}", number=2) for how in ("with", "paths", "held-out")]
        for mean in (ndcg[np.argmax(scores[1])], *(pair.mean() for pair in found)):
            gain, beaten = mean / ndcg.mean() - 1, (mean > ndcg).sum()
            column.append(f"{mean:.4f}, {gain:+.1%}, above {beaten} of {len(ndcg)}")
        for score in scores:
            rho = stats.spearmanr(score, ndcg)
            column.append(f"{rho.statistic:.2f} ({rho.pvalue:.2f})")
        for cells, cell in zip(rows.values(), column, strict=True):
            cells.append(cell)
    shown = {name for name in rows if ("idea" in name) == idea}
    shown |= {"the searched one", "rank correlation of NDCG@10 and the supernet (p)"}  # in both tables
    rows = [[name, *cells] for name, cells in rows.items() if name in shown]
    return table(["alone, 6 epochs", *SETS.values()], rows)


def transfer():
    """Architectures that were searched on one data set, trained on another, without a teacher."""
    rows = []
    for source in SETS:
        names = [f"{data}-from-{'with' if data == source else source}" for data in SETS]
        rows.append([SETS[source], *(spread(values("students", name, number=2)) for name in names)])
    return table(["searched on ↓, trained on →", *SETS.values()], rows)


def planted():
    """Which operations the searches of each planted lag found, and how often."""
    rows = []
    for lag in (2, 4, 6):
        found = Counter(made("planted", f"lag-{lag}-{seed}")["edges"] for seed in range(10))
        rows.append([f"{lag} items back", ", ".join(f"`{name}` {n}" for name, n in found.most_common())])
    return table(["the next item depends on the item", "operations found"], rows)


def betas():
    """What the cost loss trades: size and accuracy of the architectures found on games."""
    rows = []
    for beta in ("0", "0.03", "0.1", "0.3", "1", "3"):
        found = ", ".join(f"`{run['edges']}`" for run in seeds("cost", f"games-{beta}", 2)) or MISSING
        cost = spread(values("cost", f"games-{beta}", "cost", 2), "{:.3f}")
        rows.append([beta, found, cost, spread(values("cost", f"games-{beta}-alone", number=2))])
    return table(["beta", "cells found, by seed", "cost", "NDCG@10"], rows)


# ---- Bidirectional distillation --------------------------------------------------------------------------

WAYS = {
    "start": "before",
    "early": "before, stopped after 110 to 150 epochs",
    "alone": "alone",
    "published": "BD, code for BPR",
    "published-half": "BD, code for BPR, labels of 1/2",
    "published-lambda-0": "no L_BD, negatives as in the code for BPR",
    "published-tau-10": "BD, code for BPR, temperature 10",
    "published-uniform": "BD, code for CDAE",
    "published-uniform-half": "BD, code for CDAE, labels of 1/2",
    "published-uniform-tau-10": "BD, code for CDAE, temperature 10",
    "paper": "BD, paper",
    "paper-half": "BD, paper, labels of 1/2",
    "top": "BD on the other model's 100 best items",
    "alone-knowing": "alone, negatives are never test items",
    "alone-decay-1e-2": "alone, student with weight decay 1e-2",
    "published-decay-1e-2": "BD, code for BPR, student with weight decay 1e-2",
    "alone-both-decay-1e-4": "alone, both with weight decay 1e-4",
    "alone-both-decay-1e-3": "alone, both with weight decay 1e-3",
    "alone-both-decay-1e-2": "alone, both with weight decay 1e-2",
}


def both_ranks(name, kind):
    """The ranks of the teachers or students of the runs NAME-0 and so on, by seed."""
    found = {seed: figures("bidirectional", f"{name}-{seed}") for seed in range(3)}
    return {seed: run[kind]["ranks"] for seed, run in found.items() if "student" in run}


def ways_of(base, k, ways, more=()):
    """A row for each way: HR@k / NDCG@k of both models, their p, and the figures `more` of each.

    A way is compared with `alone`. A student with a weight decay beside its teacher is compared with the same
    student alone.
    """
    rows = []
    for way in ways:
        runs = [run for run in seeds("bidirectional", f"{base}-{way}") if "student" in run]
        if not runs:
            raise Missing
        row = [f"{WAYS[way]} ({len(runs)})"]
        for kind in KINDS:
            if way.startswith("alone-decay") and kind == "teacher":  # its student has no decay
                row += [""] * (2 + len(more))
                continue
            keys = f"HR@{k}", f"NDCG@{k}", *more
            hr, ndcg, *others = (f"{np.mean([run[kind][key] for run in runs]):.4f}" for key in keys)
            decayed = way.startswith("published-decay") and kind == "student"
            baseline = way.replace("published", "alone") if decayed else "alone"
            p = p_value(both_ranks(f"{base}-{way}", kind), both_ranks(f"{base}-{baseline}", kind), k)
            row += [f"{hr} / {ndcg}", p, *others]
        rows.append(row)
    return rows


def in_short(base, *ways):
    """HR@50 / NDCG@50 of both models on citeulike."""
    return table([f"{base.upper()}, citeulike", "teacher", "p", "student", "p"], ways_of(base, 50, ways))


def ways_that_ran(base):
    """The ways of a base in the order of WAYS, as far as they were run."""
    names = {re.sub(r"-\d$", "", name) for name, _ in runs_of("bidirectional")}
    return [way for way in WAYS if f"{base}-{way}" in names]


def all_ways(base):
    """All ways of a base, and NDCG@50 as the published notebooks count it."""
    rows = ways_of(base, 50, ways_that_ran(base), ["published NDCG@50"])
    head = [name for kind in KINDS for name in (kind, "p", "NDCG@50, their count")]
    return table([f"{base.upper()}, citeulike", *head], rows)


def pairs():
    """Two sizes of SASRec that go on together: HR@10 / NDCG@10, and validation after the last epoch."""
    rows = []
    for data in ("ml-1m", "games"):
        ways = [way for way in ways_that_ran(data) if seeds("bidirectional", f"{data}-{way}")]
        rows += [[f"{data}, {row[0]}", *row[1:]] for row in ways_of(data, 10, ways, ["valid last"])]
    head = [name for kind in KINDS for name in (kind, "p", "at the end")]
    return table(["", *head], rows)


def temperatures():
    """CDAE's gains over going on alone, by temperature, and p that labels of 1/2 are as good."""
    rows, half = [], "published-uniform-half"
    for tau, way in {"2": half[:-5], "10": f"{half[:-5]}-tau-10", "∞: labels of 1/2": half}.items():
        rows.append([tau])
        for kind in KINDS:
            for key in ("valid", "NDCG@50"):
                both = (seeds("bidirectional", f"cdae-{name}") for name in (way, "alone"))
                ours, alone = (sum(run[kind][key] for run in runs) for runs in both)
                if not alone:
                    raise Missing
                rows[-1].append(f"{ours / alone - 1:+.1%}")
            ranks, *others = (both_ranks(f"cdae-{name}", kind) for name in (way, "alone", half))
            rows[-1] += [p_value(ranks, other, 50) for other in others]
    head = [name for kind in KINDS for name in (f"{kind}, validation", "test", "p", "p against 1/2")]
    return table(["temperature", *head], rows)


# ---- The teacher, speed, scale, the published code, the neighbours ----------------------------------------

TEACHERS = {  # what is compared, its runs, the protocol, and published HR@10 and NDCG@10
    "ml-1m": ("ml-1m-falling", "", 0.3152, 0.1821),
    "games, among 100 items": ("games-16-wide", "sampled ", 0.741, 0.536),
    "Beauty, BERT4Rec's file": ("beauty", "", 0.0533, 0.0327),
}
DEVIATIONS = {
    "leak": "padding on both sides",
    "rate": "learning rate 2e-5 for `alpha`",
    "kl": "KL divergence of scores: arguments swapped, summed over 50 positions",
    "cost": "the code's costs of operations, `beta` 8",
    "history": "the test input lacks the validation item",
}


def teachers():
    """SASRec beside published figures: SASRec's own for games, arXiv 2309.07602's for the others."""
    rows = []
    for what, (name, protocol, *published) in TEACHERS.items():
        hr, ndcg = (values("teacher", name, f"{protocol}{key}@10") for key in ("HR", "NDCG"))
        if len(hr):
            rows.append([what, spread(hr), published[0], spread(ndcg), published[1]])
    return table(["data", "HR@10", "published", "NDCG@10", "published"], rows)


def speeds():
    """Seconds of an epoch of ours and of the other side."""
    names = {"peer-games": "pmixer/SASRec.pytorch, games, histories of 50 items"}
    names |= {"peer-ml-1m": "the same, ml-1m, histories of 200 items"}
    names |= {"softmax": "our teacher, ml-1m; other: stores all scores"}
    names |= {"operations": "our search, ml-1m; other: operations one at a time"}
    rows = []
    for name, what in names.items():
        ours, other = np.median(made("speed", name)["seconds_of_epoch"], 0)
        rows.append([what, f"{ours:.2f} s", f"{other:.2f} s", f"{other / ours:.1f}x"])
    return table(["comparison", "ours", "other", "faster"], rows)


def scripts():
    """Two processes against one."""
    rows = []
    for name, _ in runs_of("processes"):
        one, two = np.median(made("processes", name)["seconds_of_epoch"], 0)
        rows.append([f"`{name}.py`", f"{one:.1f} s", f"{two:.1f} s", f"{one / two:.2f}x"])
    return table(["an epoch of ml-1m", "one process", "two", "faster"], rows)


def scale():
    """Seconds and peak memory of large logs and catalogues."""
    found = {}
    for row in made("scale", "table"):
        size = row["interactions"], row["items"]
        found.setdefault(size, {})[row["what"]] = f"{row['seconds']:.0f} s, {row['MiB'] / 1024:.1f} GiB"
    head = list(dict.fromkeys(what for cells in found.values() for what in cells))
    rows = [[*size, *(found[size].get(what, "") for what in head)] for size in sorted(found)]
    rows = [[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]
    return table(["interactions", "items", *(f"`{what}`" for what in head)], rows)


def deviations():
    """Test NDCG@10 of the demo's student with each deviation of the published code put back."""
    here = {"teacher": "teacher", "alone": "student, alone", "student": "student, distilled, no deviation"}
    rows = [[what, spread(values("demo", name))] for name, what in here.items()]
    rows += [[what, spread(values("published", name))] for name, what in DEVIATIONS.items()]
    return table(["ml-100k", "NDCG@10"], rows)


def ways():
    """Ways to distil: one teacher, one untrained student, the same epochs."""
    names = {"alone": "nothing else", "none": "scores and embeddings", "last": "these, and the last layer"}
    names |= {"one-to-one": "these, and layers one-to-one", "emd": "these, and layers by EMD (AdaRec)"}
    names |= {"dfa": "groups of layers, equal weights (DFA)", "statistics": "statistics of layers (AdaIN)"}
    names |= {"rrd": "order of the teacher's best items (RRD)"}
    rows = [[what] for what in names.values()]
    for data in ("beauty5", "games"):
        teacher, alone = float(teacher_of(data)), ranks_of("ways", f"{data}-alone")
        for row, name in zip(rows, names, strict=True):
            found = values("ways", f"{data}-{name}")
            share = f", **{np.mean(found) / teacher:.1%}**" if len(found) else ""
            row += [spread(found) + share, p_value(ranks_of("ways", f"{data}-{name}"), alone)]
    return table(["beside the next items, the student learns from", "Beauty 5-core", "p", "games", "p"], rows)


def taught():
    """Students on citeulike that go on from "before": HR@50 / NDCG@50 of seed 0; p against the row above."""
    rows = {"start": ["before"], "alone": ["alone"], "published-uniform": ["BD, code for CDAE"]}
    rows |= {"softmax": ["alone, with a softmax"], "rrd": ["RRD, with a softmax"]}
    for base in ("bpr", "cdae"):
        above = {}
        for name, row in rows.items():
            run = figures("ways", f"citeulike-{base}-{name}-0") or figures(
                "bidirectional", f"{base}-{name}-0"
            )
            ranks = {0: run.get("student", run)["ranks"]} if run else {}
            gain = gains(ranks[0], 50) if run else 0
            row.append(f"{np.mean(gain > 0):.4f} / {np.mean(gain):.4f}" if run else MISSING)
            row.append(p_value(ranks, above, 50) if name in ("published-uniform", "rrd") else "")
            above = ranks
    return table(["students, citeulike", "BPR", "p", "CDAE", "p"], list(rows.values()))


SAMPLED = {"sampled HR@5": "Recall@5", "sampled NDCG@5": "NDCG@5", "sampled MRR@101": "MRR"}


def neighbour(claim, *parts):
    """Published metrics, full ranking and short histories; p against the first row of each part."""
    rows = []
    for names in parts:
        baseline = ranks_of(claim, next(iter(names)))
        for name in filter(lambda name: seeds(claim, name), names):
            columns = [spread(values(claim, name, key)) for key in (*SAMPLED, "NDCG@10", "NDCG@10 to 5")]
            rows.append([names[name], *columns, p_value(ranks_of(claim, name), baseline)])
    head = ["", *SAMPLED.values(), "NDCG@10, all items", "NDCG@10, short histories", "p"]
    return table(head, rows)


def asrep():
    """ASReP and its parts on Beauty 5-core, with the loss of the paper and with a softmax."""
    names = {"sasrec": "SASRec", "long": "SASRec, 200 epochs", "backwards": "SASRec, trained backwards first"}
    names |= {"scratch": "SASRec, filled histories", "clean": "ASReP, clean order"}
    names |= {"published": "ASReP, published order: leaks test items"}
    softmax = {"sasrec-softmax-20": "*softmax:* SASRec", "sasrec-softmax-40": "SASRec, 40 epochs"}
    softmax |= {f"{order}-softmax": f"ASReP, {order} order" for order in ("clean", "published")}
    return neighbour("asrep", names, softmax)


def known():
    """How often the first generated item occurs in a training history together with another item."""
    orders, rows = {"clean": "clean order", "published": "published order"}, []
    made("asrep", "published-0")
    for key in made("asrep", "clean-0"):
        if key.startswith("together with "):
            cells = [f"{np.mean(values('asrep', name, key)):.1f}%" for name in orders]
            rows.append([key.removeprefix("together with "), *cells])
    return table(["together with the", *orders.values()], rows)


def dt4sr():
    """A product or a distance of Gaussians, under BPR and under a softmax."""
    ways, losses = {"dot": "dot product", "wasserstein": "distance"}, {"bpr": "BPR", "ce": "softmax"}
    details = {"": "", "elu-": ", ELU"}
    return neighbour(
        "dt4sr",
        *(
            {f"{more}{way}-{loss}": f"{ways[way]}, {losses[loss]}{details[more]}" for way in ways}
            for more in details
            for loss in losses
        ),
    )


def domains():
    """From one domain to another, on ml-100k."""
    names = {"source": "the teacher", "domain": "student: labels"}
    names |= {"domain-output": "student: labels and scores"}
    names |= {"domain-output-feature": "student: labels, scores and states"}
    names |= {"domain-output-pseudo": "student: labels, scores and pseudo labels"}
    names |= {"domain-output-feature-pseudo": "student: labels, scores, states and pseudo labels"}
    return table(["", "NDCG@10"], [[what, spread(values("related", name))] for name, what in names.items()])


AS_PUBLISHED = [f"published-uniform{more}" for more in ("", "-half", "-tau-10")]  # for CDAE
CONTROLS = "published", "published-half", "published-lambda-0", "paper"
TABLES = (findings, front, serving, architectures, transfer, planted, betas, pairs, temperatures, teachers)
TABLES += (speeds, scripts, scale, deviations, ways, taught, asrep, known, dt4sr, domains)
TABLES = {function.__name__: function for function in TABLES}
TABLES |= {"bpr": lambda: in_short("bpr", "start", "alone", *CONTROLS), "all_of_bpr": lambda: all_ways("bpr")}
TABLES |= {"cdae": lambda: in_short("cdae", "start", "alone", *AS_PUBLISHED)}
TABLES |= {"all_of_cdae": lambda: all_ways("cdae"), "ideas": lambda: architectures(idea=True)}


def drawn(name):
    """A table; without the runs that it needs only a word."""
    try:
        return TABLES[name]()
    except Missing:
        return MISSING


def line_of(name, script):
    """The line of a top-level name, or of a method Class.method, of a script."""
    scope = ast.parse((ROOT / script).read_text())
    for part in name.split("."):
        for node in scope.body:
            names = [getattr(target, "id", "") for target in getattr(node, "targets", ())]
            if part in [getattr(node, "name", ""), *names]:
                scope = node
                break
    return scope.lineno


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
    kinds |= {"64-taught": ("64 wide", "o"), "32-taught": ("32 wide", "D")}
    kinds |= {"128-alone": ("128 wide, alone", "<"), "64-alone": ("64 wide, alone", "v")}
    for (above, below), data in zip(axes.T, SETS, strict=True):
        top = made("students", f"{data}-teacher")
        models = made("students", f"{data}-latency")["models"]
        latency = {model["model"].split(f"{data}-")[1]: model[f"{SPEED[1]}_compiled"] for model in models}
        for (name, (label, marker)), colour in zip(kinds.items(), COLOURS, strict=False):
            runs = [top] if name == "teacher" else seeds("students", f"{data}-{name}")
            look = {"color": colour, "label": label, "ms": 7, "mec": "white", "mew": 0.6}
            y = np.array([run["NDCG@10"] for run in runs])
            above.plot([run["macs"] / 1e6 for run in runs], y, marker, **look)
            file = "teacher.pt2" if name == "teacher" else f"{name.split('-')[0]}-untrained.pt2"
            if len(y):
                below.plot(latency[file], y.mean(), marker, **look)
        for axis in (above, below):
            axis.axhline(top["NDCG@10"], color="#000000", lw=0.8, ls=":")
            axis.set(xscale="log", ylim=(0.8 * top["NDCG@10"], 1.06 * top["NDCG@10"]))
            axis.minorticks_off()
        above.set(title=SETS[data], xlabel="million multiply-adds", xlim=(0.05, 500))
        below.set(xlabel="ms for 1,000 users, compiled", xlim=(10, 20_000))
    for axis in axes[:, 0]:
        axis.set_ylabel("test NDCG@10")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_cells(plt):
    """The cells that the search found on each data set, as graphs: node 0 is the input."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 1.7), layout="constrained")
    for axis, data in zip(axes, SETS, strict=True):
        found = made("students", f"{data}-search-with")["edges"]
        for j, row in enumerate(found.split(";"), 1):
            for i, name in enumerate(row.split(",")):
                bend, high = ("arc3,rad=-0.5", 0.42) if j - i > 1 else ("arc3", 0.07)
                arrow = {"arrowstyle": "-|>", "connectionstyle": bend, "shrinkA": 12, "shrinkB": 12}
                arrow |= {"color": "#999999" if name == "none" else "#0072B2"}
                axis.annotate("", (j, 0), (i, 0), arrowprops=arrow)
                axis.text((i + j) / 2, high, name, ha="center", va="bottom")
        for node in range(3):
            axis.text(node, 0, node, ha="center", va="center", bbox={"boxstyle": "circle", "fc": "white"})
        axis.set(title=SETS[data], xlim=(-0.3, 2.3), ylim=(-0.3, 0.8))
        axis.axis("off")
    return figure


PICTURES = {"scenes": draw_scenes, "cells": draw_cells}


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
    matplotlib.rcParams |= {"svg.hashsalt": "results", "font.size": 9}
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}
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
