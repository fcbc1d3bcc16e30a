"""Figures in the sentences of the pages are those of the runs in results/runs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import draw  # noqa: E402

RUNS = ROOT / "results" / "runs"

MODELS = {data: draw.made("students", f"{data}-latency")["models"] for data in draw.SETS}
LONG, REAL = (draw.made("serving", data)["models"] for data in ("ml-1m-long", "ml-1m"))


def mean(claim, name, key="NDCG@10"):
    """The mean of the seeds of a run, as tables show it."""
    found = draw.values(claim, name, key)
    assert len(found), f"{claim}/{name} was not run"
    return round(found.mean(), 4)


def gain(claim, name, baseline, key="NDCG@10"):
    """How many percent a run is above another one of its claim."""
    return 100 * (mean(claim, name, key) / mean(claim, baseline, key) - 1)


def share(data, how):
    """Percent of the teacher's NDCG@10 that the students of a data set reach."""
    return 100 * mean("students", f"{data}-{draw.WIDTH[data]}-{how}") / float(draw.teacher_of(data))


def with_bd(base, way, kind, baseline="alone", key="NDCG@50"):
    """How many percent a model gains with BD."""
    ours, theirs = (
        round(np.mean([run[kind][key] for run in draw.seeds("bidirectional", f"{base}-{name}")]), 4)
        for name in (way, baseline)
    )
    return 100 * (ours / theirs - 1)


def faster(models, student, key):
    """How many times faster than the teacher a student is, compiled."""
    return models[0][f"{key}_compiled"] / models[student][f"{key}_compiled"]


def cheaper(data):
    """How many times fewer multiply-adds than its teacher the student of a data set needs."""
    student = [64, 128].index(draw.WIDTH[data]) + 1
    return MODELS[data][0]["macs"] / MODELS[data][student]["macs"]


def span(numbers):
    """The smallest and the largest of some numbers."""
    numbers = sorted(numbers)
    return numbers[0], numbers[-1]


def correlation(data):
    """Spearman's rho, and its p, of NDCG@10 and the supernet."""
    runs, edges = draw.random_runs(data)
    valid = draw.made("students", f"{data}-supernet")["valid"]
    return stats.spearmanr([valid[one] for one in edges], runs.mean(1))


def student_50(claim, name):
    """NDCG@50 of the student of a run on citeulike."""
    run = draw.made(claim, name)
    return round(draw.gains(run.get("student", run)["ranks"], 50).mean(), 4)


def softmax_above(name):
    """How many percent NDCG@50 the student alone with a softmax is above that of a run with BD; seed 0."""
    base = name.split("-")[0]
    return 100 * (student_50("ways", f"citeulike-{base}-softmax-0") / student_50("bidirectional", name) - 1)


BEST_ALONE = {
    data: 100 * mean("ways", f"{data}-alone") / float(draw.teacher_of(data)) for data in ("games", "beauty5")
}
BEST_ALONE["ml-1m"] = share("ml-1m", "alone")
SHARES = [share(data, "taught") for data in draw.SETS]
STUDENTS_FASTER = {
    key: [faster(MODELS[data], [64, 128].index(draw.WIDTH[data]) + 1, key) for data in draw.SETS]
    for key in draw.SPEED
}
BPR_WITH_L_BD = [way for way in draw.ways_that_ran("bpr") if way.startswith(("published", "paper"))]
BPR_WITH_L_BD = [way for way in BPR_WITH_L_BD if "lambda" not in way and "decay" not in way]
BPR_TEACHER, BPR_STUDENT = (
    [with_bd("bpr", way, kind) for way in BPR_WITH_L_BD] for kind in ("teacher", "student")
)
DEVIATIONS = {name: 100 * (mean("published", name) / mean("demo", "student") - 1) for name in draw.DEVIATIONS}
CDAE, TAU_10, HALF = draw.AS_PUBLISHED[0], draw.AS_PUBLISHED[2], draw.AS_PUBLISHED[1]
DECAY = "alone-decay-1e-2"
SEARCHED = draw.values("students", "games-from-with", number=2).mean()
RANDOM = draw.random_runs("games")[0].mean(1)  # of each architecture
RANDOM_RUNS = [draw.random_runs(data)[0].mean(1) for data in draw.SETS]
SOFTMAX_ABOVE_BD = [softmax_above(name) for name in ("bpr-published-0", "cdae-published-uniform-0")]
TEACHER, STUDENT, ON_ITS_OWN = draw.made("demo", "make-demo")["first"]
CHANGES = {
    "ranking_distill": gain("ways", "beauty5-rrd", "beauty5-alone"),
    "dfa_distill": gain("ways", "beauty5-dfa", "beauty5-alone"),
    "statistics_distill": gain("ways", "beauty5-statistics", "beauty5-alone"),
    "domain_distill": gain("related", "domain-output", "domain"),
    "dt4sr": gain("dt4sr", "wasserstein-bpr", "dot-bpr"),
    "asrep": gain("asrep", "clean", "sasrec"),
}
NEIGHBOURS = {  # what the list of the README says before the figure
    "ranking_distill": "best items: ",
    "dfa_distill": "groups of layers, without its search (too slow): ",
    "statistics_distill": "statistics of layers: ",
    "domain_distill": "teacher's scores give ",
    "dt4sr": "distances of Gaussians: ",
}

