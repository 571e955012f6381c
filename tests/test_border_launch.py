"""slurm/launch.py before a stranger: names, options, environments, run folders and books may be anything.
Whatever is asked ends in a result or in one line, within seconds, and leaves nothing behind if refused."""
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, Launched, contents, environment
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from marval import book, pipeline
from marval.border import BadInput
from marval.config import SCALES, preset

SECONDS = 60  # for one refusal, on a machine that is busy


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    "A working folder of its own, and no Slurm."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setattr(book, "slurm_answers", lambda: False)


def said(capsys):
    "What was printed on stderr is one line."
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable(), err
    return err


LONG, BYTES = "n" * 300, "\udcff\udcfe"  # bytes that are no UTF-8, as Python hands them to a program
NAMES = {
    "empty": "", "nobody's home": "~nobody-at-all", "long": LONG, "no Unicode": BYTES, "escape": "a\x1b[2Jb",
    "two lines": "a\nb", "bell": "\a", "from right to left": "a\u202eb", "NUL": "a\0b", "root": "/",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["--out", "--data", "--vae", "--teacher", "--reward", "--names"])
def test_names(option, name, launch, tmp_path, capsys):
    "Files and folders."
    argv = ["--scale", "smoke" if option == "--out" else "base", option, NAMES[name]]
    begin = time.monotonic()
    status = launch.main([*argv, "--cluster", "local"])
    assert status == 2 and time.monotonic() - begin < SECONDS and list(tmp_path.iterdir()) == []
    line = said(capsys)
    if name in ("empty", "nobody's home") and option != "--reward":
        assert f"{option} " in line and "expected a path" in line


SLURMS = ["--partition", "--qos", "--account", "--constraint"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["--scale", "--stage", "--cluster", "--redo", "--mem", "--time", "--setup",
                                    "--sbatch", "--set", "--seed", "--nodes", *SLURMS])
def test_values(option, name, launch, tmp_path, capsys):
    "Anything else that is text. What Slurm's names may hold, we don't know: some of these it has to judge."
    argv = ["--cluster", "slurm", "--dry-run", *([] if option == "--scale" else ["--scale", "smoke"])]
    status = launch.main([*argv, option, NAMES[name]])
    fine = {"long": ["--setup"], "nobody's home": [*SLURMS, "--setup"], "root": [*SLURMS, "--setup"]}
    if option in fine.get(name, ()): assert status == 0
    else: assert status == 2 and said(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["status", "logs", "cancel"])
@pytest.mark.parametrize("name", [*NAMES, "dot"])
def test_looking_after_nothing(word, name, launch, capsys):
    assert launch.main([word, NAMES.get(name, ".")]) == 2
    said(capsys)


NUMBERS = ("nodes", "gpus-per-node", "tasks-per-node", "cpus-per-task")


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("value", ["0x10", "1e3", "1.0", "-1", "9" * 30, "9" * 5000, "²", "nan", " "])
def test_numbers(option, value, launch, capsys):
    assert launch.main(["--scale", "huge", f"--{option}={value}", "--cluster", "slurm", "--dry-run"]) == 2
    assert f"--{option}" in said(capsys)


SIZES = {
    "a batch": (["teacher.batch=1048576"], "teacher.batch=1048576: 1048576 images at once would take about "),
    "a model": (["model.width=16384", "model.depth=256"], "stage teacher would take about 33 TB of memory"),
    "a roll-out": (["rl.batch=1048576"], "rl.batch=1048576: 1048576 images at once"),
    "images": (["evaluate.n=10000000"], "evaluate.n=10000000: stage evaluate would keep about 260 GB"),
    "measured": (["log.metric_n=10000000"], "log.metric_n=10000000: stage teacher would keep about "),
}


@pytest.mark.parametrize("case", SIZES)
@pytest.mark.parametrize("how", [["local"], ["slurm", "--dry-run"]], ids=["here", "slurm"])
def test_too_large(case, how, launch, tmp_path, monkeypatch, capsys):
    "What can't be held is refused with an estimate and what fits; a dry run says so, and shows the plan."
    from marval import launch as module
    monkeypatch.setattr(module, "machine_memory", lambda: 16e9)
    wishes, clue = SIZES[case]
    begin = time.monotonic()
    status = launch.main(["--scale", "digits", "--cluster", *how, "--set", *wishes])
    assert time.monotonic() - begin < SECONDS and list(tmp_path.iterdir()) == []
    if "--dry-run" in how:
        told = capsys.readouterr().out.split("refused as it stands: ")[1].splitlines()[0]
        assert status == 0 and clue in told and "a node gives (--mem) 8.59 GB; expected " in told
        return
    line = said(capsys)
    assert status == 2 and clue in line and "this machine has 16 GB; expected " in line


