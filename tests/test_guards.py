"A guard ends RL in the same step, with the same bits, whoever is killed on the way and however many share the work."
import json
import re
import shutil
import signal

import pytest
from conftest import Launched, digests, last_step, wait_for

from marval import pipeline
from marval.config import override, preset

TRIPS = ["rl.guard=diversity 0.05", "rl.iterations=40", "rl.lr=0.01", "rl.anchor=0", "rl.metric_every=2", "log.metric_n=40", "log.checkpoint_every=5"]
PRODUCT = ("student_rl.safetensors",)


def prepared(reference, out):
    "A folder in which RL is what comes next."
    out.mkdir()
    shutil.copy(reference[0] / "student.safetensors", out)
    shutil.copytree(reference[0] / "judges", out / "judges")
    return out


def ended(out):
    "What the run says of its end, and the steps: the last one, and the one whose weights were kept."
    said = json.loads((out / "state" / "rl" / "done.json").read_text())["stopped"]
    return said, tuple(map(int, re.search(r"ended at step (\d+) of 40, with the weights of step (\d+)", said).groups()))


def rows(out): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (out / "state" / "rl" / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(reference, tmp_path_factory):
    "RL at smoke scale, far too fast, until the guard trips."
    out = prepared(reference, tmp_path_factory.mktemp("guards") / "run")
    pipeline.run(override(preset("smoke"), TRIPS), ("rl",), out)
    return out


def test_weights_of_the_last_fine_measurement(reference, undisturbed, tmp_path):
    "They are, bit for bit, those of a run without a guard that was to end there."
    said, (step, kept) = ended(undisturbed)
    assert "diversity went from" in said and kept == step - 2 and 0 < kept < 38 and rows(undisturbed)[-1]["step"] == step
    short = prepared(reference, tmp_path / "short")
    pipeline.run(override(preset("smoke"), [*TRIPS, "rl.guard=", f"rl.iterations={kept}", "rl.metric_every=0"]), ("rl",), short)
    assert digests(short, PRODUCT) == digests(undisturbed, PRODUCT) != digests(reference[0], PRODUCT)


def test_killed(reference, undisturbed, tmp_path):
    "SIGKILL after the last measurement that was fine, before the checkpoint that would hold it; then to the end. A further call has nothing to do."
    out, kept = prepared(reference, tmp_path / "run"), ended(undisturbed)[1][1]
    assert kept > 2
    argv = ("--scale", "smoke", "--stage", "rl", "--cluster", "local", "--out", out, "--set", *TRIPS, f"log.checkpoint_every={kept - 1}")
    run, log = Launched(*argv), out / "state" / "rl" / "log.jsonl"
    assert wait_for(lambda: log.exists() and f'{{"step": {kept},' in log.read_text(), run.process)
    run.signal(signal.SIGKILL)
    run.end()
    assert run.gone() and not (out / "state" / "rl" / "done.json").exists()
    assert last_step(out / "state" / "rl") < kept
    status, _, stderr = Launched(*argv).end()
    assert status == 0, stderr
    assert digests(out, PRODUCT) == digests(undisturbed, PRODUCT) and ended(out) == ended(undisturbed) and rows(out) == rows(undisturbed)
    assert pipeline.run(override(preset("smoke"), TRIPS), ("rl",), out) == {"rl": "skipped"}


@pytest.mark.slow
def test_two_ranks(reference, undisturbed, tmp_path):
    "Two processes, each with half of the weights, aside and not, end where one ends: their sums are rounded differently, so one measurement earlier or later will do."
    out = prepared(reference, tmp_path / "run")
    status, _, stderr = Launched("--scale", "smoke", "--stage", "rl", "--cluster", "local", "--out", out, "--tasks-per-node", "2", "--set", *TRIPS, "compute.sharding=fsdp").end()
    assert status == 0, stderr
    assert abs(ended(out)[1][0] - ended(undisturbed)[1][0]) <= 2
    for mine, one in zip(rows(out), rows(undisturbed)): assert mine == pytest.approx(one, rel=2e-2, abs=2e-2)
