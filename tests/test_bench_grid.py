"bench/grid.py at scale smoke: cells are measured once, a failure is kept and stops nobody; tables."
import importlib
import json
import statistics
import subprocess
import sys
import time

import pytest

from conftest import ROOT, environment


@pytest.fixture(scope="module")
def grid():
    "The program as a module."
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(ROOT/"bench"))
        yield importlib.import_module("grid")
    for name in ("common", "grid"): sys.modules.pop(name, None)


@pytest.fixture
def smoke(grid, tmp_path, monkeypatch):
    "Runs it on a study of two recipes, in folders of the test's own."
    recipes = [{}, grid.kappa(1., **{"distill.t_guide": 1000})]
    monkeypatch.setitem(grid.STUDIES, "losses", lambda: iter(recipes))
    common = ["--scale", "smoke", "--seeds", "0", "--samplings", "2"]
    common += ["--runs", str(tmp_path/"runs"), "--out", str(tmp_path/"out")]
    return lambda *more, study="losses": grid.main(["--study", study, *common, *more])


def results(folder): return {p.stem: json.loads(p.read_text()) for p in sorted((folder/"out").glob("*.json"))}


def times(folder): return {p.name: p.stat().st_mtime_ns for p in (folder/"out").iterdir()}


GSIM = "loss=gsim,t_guide=1000,seed=0"


def test_failure(grid, smoke, tmp_path, monkeypatch):
    "It is kept in a line, others go on, and it is tried again when asked; a signal is no failure."
    def fails(self, cell):
        if cell.recipe: raise error
        return {"figures": {}, "within_noise_of_teacher": {}, "cpu_seconds": 0.}
    monkeypatch.setattr(grid, "TABLE", ())
    monkeypatch.setattr(grid.Grid, "perform", fails)
    error = RuntimeError("two\nlines")
    assert smoke() == 0
    found = results(tmp_path)
    assert found[GSIM]["state"] == "failed" and found[GSIM]["reason"] == "RuntimeError: two\\nlines"
    assert found["preset,seed=0"]["state"] == "done"
    error, kept = KeyboardInterrupt(), times(tmp_path)
    assert smoke() == 0 and times(tmp_path) == kept
    assert smoke("--redo-failed") == 130 and set(results(tmp_path)) == {"preset,seed=0"}


def test_study(grid, smoke, tmp_path, capsys):
    "Two cells from one teacher; a second run skips them, one after a change of settings does not."
    assert smoke() == 0
    found, kept = results(tmp_path), times(tmp_path)
    assert set(found) == {"preset,seed=0", GSIM} and {r["state"] for r in found.values()} == {"done"}
    for r in found.values(): check(r)
    alphas = {"alpha": 0, "alpha_huber": 0, "alpha_squared": .5}
    assert found[GSIM]["loss"] == {"kappa": 1, "distance": "huber"} | alphas
    assert len({r["sha256"]["teacher.safetensors"] for r in found.values()}) == 1
    assert len({r["sha256"]["student.safetensors"] for r in found.values()}) == 2
    assert len(list((tmp_path/"runs"/"smoke").glob("teacher-*"))) == 1
    capsys.readouterr()
    assert smoke() == 0 and times(tmp_path) == kept
    assert smoke("--table") == 0 and smoke("--list") == 0
    shown = capsys.readouterr().out
    assert "fd_teacher" in shown and f"done    {GSIM}" in shown and times(tmp_path) == kept
    first = json.loads((tmp_path/"out"/"preset,seed=0.json").read_text())
    (tmp_path/"out"/"preset,seed=0.json").write_text(json.dumps(first | {"digest": "of other settings"}))
    (tmp_path/"out"/f"{GSIM}.json").write_text("[1")
    assert smoke() == 0
    again = results(tmp_path)
    assert again["preset,seed=0"]["digest"] == first["digest"]
    assert again["preset,seed=0"]["figures"] == first["figures"] and again[GSIM]["state"] == "done"


def check(r):
    "Everything that a study asks of a cell."
    assert {"commit", "device", "torch", "curve", "cpu_seconds", "n", "recipe", "seed"} <= set(r)
    for figures in (r["figures"], r["teacher_figures"]):
        for key in ("fd", "fd_teacher", "precision", "recall", "diversity"):
            assert len(figures[key]["values"]) == 2, key
            assert figures[key]["mean"] == pytest.approx(statistics.mean(figures[key]["values"]))
    assert set(r["within_noise_of_teacher"]) == set(r["figures"])
    assert r["teacher_figures"]["fd_teacher"]["mean"] < r["figures"]["fd_teacher"]["mean"] + 1


