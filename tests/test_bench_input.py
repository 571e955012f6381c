"The benchmarks refuse what they are asked wrongly, and results that are none, in one line, with status 2."
import importlib
import sys

import pytest

from conftest import ROOT

CPU = ["--device", "cpu"]
ARGV = {                      # a command that would be fine, of work that must not begin
    "sampling": [*CPU, "--size", "smoke", "--out", "OUT"],
    "distill": [*CPU, "--size", "smoke", "--out", "OUT"],
    "rl": [*CPU, "--size", "smoke", "--K", "2", "--out", "OUT"],
    "baselines": [*CPU, "--tiny", "--models", "MARVAL-B", "--out", "OUT"],
    "gpu": [*CPU, "--tiny", "--out", "OUT"],
    "reveal": ["--run", str(ROOT/"reference"/"digits"), "--out", "OUT"],
    "share": ["--out", "DIR", "--results", "OUT"],
    "rl_guards": ["--from", str(ROOT/"reference"/"digits"), "--out", "DIR", "--results", "OUT"],
    "digits_study": ["--out", "DIR"]}
WRONG = {
    "sampling": [["--K", "0"], ["--K", "1e3"], ["--batch", "99999"], ["--minutes", "nan"],
                 ["--patience", "-1"], ["--rounds", "x"], ["--dtype", "fp64"], ["--chain-steps", "1"],
                 ["--threads", "0"], ["--nope"], ["--profile", "/proc/nope/x"]],
    "distill": [["--set", "distill.lr=x"], ["--set", "nope=1"], ["--set", "x"], ["--accumulate", "3"],
                ["--phi-mul", "0"], ["--repeats", "-2"], ["--profile", "/proc/nope/x.json"]],
    "rl": [["--K", "64"], ["--batch", "0"], ["--images", "yes"], ["--set", "rl.lr=inf"],
           ["--recompute", "x"]],
    "baselines": [["--models", "VAR"], ["--measured", "251"], ["--K", "300"], ["--paths", "x"]],
    "gpu": [["--only", "x"], ["--redo", "x"], ["--minutes", "0"]],
    "reveal": [["--run", "/proc/nope"], ["--run", "a\0"], ["--K", "17"], ["--n", "1"], ["--seeds", "0"]],
    "share": [["--seeds", "-1"], ["--teacher", "/proc/nope"], ["--teacher", "/"], ["--set", "distill.lr=x"]],
    "rl_guards": [["--from", "/proc/nope"], ["--from", "/"], ["--labels", "3"], ["--labels", "9999"],
                  ["--seed", "x"]],
    "digits_study": [["--jobs", "9"], ["--seed", "-1"], ["--set", "nope"], ["--merge"], ["--timing"]]}
GARBAGE = {"list": "[]", "deep": "[" * 200_000, "null": '{"cells": null, "rows": null, "students": []}',
           "nan": '{"cells": {"a": NaN}}', "binary": "\x00\x01",
           "rows": '{"rows": [1], "kind": "x", "runs": [1]}'}
STORING = sorted(set(ARGV) - {"gpu", "digits_study"})        # those that read one earlier result


@pytest.fixture(scope="module")
def program():
    "Name -> its `main`."
    with pytest.MonkeyPatch.context() as m:
        m.syspath_prepend(str(ROOT/"bench"))
        yield lambda name: importlib.import_module(name).main
    for name in ("common", "memory", *ARGV): sys.modules.pop(name, None)


@pytest.fixture
def refused(program, tmp_path, capsys):
    "Run a program, expect a refusal, return its line."
    def run(name, more=(), out=None):
        put = {"OUT": str(out or tmp_path/"r.json"), "DIR": str(tmp_path/"runs")}
        status = program(name)([put.get(a, a) for a in (*ARGV[name], *more)])
        error = capsys.readouterr().err
        assert status == 2 and error.startswith("error: ") and error.count("\n") == 1, (status, error)
        return error
    return run


@pytest.mark.parametrize("name, more", [(name, more) for name, cases in WRONG.items() for more in cases])
def test_arguments(refused, name, more, tmp_path):
    refused(name, more)
    assert not (tmp_path/"r.json").exists()


@pytest.mark.parametrize("out", ["/", "/dev/null", "/proc/nope/r.json", "a\0b", "x" * 300, "FILE/r.json"])
@pytest.mark.parametrize("name", STORING)
def test_out(refused, name, out, tmp_path):
    (tmp_path/"file").write_text("x")
    refused(name, out=out.replace("FILE", str(tmp_path/"file")))


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("name", STORING)
def test_earlier_results(refused, name, kind, tmp_path):
    "They stay as they are."
    path = tmp_path/"earlier.json"
    path.write_text(GARBAGE[kind])
    assert "earlier.json" in refused(name, out=path)
    assert path.read_text() == GARBAGE[kind]


@pytest.mark.parametrize("name", ARGV)
def test_help(program, name, capsys):
    with pytest.raises(SystemExit) as e: program(name)(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "examples:" in text and f"python bench/{name}.py" in text
