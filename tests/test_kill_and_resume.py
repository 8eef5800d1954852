"""Runs killed with SIGKILL, at any moment, end with the weights of a run that nobody disturbed, bit for bit.

`killed_runs` kills them: at random times, and at random writes below the run's folder, files half written included.
Layouts: "stream" is a small stream made there, "streamed" that of `tools.streaming`.
"""

import json
import subprocess
import sys

import pytest
import transformers
from packaging import version

from .train_scripts import ROOT, environment

LAYOUTS, WORKERS, PROCESSES = ("padded", "packed", "stream", "streamed"), (0, 2, 4), (1, 2)
# Older versions do not resume in two processes on a CPU, and say so.
MOST = 2 if version.parse(transformers.__version__) >= version.parse("5.23") else 1
SOME = [("padded", 0, 1), ("packed", 2, MOST), ("streamed", 2, 1)]


def answers(cases, seconds):
    """What `killed_runs` tells of each case."""
    lines = "".join(json.dumps(case) + "\n" for case in cases)
    command = [sys.executable, "-m", "tests.killed_runs"]
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=seconds
    )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(cases), done.stderr[-3000:]
    for case, answer in zip(cases, told, strict=True):
        assert isinstance(answer, list) or "error" not in answer, f"{case}: {answer['error']}\n{done.stderr[-3000:]}"
        print(case, answer)
    return told


def check(answer, kills):
    assert answer["kills"] == kills
    assert answer["ended"] >= 1
    assert answer["different"] == 0
    assert answer["lost"] == 0


def test_some_kills_change_nothing():
    cases = [{"layout": layout, "workers": workers, "processes": processes, "kills": 3, "seed": 1}
             for layout, workers, processes in SOME]  # fmt: skip
    told = answers(cases, seconds=300)
    for answer in told:
        check(answer, 3)
    assert sum(answer["resumed"] for answer in told) > 0
    assert sum(answer["half_written"] for answer in told) > 0


def test_control_masks_from_the_random_state_are_others_after_a_kill():
    """The same harness shows the error that it looks for: stock BERT with the stock collator, killed while its third
    checkpoint is written, and the same BERT with masks that are a function of the example."""
    stock, ours = answers(
        [{"layout": layout, "model": "bert", "workers": 0, "processes": 1, "kills": 1, "fatal": [[0, 80]]}
         for layout in ("stock masks", "padded")],
        seconds=300,
    )  # fmt: skip
    assert (stock["kills"], stock["resumed"], stock["different"]) == (1, 1, 1)
    assert (ours["kills"], ours["resumed"], ours["different"]) == (1, 1, 0)


def test_processes_stop_together_where_the_loss_of_one_is_spoilt():
    cases = [
        {"layout": "padded", "workers": 0, "processes": 2, "steps": 20, "spoilt": factor} for factor in ("nan", "20")
    ]
    nan, high = answers(cases, seconds=300)
    assert len(nan) == len(high) == 2
    assert nan[0] == nan[1]
    assert "The loss is nan at step 13 " in nan[0]
    assert "checkpoint-12; lower" in nan[0]
    assert high[0] == high[1]
    assert "for 3 steps" in high[0]
    assert "at step 15 " in high[0]
    assert "checkpoint-12; lower" in high[0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", PROCESSES[:MOST])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_kills_change_nothing(layout, processes):
    cases = [{"layout": layout, "workers": workers, "processes": processes, "kills": 12, "seed": 10 + workers}
             for workers in WORKERS]  # fmt: skip
    told = answers(cases, seconds=3000)
    for answer in told:
        check(answer, 12)
        assert answer["resumed"] > 0
        assert answer["half_written"] > 0
