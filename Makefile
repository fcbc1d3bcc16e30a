# make demo    from nothing through all four stages to tables of their models, in runs/
# make test    the checks
# make related the six neighbours of related/, each on ml-100k, and tables of them, in runs/
# make results the tables and pictures of README.md and results/, from the JSON files of results/runs
# make results-from-nothing CLAIM=students    the missing runs of a claim of results/claims, and then these
# make lint    ruff, as CI runs it
# Each makes .venv from requirements.txt first, if it is not there; PYTHON=python3.12 make ... chooses another Python.

PYTHON ?= python3
VENV := .venv/bin/python
DATA := data/ml-100k.txt
SHAPE := --cells 1 --nodes 2 --dim 32
# latency of compiled models, too, where there is a C++ compiler
COMPILE := $(if $(shell command -v g++ clang++),--compile)
ONE := $(patsubst %,tests/test_%.py,bidirectional devices distill processes resume)
SAME := --epochs 30 --patience 30 --final-rate 0

CLAIM ?= students

.PHONY: demo related test test-one test-other lint results results-from-nothing
.DELETE_ON_ERROR:

demo: .venv/ready $(DATA)
	rm -f runs/*.ckpt
	$(VENV) sasrec_teacher.py $(DATA) --dropout 0.5 --batch-size 32 --out runs/teacher.pt2
	$(VENV) adarec_search.py $(DATA) --teacher runs/teacher.pt2 --remember $(SHAPE) --out runs/found.json
	$(VENV) adarec_search.py $(DATA) --architecture runs/found.json --out runs/untrained.json
	$(VENV) emd_distill.py $(DATA) --student runs/untrained.pt2 --teacher runs/teacher.pt2 --remember $(SAME) --out runs/student.pt2
	$(VENV) emd_distill.py $(DATA) --student runs/untrained.pt2 $(SAME) --out runs/student-alone.pt2
	$(VENV) evaluate.py $(DATA) runs/teacher.pt2 runs/student.pt2 runs/student-alone.pt2 $(COMPILE)
	$(VENV) sasrec_teacher.py $(DATA) --loss bce --batch-size 32 --epochs 30 --out runs/large.pt2
	$(VENV) sasrec_teacher.py $(DATA) --loss bce --batch-size 32 --epochs 30 --dim 16 --out runs/small.pt2
	$(VENV) bidirectional_distill.py $(DATA) --teacher runs/large.pt2 --student runs/small.pt2 --direction none --out runs/alone
	$(VENV) bidirectional_distill.py $(DATA) --teacher runs/large.pt2 --student runs/small.pt2 --out runs/bd
	$(VENV) evaluate.py $(DATA) runs/teacher.pt2 runs/student.pt2 --recommend 1
	$(VENV) evaluate.py $(DATA) runs/large.pt2 runs/alone-teacher.pt2 runs/bd-teacher.pt2
	$(VENV) evaluate.py $(DATA) runs/small.pt2 runs/alone-student.pt2 runs/bd-student.pt2
	@echo "MovieLens-100K is small: here, a teacher adds little to what a student learns alone."
	@echo "results/README.md, section 2, has the data sets on which it adds more."

# teacher of 4 blocks, students of 2 blocks of 32
related: .venv/ready $(DATA)
	rm -f runs/*.ckpt
	$(VENV) sasrec_teacher.py $(DATA) --blocks 4 --epochs 30 --out runs/four.pt2
	$(VENV) sasrec_teacher.py $(DATA) --dim 32 --epochs 0 --out runs/two.pt2
	$(VENV) emd_distill.py $(DATA) --student runs/two.pt2 $(SAME) --out runs/two-alone.pt2
	$(VENV) related/dfa_distill.py $(DATA) --teacher runs/four.pt2 --student runs/two.pt2 --out runs/dfa.pt2
	$(VENV) related/statistics_distill.py $(DATA) --teacher runs/four.pt2 --student runs/two.pt2 --out runs/statistics.pt2
	$(VENV) related/ranking_distill.py $(DATA) --teacher runs/four.pt2 --student runs/two.pt2 --out runs/ranking.pt2
	$(VENV) related/dt4sr.py $(DATA) --dim 16 --out runs/dt4sr.pt2
	$(VENV) related/asrep.py $(DATA) --start runs/two.pt2 --reverse --out runs/backward.pt2
	$(VENV) related/asrep.py $(DATA) --start runs/backward.pt2 --generator runs/backward.pt2 --fill 40 --out runs/asrep.pt2
	$(VENV) related/domain_distill.py $(DATA) --split --out runs/scene
	$(VENV) sasrec_teacher.py runs/scene-source.txt --epochs 30 --out runs/source.pt2
	$(VENV) sasrec_teacher.py runs/scene-target.txt --dim 32 --epochs 0 --out runs/target.pt2
	$(VENV) related/domain_distill.py runs/scene-target.txt --source runs/scene-source.txt --teacher runs/source.pt2 --student runs/target.pt2 --out runs/domain.pt2
	$(VENV) evaluate.py runs/scene-target.txt runs/source.pt2 runs/domain.pt2
	$(VENV) evaluate.py $(DATA) runs/asrep.pt2 --inputs runs/asrep.txt
	$(VENV) evaluate.py $(DATA) runs/two-alone.pt2 runs/dfa.pt2 runs/statistics.pt2 runs/ranking.pt2 runs/dt4sr.pt2 runs/asrep.pt2

# in two processes of one thread each
test: .venv/ready
	@$(MAKE) --no-print-directory -j2 test-one test-other

test-one test-other: export OMP_NUM_THREADS = 1
test-one:
	$(VENV) -m pytest $(ONE)
test-other:
	$(VENV) -m pytest $(filter-out $(ONE),$(wildcard tests/test_*.py))

results-from-nothing: .venv/ready
	$(VENV) results/run.py $(CLAIM)
	@$(MAKE) --no-print-directory results

results: .venv/ready
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements-figures.txt
	$(VENV) results/draw.py

lint: .venv/bin/ruff
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

$(DATA): | .venv/ready
	$(VENV) data/prepare.py ml-100k --out $@

# the last line marks a finished installation, so that an interrupted one is done again
.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

.venv/bin/ruff: .venv/ready
	$(VENV) -m pip install --disable-pip-version-check ruff==0.17.6
	touch $@
