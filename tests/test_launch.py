"The command line: every kind of bad input is one clear line and exit status 2, and leaves nothing behind."
import json
import os
import re
import resource
import shutil
import subprocess

import pytest
from conftest import Launched, contents, digests

from marval import pipeline
from marval.config import preset

BAD = {
    "no scale": ([], "--scale"),
    "unknown scale": (["--scale", "gigantic"], "'gigantic'"),
    "unknown stage": (["--scale", "smoke", "--stage", "vae"], "'vae'"),
    "unknown cluster": (["--scale", "smoke", "--cluster", "cloud"], "'cloud'"),
    "unknown option": (["--scale", "smoke", "--gpus", "8"], "--gpus"),
    "seed of the wrong type": (["--scale", "smoke", "--seed", "one"], "'one'"),
    "negative seed": (["--scale", "smoke", "--seed", "-1"], "seed=-1"),
    "K > tokens": (["--scale", "smoke", "--set", "sampling.K=17"], "1 to 16"),
    "K < 1": (["--scale", "smoke", "--set", "sampling.K=0"], "sampling.K=0"),
    "unknown reveal schedule": (["--scale", "smoke", "--set", "sampling.reveal=sine"], "cosine, linear"),
    "cfg < 0": (["--scale", "smoke", "--set", "sampling.cfg=-0.5"], "sampling.cfg=-0.5"),
    "cfg NaN": (["--scale", "smoke", "--set", "sampling.cfg=nan"], "sampling.cfg=nan"),
    "unknown field": (["--scale", "smoke", "--set", "distill.rate=1"], "distill.rate"),
    "wrong type": (["--scale", "smoke", "--set", "rl.batch=many"], "rl.batch=many: expected a whole number"),
    "no value": (["--scale", "smoke", "--set", "rl.batch"], "field=value"),
    "not one of the choices": (["--scale", "smoke", "--set", "distill.loss=l2"], "sim, gsim, sid"),
    "a reward of later": (["--scale", "smoke", "--set", "rl.reward=pickscore"], "classifier or clip"),
    "missing teacher": (["--scale", "smoke", "--stage", "distill"], "needs teacher.safetensors in runs/smoke; run --stage teacher first"),
    "missing student": (["--scale", "smoke", "--stage", "rl"], "run --stage distill first"),
    "out below a file": (["--scale", "smoke", "--out", "file/run"], "file/run"),
    "out is a file": (["--scale", "smoke", "--out", "file"], "file"),
    "out in /proc": (["--scale", "smoke", "--out", "/proc/run"], "/proc/run"),
    "no Slurm": (["--scale", "smoke", "--cluster", "slurm"], "sbatch"),
    "no data": (["--scale", "base"], "--data is missing"),
    "no folder of data": (["--scale", "base", "--data", "nowhere", "--vae", "file"], "nowhere: no such folder"),
    "no cache": (["--scale", "large", "--stage", "teacher"], "run --stage cache first"),
    "no tokenizer": (["--scale", "huge", "--data", ".", "--cluster", "local"], "--vae is missing"),
    "no file of the tokenizer": (["--scale", "huge", "--data", ".", "--vae", "kl16.ckpt"], "kl16.ckpt: no such file"),
    "no reward": (["--scale", "huge", "--data", ".", "--vae", "file"], "--reward is missing"),
    "no teacher's file": (["--scale", "huge", "--stage", "teacher", "--teacher", "huge.pth"], "huge.pth: no such file"),
    "a foreign teacher": (["--scale", "huge", "--stage", "teacher", "--teacher", "file"], "file"),
    "an empty path": (["--scale", "huge", "--vae", ""], "--vae ''"),
    "a cache of digits": (["--scale", "smoke", "--stage", "cache"], "'cache'"),
    "data of digits": (["--scale", "digits", "--data", "."], "--data: scale digits brings all it needs"),
    "a teacher of digits": (["--scale", "smoke", "--teacher", "file"], "--teacher"),
    "no nodes": (["--scale", "huge", "--nodes", "0"], "--nodes=0: expected a whole number in [1, 1024]"),
    "nodes of the wrong type": (["--scale", "huge", "--nodes", "two"], "'two'"),
    "17 GPUs": (["--scale", "huge", "--gpus-per-node", "17"], "expected a whole number in [0, 16]"),
    "-1 GPUs": (["--scale", "huge", "--gpus-per-node", "-1"], "expected a whole number in [0, 16]"),
    "GPUs for digits": (["--scale", "digits", "--gpus-per-node", "1"], "runs on the CPU"),
    "two processes on four GPUs": (["--scale", "huge", "--gpus-per-node", "4", "--tasks-per-node", "2"], "one process for each GPU"),
    "no time": (["--scale", "huge", "--time", "0"], "--time 0"),
    "a time in words": (["--scale", "huge", "--time", "a week"], "D-HH:MM:SS"),
    "memory without a unit": (["--scale", "huge", "--mem", "64"], "480G"),
    "sbatch's short options": (["--scale", "huge", "--sbatch", "p=a100"], "--sbatch 'p=a100'"),
    "our own options for sbatch": (["--scale", "huge", "--sbatch", "partition=a100"], "expected --partition"),
    "a batch that can't be cut": (["--scale", "huge", "--nodes", "3"], "teacher.batch=2048 in 24 x 8 parts"),
    "a batch that can't be cut, here": (["--scale", "smoke", "--tasks-per-node", "3"], "teacher.batch=16 in 3 x 1 parts"),
    "Slurm's options here": (["--scale", "smoke", "--partition", "a100"], "--partition: an option of Slurm jobs"),
    "two nodes here": (["--scale", "smoke", "--nodes", "2"], "a run on this machine has one"),
    "status of nothing": (["status", "nowhere"], "nowhere: no such folder"),
    "status of another folder": (["status", "."], "nothing was started there"),
    "logs of nothing": (["logs", "nowhere"], "nowhere: no such folder"),
    "cancel what": (["cancel"], "RUN"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, launch, tmp_path, monkeypatch, capsys):
    argv, clue = BAD[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    (tmp_path / "file").write_text("in the way")
    before = contents(tmp_path)
    assert launch.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and clue in err
    assert contents(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_input_as_typed(tmp_path):
    status, out, err = Launched("--scale", "smoke", "--set", "sampling.K=99", cwd=tmp_path).end()
    assert (status, out) == (2, "") and re.fullmatch(r"error: sampling\.K=99: .*\n", err) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
def test_bad_teacher(kind, launch, tmp_path, monkeypatch, capsys):
    "A teacher put into the folder by hand is opened before anything is done."
    from marval.mar import MAR, save_weights
    monkeypatch.chdir(tmp_path)
    cfg, file = preset("digits" if kind == "another shape" else "smoke").model, tmp_path / "run" / "teacher.safetensors"
    file.parent.mkdir()
    save_weights(MAR(cfg), file)
    if kind == "truncated": file.write_bytes(file.read_bytes()[:5000])
    if kind == "foreign": file.write_bytes(b"PK\x03\x04 something else entirely")
    before = contents(tmp_path)
    assert launch.main(["--scale", "smoke", "--stage", "distill", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: run/teacher.safetensors") and err.count("\n") == 1 and contents(tmp_path) == before


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "A run folder with a finished teacher."
    out = tmp_path_factory.mktemp("taught") / "run"
    assert pipeline.run(preset("smoke"), ("teacher",), out) == {"teacher": "done"}
    return out


def test_other_settings(launch, taught, capsys):
    "The first field that differs is named, with both values; nothing is touched. Settings that don't concern the stage don't count."
    before = contents(taught)
    assert launch.main(["--scale", "smoke", "--stage", "teacher", "--out", str(taught), "--set", "teacher.lr=0.5"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and all(clue in err for clue in ("stage teacher", "teacher.lr=0.001", "teacher.lr=0.5", "--out"))
    assert launch.main(["--scale", "smoke", "--stage", "teacher", "--out", str(taught), "--seed", "1"]) == 2
    assert "seed=0, now seed=1" in capsys.readouterr().err
    assert launch.main(["--scale", "smoke", "--stage", "teacher", "--out", str(taught), "--set", "rl.lr=0.5", "log.sample_every=1"]) == 0
    assert "finished before" in capsys.readouterr().out and contents(taught) == before


@pytest.mark.parametrize("damage", [lambda b: b[:-100], lambda b: b[:-1] + bytes([b[-1] ^ 1])], ids=["truncated", "one bit"])
def test_damaged_product(damage, launch, taught, tmp_path, capsys):
    "A finished product that has changed since is neither used nor overwritten."
    out = tmp_path / "run"
    shutil.copytree(taught, out)
    file = out / "teacher.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    before = contents(out)
    for stage in ("teacher", "distill", "all"):
        assert launch.main(["--scale", "smoke", "--stage", stage, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {file} ") and err.count("\n") == 1 and contents(out) == before


def test_removed_product_is_made_again(taught, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(taught, out)
    (out / "teacher.safetensors").unlink()
    assert pipeline.run(preset("smoke"), ("teacher",), out) == {"teacher": "done"}
    assert digests(out, ["teacher.safetensors"]) == digests(taught, ["teacher.safetensors"])


@pytest.mark.parametrize("kind", ["truncated", "foreign"])
def test_bad_checkpoint(kind, taught, tmp_path):
    "Found inside the job: the same one line, the same exit status."
    out = tmp_path / "run"
    shutil.copytree(taught, out)
    for name in ("teacher.safetensors", "state/teacher/done.json"): (out / name).unlink()
    file = max((out / "state" / "teacher").glob("checkpoint-*")) / "00000-00000.safetensors"
    if kind == "truncated": file.write_bytes(file.read_bytes()[:5000])
    else: shutil.copy(taught / "teacher.safetensors", file)
    before = digests(out, [file])
    if kind == "truncated":
        status, _, err = Launched("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", out).end()
    else:
        status, err = pipeline.guarded(preset("smoke"), ("teacher",), out)
        err += "\n"
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "checkpoint-" in err
    assert digests(out, [file]) == before and not (out / "teacher.safetensors").exists()


def test_folder_in_use(launch, tmp_path, capsys):
    held = pipeline.lock(tmp_path / "run")
    assert launch.main(["--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"in use by process {os.getpid()}" in err
    held.close()
    pipeline.lock(tmp_path / "run", wait=0).close()


def whole(out):
    "No temporary file is left, and what is there can be read."
    files = [p for p in out.rglob("*") if p.is_file()]
    assert not [p for p in files if ".tmp" in p.name]
    for p in files:
        if p.suffix == ".json": json.loads(p.read_text())


def test_no_file_may_grow(taught, tmp_path):
    "A refusal of the system in the middle of saving, by a limit on the size of files; without the limit the run goes on to the same bits."
    out, limit = tmp_path / "run", 150_000
    argv = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", out)
    status, _, err = Launched(*argv, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))).end()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "checkpoint-" in lines[0] and "File too large" in lines[0] and "Traceback" not in err
    whole(out)
    assert not (out / "teacher.safetensors").exists()
    assert Launched(*argv).end()[0] == 0 and digests(out, ["teacher.safetensors"]) == digests(taught, ["teacher.safetensors"])


@pytest.fixture
def small_disk(tmp_path):
    "A function that mounts a memory file system; the options say how small."
    disk = tmp_path / "disk"
    disk.mkdir()
    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
        if subprocess.run(command, capture_output=True).returncode: pytest.skip("mounting a small disk takes root")
        return disk
    yield mount
    subprocess.run(["umount", str(disk)], capture_output=True)


def test_disk_full(small_disk):
    "A disk that is full after so many files, in the middle of a run."
    disk = small_disk("size=50m,nr_inodes=18")
    argv = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", disk / "run")
    status, _, err = Launched(*argv).end()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "No space left on device" in lines[0] and "Traceback" not in err, err
    whole(disk / "run")


def test_disk_too_small(small_disk):
    "One of 600 kB is refused before anything is written."
    disk = small_disk("size=600k")
    argv = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", disk / "run")
    status, out, err = Launched(*argv).end()
    assert status == 2 and out == "" and "the run would write about 2" in err and "614 kB are free there" in err, err
    assert err.count("\n") == 1 and list(disk.iterdir()) == []


@pytest.mark.parametrize("scale, size", [("smoke", "0.047 M"), ("digits", "0.550 M"), ("base", "207.9 M"), ("large", "478.3 M"), ("huge", "942.4 M")])
def test_dry_run(scale, size, launch, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--scale", scale, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    head, *scripts = out.split("\n# ---- ")
    plan, *more, job = head.strip().split("\n\n")
    big = scale in ("base", "large", "huge")
    rows = {line.split()[0]: line for line in [*plan.splitlines()[1:], *job.splitlines()]}
    assert [[line.split()[0] for line in table.splitlines()[2:]] for table in more] == ([["teacher", "distill", "rl"]] if big else [])
    assert all(stage in rows for stage in pipeline.graph(preset(scale))) and all(size in rows[stage] for stage in pipeline.STAGES if stage != "cache")
    for stage in ("teacher", "distill", "rl"): assert re.search(rf" {getattr(preset(scale), stage).iterations} +{getattr(preset(scale), stage).batch} ", rows[stage])
    assert f"runs/{scale}" in rows["folder"] and rows["GPUs"].split()[1] == ("8" if big else "none")
    assert [s.splitlines()[0] for s in scripts] == (["cache", "teacher, after cache", "distill, after teacher", "rl, after distill", "evaluate, after rl"] if big else []) and ("--data is missing" in head) == big
    for s, before in zip(scripts[1:], pipeline.STAGES): assert f"#SBATCH --dependency=afterok:JOB_OF_{before.upper()}\n" in s and "-m submitit.core._submit" in s
    assert err == "" and not list(tmp_path.iterdir())


def test_a_teacher_from_a_file_changes_the_graph(launch, tmp_path, capsys):
    "Its job asks for one GPU and waits for no cache of its own."
    assert launch.main(["--scale", "huge", "--teacher", str(tmp_path / "huge.pth"), "--nodes", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    script = out.split("\n# ---- ")[2]
    assert [line.split()[0] for line in out.split("\n\n")[1].splitlines()[2:]] == ["distill", "rl"] and script.startswith("teacher, after cache") and "--gpus-per-node=1\n" in script and "--nodes=1\n" in script and "\nGPUs    16 " in out and out.count("--nodes=2\n") == 3


def test_big_scale_without_gpus(launch, tmp_path, monkeypatch):
    "Asked for last, when everything else is there."
    from marval.config import BadInput
    from marval.launch import resources
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BadInput, match="scale huge asks for 8 GPUs, and this machine has 0"): launch.fit_here(resources("huge", {}), "huge")
    assert launch.fit_here(resources("huge", dict(gpus_per_node=0)), "huge").world == 1


def test_status_logs_and_cancel_of_a_local_run(launch, reference, capsys):
    out, _ = reference
    before = contents(out)
    assert launch.main(["status", str(out)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [[stage, "done", "-", "this", "machine"] for stage in pipeline.DIGITS]
    assert launch.main(["logs", str(out), "--stage", "rl", "--lines", "1000"]) == 0
    assert "[4/5] rl" in capsys.readouterr().out
    assert launch.main(["cancel", str(out)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "was started on this machine" in err and contents(out) == before


def test_dry_run_knows_the_folder(launch, taught, capsys):
    before = contents(taught)
    assert launch.main(["--scale", "smoke", "--out", str(taught), "--dry-run"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line}
    assert rows["teacher"][1] == "done" and rows["distill"][1:3] == ["to", "do"] and contents(taught) == before


def test_help(launch, capsys):
    with pytest.raises(SystemExit) as e: launch.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and "python slurm/launch.py --scale digits" in text
    for option in ("--scale", "--stage", "--cluster", "--out", "--seed", "--dry-run", "--set", "--data", "--vae", "--teacher", "--reward", "--names", "--nodes", "--gpus-per-node", "--partition", "--account", "--qos", "--constraint",
                   "--time", "--setup", "--sbatch"): assert option in text
    assert all(f"launch.py {word} RUN" in text for word in ("status", "logs", "cancel"))
