"""Figures in the sentences of the pages are those of the runs in results/runs."""

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import draw  # noqa: E402

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


SHARES = [share(data, "taught") for data in draw.SETS]
BPR_WITH_L_BD = [way for way in draw.ways_that_ran("bpr") if way.startswith(("published", "paper"))]
BPR_WITH_L_BD = [way for way in BPR_WITH_L_BD if "lambda" not in way and "decay" not in way]
BPR_TEACHER, BPR_STUDENT = (
    [with_bd("bpr", way, kind) for way in BPR_WITH_L_BD] for kind in ("teacher", "student")
)
DEVIATIONS = {name: 100 * (mean("published", name) / mean("demo", "student") - 1) for name in draw.DEVIATIONS}
CDAE, TAU_10, HALF = draw.AS_PUBLISHED[0], draw.AS_PUBLISHED[2], draw.AS_PUBLISHED[1]

# page, a part of it with {} for each figure, the figures
SENTENCES = [
    ("README.md", "need {:.0f} to {:.0f} times fewer multiply-adds", span(map(cheaper, draw.SETS))),
    ("README.md", "for {:.0f} to {:.0f} % of the teachers' accuracy", span(SHARES)),
    ("README.md", "beat this baseline by {:.0f} % (BPR) and", [with_bd("bpr", "published", "student")]),
    ("README.md", "and {:.0f} % (CDAE)", [with_bd("cdae", CDAE, "student")]),
    (
        "README.md",
        "below it by {:.0f} and {:.0f} %",
        [-with_bd("bpr", "published", "teacher"), -with_bd("cdae", CDAE, "teacher")],
    ),
    ("README.md", "answers **{:.0f} times** as fast", [faster(LONG, 2, "ms_per_user")]),
    ("README.md", "it is **{:.0f} times** as fast", [faster(LONG, 2, "ms_per_1000_users")]),
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
        "{:.1f} times as fast as its teacher on one request",
        [faster(MODELS["ml-1m"], 2, "ms_per_user")],
    ),
    (
        "results/README.md",
        "on one request, {:.0f} times in batches",
        [faster(MODELS["ml-1m"], 2, "ms_per_1000_users")],
    ),
    (
        "results/README.md",
        "deviations lower the student's NDCG@10 by {:.0f} to {:.0f} %",
        span(-DEVIATIONS[name] for name in ("leak", "kl", "history")),
    ),
    ("results/README.md", "students {:+.0f} % (BPR)", [with_bd("bpr", "published", "student")]),
    ("results/README.md", "**BPR's student gains** {:.0f} to {:.0f} %", span(BPR_STUDENT)),
    ("results/README.md", "**BPR's teacher loses** {:.0f} to {:.0f} %", span(-gain for gain in BPR_TEACHER)),
    ("results/README.md", "**CDAE's student gains** {:.0f} %", [with_bd("cdae", CDAE, "student")]),
    (
        "results/README.md",
        "both gain: {:.0f} and {:.0f} %",
        [with_bd("cdae", TAU_10, kind) for kind in ("student", "teacher")],
    ),
    (
        "results/README.md",
        "both gain {:.0f} and {:.0f} %",
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
    ("results/related.md", "helps by itself**: {:+.0f} %", [gain("asrep", "backwards", "sasrec")]),
]


@pytest.mark.parametrize("page, text, figures", SENTENCES, ids=[text for _, text, _ in SENTENCES])
def test_a_sentence_has_the_figures_of_its_runs(page, text, figures):
    sentence = text.format(*figures)
    assert sentence in " ".join((ROOT / page).read_text().split()), sentence
