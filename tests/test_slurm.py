"Slurm, played by four small scripts: what is submitted, in which order it may start, and that the jobs run, fail and are queued again as they should."
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import LAUNCH, ROOT, contents, digests, environment

from marval import pipeline
from marval.config import preset

SBATCH = """#!/bin/sh
n=$(( $(cat "$BOOK/count" 2>/dev/null || echo 100) + 1 ))
if [ "$n" = "$FAIL_AT" ]; then echo "sbatch: error: Batch job submission failed: Invalid partition" >&2; exit 1; fi
echo $n > "$BOOK/count"
cp "$1" "$BOOK/$n.sh"
echo "Submitted batch job $n"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case "$1" in --output|--error) shift 2;; *) shift;; esac; done
exec "$@"
"""
TOOL = """#!/bin/sh
echo "$(basename "$0") $*" >> "$BOOK/calls"
"""


@pytest.fixture
def cluster(tmp_path):
    "A PATH with the four tools; returns (environment of a child, folder in which they keep their book)."
    tools, book = tmp_path / "tools", tmp_path / "book"
    for folder in (tools, book): folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scancel", TOOL), ("scontrol", TOOL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return environment(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", BOOK=str(book)), book


def launch(env, *argv): return subprocess.run([sys.executable, str(LAUNCH), *map(str, argv)], capture_output=True, text=True, env=env)


def flags(script): return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M))


def job(env, book, number, **kwargs):
    "Run a submitted script as Slurm would."
    return subprocess.Popen(["bash", str(book / f"{number}.sh")], env={**env, "SLURM_JOB_ID": str(number), "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, **kwargs)


def test_one_job_per_stage_in_order(cluster, tmp_path):
    env, book = cluster
    done = launch(env, "--scale", "smoke", "--out", tmp_path / "run")              # auto: there is an sbatch
    assert done.returncode == 0 and done.stderr == ""
    jobs = [flags(book / f"{n}.sh") for n in range(101, 106)]
    assert not (book / "106.sh").exists()
    assert [j["job-name"] for j in jobs] == [f"marval-smoke-{stage}" for stage in pipeline.DIGITS]
    assert [j.get("dependency") for j in jobs] == [None] + [f"afterok:{n}" for n in range(101, 105)]
    for j in jobs: assert "requeue" in j and j["signal"].startswith("USR2@") and j["open-mode"] == "append" and j["cpus-per-task"] == "2" and "gpus-per-node" not in j
    assert [line.split()[:3] for line in done.stdout.splitlines()[:5]] == [[stage, "job", str(101 + i)] for i, stage in enumerate(pipeline.DIGITS)]


def test_big_scales_ask_for_the_papers_gpus(cluster):
    out = launch(cluster[0], "--scale", "huge", "--dry-run").stdout
    assert "gpus_per_node = 8" in out and "cluster slurm" in out and not list(cluster[1].iterdir())


def test_jobs_run_fail_and_are_skipped(cluster, tmp_path):
    "The teacher's job makes the same weights as a run in this process; the next job, its teacher damaged, fails, so that afterok holds the rest back."
    env, book = cluster
    out, here = tmp_path / "run", tmp_path / "here"
    assert launch(env, "--scale", "smoke", "--out", out).returncode == 0
    assert job(env, book, 101).wait(600) == 0
    pipeline.run(preset("smoke"), ("teacher",), here)
    assert digests(out, ["teacher.safetensors"]) == digests(here, ["teacher.safetensors"])
    assert launch(env, "--scale", "smoke", "--out", out).returncode == 0           # what is finished is not submitted again
    assert flags(book / "106.sh")["job-name"] == "marval-smoke-judges" and "dependency" not in flags(book / "106.sh")
    shutil.copy(ROOT / "settings.ini", out / "state" / "teacher" / "checkpoint.pt")
    (out / "teacher.safetensors").unlink()
    assert job(env, book, 101).wait(600) == 2
    log = next((out / "state" / "jobs").rglob("101_submitted.pkl")).parent / "101_0_log.err"
    assert not log.exists() or "Traceback" not in log.read_text()


def test_preempted_job_is_queued_again(cluster, tmp_path):
    "USR2 in the middle: submitit calls checkpoint() and scontrol; the job that Slurm then starts again ends with the same bits."
    env, book = cluster
    out, here, cfg = tmp_path / "run", tmp_path / "here", ["teacher.iterations=60", "log.sample_every=60"]
    assert launch(env, "--scale", "smoke", "--stage", "teacher", "--out", out, "--set", *cfg).returncode == 0
    first = job(env, book, 101, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = out / "state" / "teacher" / "checkpoint.pt"
    while not checkpoint.exists() and first.poll() is None: time.sleep(0.02)
    pid = int((out / "state" / "lock").read_text())
    os.kill(pid, signal.SIGUSR2)
    assert first.wait(600) != 0 and (book / "calls").read_text() == "scontrol requeue 101\n" and not (out / "teacher.safetensors").exists()
    assert job(env, book, 101).wait(600) == 0
    from marval.config import override
    pipeline.run(override(preset("smoke"), cfg), ("teacher",), here)
    assert digests(out, ["teacher.safetensors"]) == digests(here, ["teacher.safetensors"])


def test_refused_submission(cluster, tmp_path):
    "sbatch's own words in one line; the jobs submitted before are taken back."
    env, book = cluster
    done = launch({**env, "FAIL_AT": "103"}, "--scale", "smoke", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: sbatch refused the job of stage distill") and "Invalid partition" in done.stderr
    assert (book / "calls").read_text().split() == ["scancel", "101", "scancel", "102"]


def test_no_srun(cluster, tmp_path):
    env, _ = cluster
    os.remove(tmp_path / "tools" / "srun")
    done = launch({**env, "PATH": str(tmp_path / "tools")}, "--scale", "smoke", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "srun" in done.stderr and not (tmp_path / "run").exists()