# page, a part of it with {} for each figure, the figures
SENTENCES = [
    ("README.md", "with {:.0f} to {:.0f} times fewer multiply-adds", span(map(cheaper, draw.SETS))),
    ("README.md", "have {:.0f} to {:.0f} % of their teachers' accuracy", span(SHARES)),
    ("README.md", "answer one request {:.0f} to {:.0f} times as fast", span(STUDENTS_FASTER["ms_per_user"])),
    (
        "results/README.md",
        "BERT4Rec's file: NDCG@10 is {:.4f}",
        [np.mean([run["NDCG@10"] for run in draw.seeds("teacher", "beauty")])],
    ),
    (
        "README.md",
        "students gain {:.0f} % (BPR, a matrix factorisation) and {:.0f} % (CDAE",
        [with_bd("bpr", "published", "student"), with_bd("cdae", CDAE, "student")],
    ),
    (
        "README.md",
        "has {:.0f} % on Games, {:.0f} % on Beauty, and {:.0f} % on MovieLens-1M",
        [BEST_ALONE[data] for data in ("games", "beauty5", "ml-1m")],
    ),
    (
        "README.md",
        "answer **{:.0f} to {:.0f} times** as fast as their teachers, in batches {:.0f} to {:.0f} times",
        [*span(STUDENTS_FASTER["ms_per_user"]), *span(STUDENTS_FASTER["ms_per_1000_users"])],
    ),
    (
        "README.md",
        "teachers lose {:.0f} and {:.0f} %",
        [-with_bd("bpr", "published", "teacher"), -with_bd("cdae", CDAE, "teacher")],
    ),
    ("README.md", "answers {:.0f} times as fast", [faster(LONG, 2, "ms_per_user")]),
    ("README.md", "it is {:.0f} times as fast", [faster(LONG, 2, "ms_per_1000_users")]),
    (
        "README.md",
        "128 wide is {:.0f} times as fast, in batches {:.0f} times",
        [faster(LONG, 3, key) for key in ("ms_per_user", "ms_per_1000_users")],
    ),
    *(
        ("README.md", f"{name}.patch) | {{:+.0f}} %", [DEVIATIONS[name]])
        for name in ("leak", "kl", "history", "cost")
    ),
    ("README.md", "--alpha-warm-up 0` | {:+.0f} %", [DEVIATIONS["rate"]]),
    (
        "README.md",
        "`--sign published` | BPR's student {:+.0f} %",
        [with_bd("bpr", "published-uniform", "student", "paper")],
    ),
    (
        "README.md",
        "`--negatives drawn` | BPR's student {:+.0f} %",
        [with_bd("bpr", "published", "student", "published-uniform")],
    ),
    ("results/README.md", "{:.0f}, {:.0f} and {:.0f} % of the teacher's NDCG@10", SHARES),
    (
        "results/README.md",
        "at best settings: {:.0f}, {:.0f} and {:.0f} % |",
        [BEST_ALONE[data] for data in ("ml-1m", "games", "beauty5")],
    ),
    (
        "results/README.md",
        "three students are {:.1f} to {:.1f} times as fast as their teachers on one request,",
        span(STUDENTS_FASTER["ms_per_user"]),
    ),
    (
        "results/README.md",
        "on one request, {:.0f} to {:.0f} times in batches",
        span(STUDENTS_FASTER["ms_per_1000_users"]),
    ),
    (
        "results/README.md",
        "lower our student's NDCG@10 by {:.0f} to {:.0f} %",
        span(-DEVIATIONS[name] for name in ("leak", "kl", "history")),
    ),
    ("results/README.md", "students {:+.0f} % (BPR)", [with_bd("bpr", "published", "student")]),
    ("results/README.md", "**BPR's student gains** {:.0f} to {:.0f} %", span(BPR_STUDENT)),
    ("results/README.md", "**BPR's teacher loses** {:.0f} to {:.0f} %", span(-gain for gain in BPR_TEACHER)),
    ("results/README.md", "**CDAE's student gains** {:.0f} %", [with_bd("cdae", CDAE, "student")]),
    (
        "results/README.md",
        "student and teacher gain {:.0f} and {:.0f} %",
        [with_bd("cdae", TAU_10, kind) for kind in ("student", "teacher")],
    ),
    (
        "results/README.md",
        "they gain {:.0f} and {:.0f} %",
        [with_bd("cdae", HALF, kind) for kind in ("student", "teacher")],
    ),
    (
        "results/scale.md",
        "one request {:.0f} times as fast as its compiled teacher",
        [faster(LONG, 2, "ms_per_user")],
    ),
    ("results/scale.md", "real histories of ml-1m, it is {:.0f} times", [faster(REAL, 2, "ms_per_user")]),
    (
        "results/related.md",
        "Recall@5 and NDCG@5 rise by {:.0f} and {:.0f} %",
        [gain("asrep", "published", "sasrec", f"sampled {key}@5") for key in ("HR", "NDCG")],
    ),
    (
        "results/related.md",
        "with 200 epochs, both rise by {:.0f} %.",
        [gain("asrep", "published", "long", "sampled HR@5")],
    ),
    (
        "results/related.md",
        "ASReP in the clean order lowers it by {:.0f} %",
        [-gain("asrep", "clean-softmax", "sasrec-softmax-20")],
    ),
    (
        "results/related.md",
        "Among 100 items, Recall@5 changes by {:+.0f} %",
        [gain("asrep", "scratch", "sasrec", "sampled HR@5")],
    ),
    (
        "results/related.md",
        "it is {:.0f} % above SASRec",
        [gain("asrep", "published-softmax", "sasrec-softmax-20")],
    ),
    (
        "results/related.md",
        "the leak shows again: Recall@5 is {:.0f} % higher",
        [gain("asrep", "published-softmax", "sasrec-softmax-20", "sampled HR@5")],
    ),
    (
        "results/related.md",
        "+4 % with equal weights (games {:+.0f} %)",
        [gain("ways", "games-dfa", "games-alone")],
    ),
    ("results/related.md", "-1 % (games {:.0f} %;", [gain("ways", "games-statistics", "games-alone")]),
    ("results/related.md", "+6 % (games {:+.0f} %)", [gain("ways", "games-rrd", "games-alone")]),
    (
        "results/related.md",
        "Under a softmax, the distance gains {:.0f} % (p 0.005",
        [gain("dt4sr", "elu-wasserstein-ce", "elu-dot-ce")],
    ),
    ("results/related.md", "longer training**: {:+.0f} %", [gain("asrep", "backwards", "sasrec")]),
    ("results/related.md", "with 200 epochs gains {:.0f} %", [gain("asrep", "long", "sasrec")]),
    (
        "results/related.md",
        "(baseline with 200 epochs: {:+.0f} %, {:+.0f} %)",
        [gain("asrep", name, "long") for name in ("clean", "published")],
    ),
    ("results/related.md", "harm by themselves**: {:+.0f} %", [gain("asrep", "scratch", "sasrec")]),
    # the student and its architecture
    ("results/README.md", "with {:.0f} to {:.0f} times fewer multiply-adds", span(map(cheaper, draw.SETS))),
    ("results/README.md", "found* {:.0f} % on ml-1m, {:.0f} % on games and {:.0f} % on Beauty", SHARES),
    (
        "results/README.md",
        "it adds {:.0f} % (games) and {:.0f} % (Beauty 5-core)",
        [gain("students", f"{data}-64-taught", f"{data}-64-alone") for data in ("games", "beauty5")],
    ),
    (
        "results/README.md",
        "student alone, it adds {:.0f} and {:.0f} %",
        [
            100 * (mean("students", f"{data}-64-taught") / mean("ways", f"{data}-alone") - 1)
            for data in ("games", "beauty5")
        ],
    ),
    (
        "results/README.md",
        "on both sides, the teacher adds {:.0f} and {:.0f} %",
        [gain("ways", f"{data}-emd", f"{data}-alone") for data in ("games", "beauty5")],
    ),
    (
        "results/README.md",
        "the other two are {:.0f} and {:.0f} % worse than its own",
        [-gain("students", f"games-from-{source}", "games-from-with") for source in ("ml-1m", "beauty5")],
    ),
    *(
        (page, "searched one is {:.1f} % above the mean", [100 * (SEARCHED / RANDOM.mean() - 1)])
        for page in ("README.md", "results/README.md")
    ),
    (
        "results/README.md",
        "runs of sections 2 and 3 took {:.0f} hours",
        [sum(json.loads(path.read_text())["seconds"] for path in RUNS.glob("students/*.json")) / 3600],
    ),
    (
        "results/README.md",
        "random architecture is only {:.0f} to {:.0f} % above the mean",
        span(100 * (runs.max() / runs.mean() - 1) for runs in RANDOM_RUNS),
    ),
    ("results/README.md", "on ml-1m, the correlation is {:.2f} (p {:.2f})", correlation("ml-1m")),
    ("results/README.md", "above {} of {} random ones", [(SEARCHED > RANDOM).sum(), len(RANDOM)]),
    # the demo
    (
        "README.md",
        "NDCG@10 is {:.0f} % above the teacher's",
        [100 * (STUDENT["NDCG@10"] / TEACHER["NDCG@10"] - 1)],
    ),
    (
        "README.md",
        "It is {:.0f} % above the student alone",
        [100 * (STUDENT["NDCG@10"] / ON_ITS_OWN["NDCG@10"] - 1)],
    ),
    ("README.md", "needs {:.0f} times fewer multiply-adds", [TEACHER["macs"] / STUDENT["macs"]]),
    ("README.md", "only {:.1f} times as fast", [STUDENT["ms_per_user_compiled_speed_up"]]),
    # the neighbours
    *(("README.md", f"{name}{{:+.0f}} %", [CHANGES[script]]) for script, name in NEIGHBOURS.items()),
    (
        "results/related.md",
        "{:+.0f} % in Recall@5 and NDCG@5, {:+.0f} % in NDCG@10",
        [gain("asrep", "clean", "sasrec", key) for key in ("sampled HR@5", "NDCG@10")],
    ),
    (
        "results/related.md",
        "SASRec is {:.0f} % above the paper's in Recall@5, and {:.0f} % in NDCG@5."
        " With 50 epochs, it is {:.0f} and {:.0f} % below",
        [
            sign * 100 * (mean("asrep", name, f"sampled {key}@5") / paper - 1)
            for name, sign in (("long", 1), ("sasrec", -1))
            for key, paper in (("HR", 0.3963), ("NDCG", 0.2949))
        ],
    ),
    *(
        (
            "results/related.md",
            f"{phrase} {{:.0f}} %",
            [gain("dt4sr", f"wasserstein-{loss}", f"dot-{loss}")],
        )
        for loss, phrase in (("bpr", "the distance gains"), ("ce", "It gains"))
    ),
    (
        "results/related.md",
        "loses {:.0f} % of Recall@5",
        [-gain("dt4sr", "wasserstein-ce", "dot-ce", "sampled HR@5")],
    ),
    ("results/related.md", "scores help**: {:+.0f} %", [gain("related", "domain-output", "domain")]),
    (
        "results/related.md",
        "scores is {:.0f} % better than the teacher",
        [gain("related", "domain-output", "source")],
    ),
    (
        "results/related.md",
        "{:+.0f} % against labels and scores, {:+.0f} % against labels, scores and states",
        [gain("related", f"domain-output{more}-pseudo", f"domain-output{more}") for more in ("", "-feature")],
    ),
    (
        "results/related.md",
        "NDCG@50 is {:.0f} % (BPR) and {:.0f} % (CDAE, p 1e-39) higher than in the row of BD."
        " For BPR, it is {:.0f} % higher than with the published",
        [
            softmax_above(name)
            for name in ("bpr-published-uniform-0", "cdae-published-uniform-0", "bpr-published-0")
        ],
    ),
    (
        "results/related.md",
        "CDAE's loses {:.0f} %.",
        [
            100
            - 100
            * student_50("ways", "citeulike-cdae-rrd-0")
            / student_50("ways", "citeulike-cdae-softmax-0")
        ],
    ),
    (
        "results/related.md",
        "their NDCG@50 is {:.4f} (BPR) and {:.4f} (CDAE)",
        [draw.made("bidirectional", f"{base}-start-0")["teacher"]["NDCG@50"] for base in ("bpr", "cdae")],
    ),
    (
        "results/README.md",
        "the students are {:.0f} % (BPR) and {:.0f} % (CDAE) above the published code",
        SOFTMAX_ABOVE_BD,
    ),
    (
        "README.md",
        "students are {:.0f} and {:.0f} % better than with BD (one seed)",
        SOFTMAX_ABOVE_BD,
    ),
    # AdaRec and BD
    (
        "results/README.md",
        "EMD {:.1f} %, last layer {:.1f} % (Beauty 5-core); {:.1f} and {:.1f} % (games)",
        [
            100 * draw.values("ways", f"{data}-{way}").mean() / float(draw.teacher_of(data))
            for data in ("beauty5", "games")
            for way in ("emd", "last")
        ],
    ),
    (
        "results/adarec.md",
        "up to {:.0f} times cheaper",
        [mean("cost", "games-0", "cost") / mean("cost", "games-3", "cost")],
    ),
    ("results/adarec.md", "alone is {:.0f} % above its teacher", [gain("demo", "alone", "teacher")]),
    ("results/adarec.md", "change it by {1:+.0f} and {0:+.0f} %", [DEVIATIONS["cost"], DEVIATIONS["rate"]]),
    (
        "results/bidirectional.md",
        "its NDCG@50 is {:.0f} to {:.0f} % lower",
        span(-gain for gain in BPR_TEACHER),
    ),
    ("results/bidirectional.md", "The student gains {:.0f} to {:.0f} %", span(BPR_STUDENT)),
    (
        "results/bidirectional.md",
        "the negatives only, it gains {:.0f} %",
        [with_bd("bpr", "published-lambda-0", "student")],
    ),
    (
        "results/bidirectional.md",
        "NDCG@50 is {:.0f} % higher than without",
        [with_bd("bpr", DECAY, "student")],
    ),
    ("results/bidirectional.md", "HR@50 is {:.0f} % lower", [-with_bd("bpr", DECAY, "student", key="HR@50")]),
    (
        "results/bidirectional.md",
        "gives {:+.0f} % NDCG@50 and {:+.0f} % HR@50",
        [with_bd("bpr", "published-decay-1e-2", "student", DECAY, f"{key}@50") for key in ("NDCG", "HR")],
    ),
]


@pytest.mark.parametrize("page, text, figures", SENTENCES, ids=[text for _, text, _ in SENTENCES])
def test_a_sentence_has_the_figures_of_its_runs(page, text, figures):
    sentence = text.format(*figures)
    assert sentence in " ".join((ROOT / page).read_text().split()), sentence


@pytest.mark.parametrize("script", CHANGES)
def test_a_row_of_the_neighbours_has_the_figure_of_its_runs(script):
    rows = (ROOT / "results" / "related.md").read_text().splitlines()
    (cells,) = (row.split(" | ") for row in rows if row.startswith(f"| `{script}.py`"))
    assert cells[3].startswith(f"{CHANGES[script]:+.0f} %")