def test_what_fits_is_accepted(launch, tmp_path, monkeypatch, capsys):
    "The batch that is named is taken, were it not for the rest."
    from marval import launch as module
    monkeypatch.setattr(module, "machine_memory", lambda: 16e9)
    argv = ["--scale", "digits", "--stage", "teacher", "--cluster", "local", "--dry-run", "--set"]
    assert launch.main([*argv, "teacher.batch=1048576"]) == 0
    told = capsys.readouterr().out.split("refused as it stands: ")[1]
    batch = told.split("expected ")[1].split()[0]
    assert launch.main([*argv, f"teacher.batch={batch}"]) == 0 and "refused" not in capsys.readouterr().out


def test_disk(launch, tmp_path, monkeypatch, capsys):
    "Two checkpoints of each stage, products and pictures have to fit."
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
    assert launch.main(["--scale", "digits", "--cluster", "local"]) == 2
    assert "and 1 MB are free there" in said(capsys) and list(tmp_path.iterdir()) == []


# ---- what a shell and a locale do

TEACHER = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", "run")
HOSTILE = {
    "C locale": dict(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii"),
    "C locale, as it is": dict(LANG="C", LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_locale(case, tmp_path):
    "A name that this locale can't print, and one that no locale can."
    for name in ("rün", b"r\xff\xfen"):
        command = [sys.executable, str(LAUNCH), *TEACHER[:-1], name, "--stage", "rl"]
        done = subprocess.run(command, capture_output=True, env=environment(**HOSTILE[case]), timeout=300)
        assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1, done.stderr
        assert done.stderr.startswith(b"error: ") and done.stderr.isascii() and list(tmp_path.iterdir()) == []


def test_setup_that_fails(tmp_path):
    "The shell's own words are shown, and ours; the log that holds them is there."
    setup = ("--setup", "export A=1", "no-such-command --now")
    status, out, err = Launched(*TEACHER, *setup, cwd=tmp_path).end()
    assert status == 1 and "Traceback" not in err
    first, last = err.splitlines()
    assert "no-such-command: " in first and "not found" in first
    assert last == "error: --setup 'no-such-command --now' ended with status 127"
    logs = [Path(word) for line in out.splitlines() for word in line.split() if word.startswith("/")]
    assert logs and all(log.exists() and log.with_suffix(".err").read_text() == err for log in logs)


def test_setup_in_order(tmp_path):
    "Commands share one shell, whatever characters they hold, and get no input; Python runs in it."
    setup = ["export A='two words; $(false)'", "test \"$A\" = 'two words; $(false)' && cat",
             'echo "$A" > said']
    more = ("--tasks-per-node", "2", "--set", "teacher.iterations=2")
    status, _, err = Launched(*TEACHER, "--setup", *setup, *more, cwd=tmp_path).end()
    assert status == 0, err
    assert (tmp_path / "said").read_text() == "two words; $(false)\n"
    assert (tmp_path / "run" / "teacher.safetensors").exists()


def test_mistake_of_ours(launch, monkeypatch, capsys):
    "The last resort of the entry point, and --debug."
    def mistake(*_): raise KeyError("oops")
    monkeypatch.setattr(pipeline, "select", mistake)
    assert launch.main(["--scale", "smoke"]) == 1
    line = said(capsys)
    path = Path(line.split("the traceback is in ")[1].split(",")[0])
    assert "unexpected KeyError: 'oops'" in line and "mistake" in path.read_text()
    path.unlink()
    with pytest.raises(KeyError): launch.main(["--scale", "smoke", "--debug"])


def test_mistake_in_the_job(tmp_path):
    "One line; the traceback is in a file beside the logs."
    setup = tmp_path / "site" / "sitecustomize.py"
    setup.parent.mkdir()
    setup.write_text("import sys\nif 'submitit.core._submit' in ' '.join(sys.orig_argv):\n"
                     "    import marval.pipeline\n    def guarded(*_, **__): return {}['oops']\n"
                     "    marval.pipeline.guarded = guarded\n")
    env = dict(PYTHONPATH=os.pathsep.join([str(setup.parent), environment()["PYTHONPATH"]]))
    status, _, err = Launched(*TEACHER, cwd=tmp_path, env=env).end()
    assert status == 1 and err.startswith("error: unexpected KeyError: 'oops'; the traceback is in ")
    assert err.count("\n") == 1 and "guarded" in Path(err.split("traceback is in ")[1].strip()).read_text()


# ---- run folders and books of strangers

DEEP = b"[" * 100_000
JOBS = json.dumps(dict(config=preset("smoke").dict(), jobs=[]))


def book_of(**entry):
    "A book with one job, some of whose fields are odd."
    entry = dict(job="1", cluster="slurm", stages=["rl"], folder="") | entry
    return json.dumps(dict(config={}, jobs=[entry])).encode()


BOOKS = {
    "list": b"[]", "null": b"null", "deep": DEEP, "deep inside": b'{"config": ' + DEEP, "number": b"1e999",
    "binary": b"\x80\x04\x95\0\0", "empty": b"", "no jobs": b'{"config": {}}',
    "jobs are text": b'{"config": {}, "jobs": "none"}', "a job is null": b'{"config": {}, "jobs": [null]}',
    "a number for a name": book_of(job=7), "an option for a name": book_of(job="--all"),
    "two jobs in one": book_of(job="1,2"), "another cluster": book_of(cluster="cloud"),
    "escape": book_of(stages=["\x1b[2J"]), "stages are a text": book_of(stages="rl"),
}


def place_book(content, out):
    "A run folder with such a book."
    (out / "state" / "jobs").mkdir(parents=True)
    (out / "state" / "jobs" / "jobs.json").write_bytes(content)


@pytest.mark.parametrize("case", BOOKS)
def test_a_broken_book(case, launch, tmp_path, capsys):
    "Looking after such a run is refused in one line. A start sets the book aside, and begins a new one."
    out = tmp_path / "run"
    place_book(BOOKS[case], out)
    before = contents(out)
    for word in ("status", "logs", "cancel"):
        assert launch.main([word, str(out)]) == 2 and "jobs.json" in said(capsys)
    assert contents(out) == before
    told = book.repair(out)
    aside, = (out / "state" / "jobs").iterdir()
    assert aside.name.startswith("jobs.broken-") and aside.read_bytes() == BOOKS[case]
    assert "jobs.json" in told and aside.name in told and told.isprintable()
    book.note(out, preset("smoke"), [book.JobEntry("1", "local", ("rl",), "folder")])
    assert [job.job for job in book.noted(out)] == ["1"] and book.repair(out) == ""


def test_a_start_with_a_broken_book(tmp_path):
    "The whole command: one warning, and the run goes on."
    place_book(b"[]", tmp_path / "run")
    status, _, err = Launched(*TEACHER, "--set", "teacher.iterations=1", cwd=tmp_path).end()
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert status == 0 and len(warnings) == 1 and "jobs.broken-" in warnings[0], err
    assert [job.stages for job in book.noted(tmp_path / "run")] == [("teacher",)]


def test_another_version(launch, tmp_path, capsys):
    "A configuration that this version doesn't know: jobs can be cancelled, the status can't be told."
    place_book(JOBS.replace('"seed"', '"sead"').encode(), tmp_path / "run")
    assert launch.main(["status", "run"]) == 2
    assert "jobs.json: stored configuration does not fit this version of marval: " in said(capsys)
    assert launch.main(["cancel", "run"]) == 2 and "was started on this machine" in said(capsys)


SPECIAL = {
    "a pipe": os.mkfifo,
    "a folder": os.mkdir,
    "an endless file": lambda path: os.symlink("/dev/zero", path),
    "a link to nowhere": lambda path: os.symlink("/nowhere/at/all", path),
    "a link to itself": lambda path: os.symlink(path, path),
}


@pytest.mark.parametrize("what", SPECIAL)
@pytest.mark.parametrize("name", ["jobs/jobs.json", "lock", "teacher/log.jsonl", "jobs/J/1_0_log.err",
                                  "jobs/lock"])
def test_no_regular_file(what, name, launch, tmp_path, capsys):
    "Nothing that is no file is waited for, or read for ever."
    entry = dict(job="1", cluster="local", stages=["teacher"], folder="/elsewhere/J")
    place_book(JOBS.replace('"jobs": []', f'"jobs": [{json.dumps(entry)}]').encode(), tmp_path / "run")
    path = tmp_path / "run" / "state" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    SPECIAL[what](path)
    begin = time.monotonic()
    for word in ("status", "logs", "cancel"):
        status = launch.main([word, "run"])
        out, err = capsys.readouterr()
        assert status in (0, 2) and (status == 0 or err.startswith("error: ") and err.count("\n") == 1), err
    assert time.monotonic() - begin < SECONDS


def test_a_log_that_steers_the_terminal(launch, tmp_path, capsys):
    "Escape sequences of a stranger's log are shown, not obeyed; and a log lies beside its book."
    entry = dict(job="1", cluster="local", stages=["teacher"], folder="/etc")
    place_book(JOBS.replace('"jobs": []', f'"jobs": [{json.dumps(entry)}]').encode(), tmp_path / "run")
    log = tmp_path / "run" / "state" / "jobs" / "etc" / "1_0_log.out"
    log.parent.mkdir()
    log.write_bytes(b"\x1b]0;title\x07 \xc2\x9b31m \xff\rdone\n" * 3)
    for more in ([], ["--follow"]):
        assert launch.main(["logs", "run", "--stage", "teacher", *more]) == 0
        out = capsys.readouterr().out
        assert "\\x1b]0;title\\x07" in out and all(c.isprintable() or c in "\n\r" for c in out)


# ---- what a refused launch leaves

def test_two_launches(launch, tmp_path, capsys):
    "While one launcher is at work, another one changes nothing: neither the book nor the folders of jobs."
    out = tmp_path / "run"
    book.note(book.jobs_folder(out).mkdir(parents=True) or out, preset("smoke"),
              [book.JobEntry("1", "local", ("rl",), "folder")])
    with book.launching(out):
        before = contents(out / "state")
        assert launch.main([*TEACHER[:-1], str(out)]) == 2
        assert f"is in use by process {os.getpid()}" in said(capsys)
        assert {k: v for k, v in contents(out / "state").items() if k.name != "lock"} == {
            k: v for k, v in before.items() if k.name != "lock"}
        assert sorted(p.name for p in book.jobs_folder(out).iterdir()) == ["jobs.json", "lock"]
    with book.launching(out): pass


def test_a_launch_that_fails(launch, tmp_path, monkeypatch, capsys):
    "The book can't be written: nothing runs on, no folder of jobs is left, the book is as it was."
    out, started = tmp_path / "run", []
    book.note(book.jobs_folder(out).mkdir(parents=True) or out, preset("smoke"),
              [book.JobEntry("1", "local", ("rl",), "folder")])
    before = book.book_file(out).read_bytes()
    def full(*_): raise BadInput("cannot write jobs.json: No space left on device")
    submit = launch.executor_here
    def watched(*args):
        executor = submit(*args)
        inner = executor.submit
        executor.submit = lambda job: started.append(inner(job)) or started[-1]
        return executor
    monkeypatch.setattr(book, "note", full)
    monkeypatch.setattr(launch, "executor_here", watched)
    assert launch.main([*TEACHER[:-1], str(out)]) == 2
    assert "No space left" in said(capsys) and book.book_file(out).read_bytes() == before
    assert started[0]._process.wait(60) != 0
    assert [p.name for p in book.jobs_folder(out).iterdir() if p.is_dir()] == []


def test_folders_are_closed(tmp_path):
    "What submitit pickles is run: nobody else may put a file there, and the name is not to be guessed."
    before = os.umask(0)
    try: folders = [book.new_folder(tmp_path) for _ in range(3)]
    finally: os.umask(before)
    assert len(set(folders)) == 3 and all(stat.S_IMODE(f.stat().st_mode) == 0o700 for f in folders)
    jobs = book.jobs_folder(tmp_path / "other")
    jobs.parent.mkdir(parents=True)
    jobs.symlink_to(tmp_path)
    with pytest.raises(BadInput, match="is a link"), book.launching(tmp_path / "other"): pass


# ---- anything at all

OPTIONS = ("--scale", "--stage", "--cluster", "--out", "--seed", "--set", "--data", "--vae", "--teacher",
           "--reward", "--names", "--redo", *(f"--{name}" for name in NUMBERS), "--mem", "--time", *SLURMS,
           "--setup", "--sbatch", "--debug", "status", "logs", "cancel", "--", "-")
FIELDS = ("teacher.lr", "model.width", "rl.reward", "evaluate.n", "sampling.K", "x", "data.path")
WORDS = st.one_of(
    st.sampled_from([*SCALES, *pipeline.STAGES, "all", "local", "slurm", "auto", "0", "1", "-1", "64G",
                     "1-00"]),
    st.text(max_size=20), st.characters(codec=None), st.integers().map(str), st.floats().map(str),
    st.tuples(st.sampled_from(FIELDS), st.one_of(st.text(max_size=9), st.integers().map(str),
                                                 st.floats().map(str))).map("=".join))
ARGUMENTS = st.lists(st.tuples(st.sampled_from(OPTIONS), st.lists(WORDS, max_size=2)), max_size=5).map(
    lambda pairs: [word for option, words in pairs for word in (option, *words)])


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(argv=ARGUMENTS, whole=st.booleans())
@example(argv=["--scale", "smoke", "--set", "teacher.batch=1048576"], whole=True)
@example(argv=["--scale", "tiny", "--set", "model.width=16384"], whole=True)
def test_any_arguments(argv, whole, launch, capsys):
    "Random arguments of a dry run: 0, or 2 and one line; never a traceback, and never long."
    plan = [*(["--scale", "smoke"] if whole else []), *argv, "--dry-run"]
    if "--debug" in plan: plan.remove("--debug")
    capsys.readouterr()
    begin = time.monotonic()
    try: status = launch.main(plan)
    except SystemExit as e: status = e.code  # --help, in disguise
    assert status in (0, 2) and time.monotonic() - begin < SECONDS, plan
    if status == 2: said(capsys)