def test_rl(grid, smoke, tmp_path, monkeypatch):
    monkeypatch.setitem(grid.STUDIES, "paper", lambda: iter([{"rl.anchor": 0.}]))
    assert smoke(study="paper") == 0
    (name, r), = results(tmp_path).items()
    assert name == "anchor=0.0,rl,seed=0" and r["recipe_name"] == "anchor=0.0,rl"
    assert set(r["rl_figures"]) == set(r["figures"]) == set(r["rl_within_noise_of_teacher"])


@pytest.mark.slow
def test_processes(tmp_path):
    "Two processes share a study; killed and started again, they measure what is left."
    argv = [sys.executable, str(ROOT/"bench"/"grid.py"), "--study", "weight", "--scale", "smoke"]
    argv += ["--seeds", "0", "--samplings", "2", "--processes", "2"]
    argv += ["--runs", str(tmp_path/"runs"), "--out", str(tmp_path/"out")]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = subprocess.Popen(argv, env=environment(), text=True, **pipes)
    while first.poll() is None and not list((tmp_path/"out").glob("*.json")): time.sleep(0.1)
    first.terminate()
    out, err = first.communicate(timeout=120)
    assert first.returncode in (0, 130) and "Traceback" not in err, err
    kept = times(tmp_path)
    assert kept, err
    second = subprocess.run(argv, env=environment(), text=True, capture_output=True, timeout=600)
    assert second.returncode == 0, second.stderr
    found = results(tmp_path)
    assert set(found) == {"preset,seed=0", "weight=score,seed=0", "weight=x0,seed=0"}
    assert {r.get("reason") for r in found.values()} == {None} and "3 done" in second.stdout
    assert kept.items() <= times(tmp_path).items()


def test_locks(grid, tmp_path):
    "A cell, or a teacher, in other hands is left to them."
    cell, g = grid.Cell("smoke", 0, {}, False, 2), grid.Grid("smoke", tmp_path/"runs", tmp_path/"out")
    for name in (cell.name, "teacher-0"):
        with g.lock(name) as own:
            assert own and g.attempt(cell) is None
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("recipe, wanted", [
    ({"distill.loss": "sim"}, (0, 1)), ({"distill.loss": "gsim"}, (1, 0)),
    ({"distill.loss": "gsim", "distill.distance": "squared"}, (1, .5)),
    ({"distill.loss": "sid", "distill.alpha": 1.4}, (-.8, 1.8)),
    ({"distill.loss": "sid", "distill.alpha": 1.4, "distill.distance": "squared"}, (-.8, 1.4))])
def test_readings(grid, recipe, wanted):
    found = grid.readings(grid.Cell("digits", 0, recipe, False, 3).config)
    assert (found["kappa"], found["alpha"]) == wanted


def test_studies(grid, tmp_path):
    "Every cell is valid, has a name and a digest of its own, and kappa is written as the losses have it."
    found = {}
    for study in grid.STUDIES:
        args = grid.arguments(["--study", study, "--out", str(tmp_path)])
        for cell in grid.cells(args): found.setdefault(cell.name, set()).add(cell.digest)
    assert all(len(digests) == 1 for digests in found.values())
    assert len({min(d) for d in found.values()}) == len(found)
    args = grid.arguments(["--study", "losses", "--out", str(tmp_path)])
    losses = [grid.readings(c.config)["kappa"] for c in grid.cells(args) if c.seed == 1]
    assert sorted(set(losses)) == [-1.6, -.8, -.4, -.2, 0, .5, 1] and len(losses) == 28


@pytest.mark.parametrize("a, b, same", [
    ([1., 3.], [2., 2.], True), ([1., 1.], [1., 1.], True), ([1., 1.1], [5., 5.1], False),
    ([0., 10.], [9., 9.], True)])
def test_within_noise(grid, a, b, same):
    assert grid.within_noise(grid.summary(a), grid.summary(b)) == same


@pytest.mark.parametrize("argv, says", [
    (["--study", "x"], "invalid choice"), ([], "--study"),
    (["--study", "lag", "--processes", "0"], "from 1 to"), (["--study", "lag", "--seeds", "-1"], "from 0"),
    (["--study", "lag", "--scale", "smoke"], "expected --out"),
    (["--study", "lag", "--samplings", "1"], "from 2"),
    (["--study", "lag", "--out", "/dev/null/x"], "/dev/null"),
    (["--study", "lag", "--table", "--out", "/proc/nope"], "no results")])
def test_refused(grid, argv, says, capsys, tmp_path):
    assert grid.main(["--runs", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
