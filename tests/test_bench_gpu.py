"""bench/gpu.py as a trial on a CPU, where libraries are missing and one import kills the process: every item
is stored or reported with its reason, the others go on, and the same command measures nothing twice."""
import importlib.util
import json
import subprocess
import sys

import pytest

from conftest import ROOT, environment

MISSING = ("pydantic", "nbdev", "fastcore", "open_clip", "torch_fidelity", "submitit", "pytest")
SITE = f"""
import os, signal, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {MISSING}: raise ModuleNotFoundError("No module named " + repr(name))
        if name == "diffusers": os.kill(os.getpid(), signal.SIGKILL)

sys.meta_path.insert(0, Missing())
"""
KILLED = {"baselines-DiT", "baselines-ADM"}    # they import diffusers


@pytest.fixture(scope="module")
def gpu():
    "The program as a module."
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(ROOT/"bench"))
        spec = importlib.util.spec_from_file_location("gpu", ROOT/"bench"/"gpu.py")
        module = importlib.util.module_from_spec(spec)
        m.setitem(sys.modules, "gpu", module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture
def command(tmp_path):
    "The program as a process on a bare machine."
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"sitecustomize.py").write_text(SITE)
    def run(*more):
        script = [sys.executable, str(ROOT/"bench"/"gpu.py")]
        argv = [*script, "--device", "cpu", "--out", str(tmp_path/"out"), *more]
        env = environment()
        env["PYTHONPATH"] = f"{tmp_path/'site'}:{env['PYTHONPATH']}"
        return subprocess.run(argv, capture_output=True, text=True, env=env, timeout=300)
    return run


def records(tmp_path):
    return {p.stem: json.loads(p.read_text()) for p in (tmp_path/"out"/"gpu_cpu").glob("*.json")}


@pytest.mark.slow
def test_trial(gpu, command, tmp_path):
    first = command("--tiny", "--minutes", "30")
    assert first.returncode == 0, first.stderr
    found = records(tmp_path)
    assert set(found) == set(gpu.ITEMS)
    said = {name: (r["state"], r.get("reason")) for name, r in found.items()}
    assert said.pop("graph") == ("not run", "needs a GPU")
    assert {said.pop(name) for name in KILLED} == {("failed", "ended by SIGKILL")}
    assert set(said.values()) == {("done", None)}, said
    for name, r in found.items():
        assert {"device", "torch", "commit", "code", "threads", "versions", "seconds", "what"} <= set(r), name
        if name in said: assert r["result"] and {"dtype", "batch", "K"} <= set(r), name
    assert all(found[name]["result"]["passed"] for name in ("parity", "parity-chain"))
    left = {name: r for name, r in found.items() if r["state"] == "done"}
    again = command("--tiny", "--minutes", "30")
    assert again.returncode == 0 and {n: r for n, r in records(tmp_path).items() if n in left} == left
    for name in left: assert f"{name}: stored already" in again.stdout
    assert "ended by SIGKILL" in again.stdout and "Traceback" not in again.stderr
    redone = command("--tiny", "--minutes", "30", "--only", "parity", "sampling-large", "--redo", "parity")
    assert "parity: done" in redone.stdout and "sampling-large: stored already" in redone.stdout
    late = command("--tiny", "--minutes", "0.01", "--only", "parity", "--redo", "parity")
    assert late.returncode == 0 and "parity: left out" in late.stdout


@pytest.mark.parametrize("argv, says", [
    ([], "expected --tiny"), (["--minutes", "nan"], "'nan': expected a number"),
    (["--only", "nothing"], "invalid choice"), (["--device", "cuda"], "no GPU here"),
    (["--tiny", "--threads", "0"], "'0': expected a whole number from 1")])
def test_refused(gpu, argv, says, tmp_path, capsys):
    if "cuda" in argv and gpu.torch.cuda.is_available(): pytest.skip("there is a GPU")
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), *argv]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_other_code_or_device(gpu, tmp_path):
    "A result counts for the device, the code and the kind of trial it was made with; a damaged one for none."
    run = gpu.Run("cpu", True, 0, tmp_path, "cpu", 0.)
    about = {"kind": gpu.KIND, "device": "one, 1 thread(s)", "code": "a", "tiny": True}
    assert gpu.same(about | {"device": "one, 2 thread(s)", "commit": "b"}, run, about)
    for other in ({"device": "two"}, {"code": "b"}, {"tiny": False}, {"kind": "x"}):
        assert not gpu.same(about | other, run, about)
    (tmp_path/"x.json").write_text("[1")
    assert gpu.earlier(tmp_path/"x.json") == {} == gpu.earlier(tmp_path/"y.json")


def test_graph_tests_without_pytest():
    "The file of tests can be imported where pytest is missing, and its tests called."
    code = (f"import sys; sys.path.insert(0, {str(ROOT/'bench')!r}); import gpu; "
            "gpu.has = lambda name: False; t = gpu.fast_tests(); "
            "t.test_equal(t.net(), 'one step'); print(t.test_graph.__name__)")
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.stdout.strip() == "test_graph", done.stderr


MAIN = {".git/HEAD": "ref: refs/heads/main\n"}

@pytest.mark.parametrize("files, commit", [
    ({}, "unknown"), ({"COMMIT": "0123456789abcdef\n"}, "0123456789ab"),
    ({".git/HEAD": "fedcba9876543210\n"}, "fedcba987654"), (MAIN, "unknown"),
    (MAIN | {".git/refs/heads/main": "abcdef0123456789\n"}, "abcdef012345"),
    (MAIN | {".git/packed-refs": "# pack\nabcdef0123456789 refs/heads/main\n"}, "abcdef012345"),
    ({".git/HEAD": "\x00\xff", "COMMIT": "nonsense"}, "unknown"),
    ({".git": "gitdir: /elsewhere\n"}, "unknown")])
def test_commit_without_git(gpu, files, commit, tmp_path):
    import common
    for name, text in files.items():
        (tmp_path/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/name).write_text(text)
    assert common._commit_without_git(tmp_path) == commit
