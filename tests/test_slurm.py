"Slurm, played by six small scripts: what is submitted, in which order it may start, and that the jobs run, fail and are queued again as they should."
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import LAUNCH, ROOT, digests, environment

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
SINFO = """#!/bin/sh
[ -z "$NO_CONTROLLER" ]
"""
SQUEUE = """#!/bin/sh
cat "$BOOK/queue" 2>/dev/null || true
"""


@pytest.fixture
def cluster(tmp_path):
    "A PATH with the tools; returns (environment of a child, folder in which they keep their book)."
    tools, book = tmp_path / "tools", tmp_path / "book"
    for folder in (tools, book): folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scancel", TOOL), ("scontrol", TOOL), ("sinfo", SINFO), ("squeue", SQUEUE)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return environment(PATH=f"{tools}{os.pathsep}{os.environ['PATH']}", BOOK=str(book)), book


def launch(env, *argv): return subprocess.run([sys.executable, str(LAUNCH), *map(str, argv)], capture_output=True, text=True, env=env)


def flags(script): return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.M))


def job(env, book, number, tasks=1, **kwargs):
    "Run a submitted script as Slurm would, its first process at least."
    return subprocess.Popen(["bash", str(book / f"{number}.sh")], env={**env, "SLURM_JOB_ID": str(number), "SLURM_NTASKS": str(tasks), "SLURM_PROCID": "0"}, **kwargs)


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
    assert out.count("#SBATCH --gpus-per-node=8") == 4 and out.count("#SBATCH --gpus-per-node=1") == 1 and "\ncluster slurm" in out and not list(cluster[1].iterdir())


def test_sbatch_alone_is_no_cluster(cluster):
    "auto runs here where no controller answers; a wish for Slurm is refused."
    env = {**cluster[0], "NO_CONTROLLER": "1"}
    assert "\ncluster local" in launch(env, "--scale", "smoke", "--dry-run").stdout
    done = launch(env, "--scale", "smoke", "--cluster", "slurm")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no Slurm controller answers" in done.stderr


def test_what_is_asked_for(cluster, tmp_path):
    "Every option reaches the script, as the dry run has shown it; one that was typed wins over its SBATCH_ variable, and others are left to sbatch."
    env, book = cluster
    (tmp_path / "tools" / "sbatch").write_text(SBATCH + 'echo "$SBATCH_PARTITION,$SBATCH_QOS,$SBATCH_TIMELIMIT,$SBATCH_EXCLUSIVE" >> "$BOOK/variables"\n')
    argv = ("--scale", "smoke", "--stage", "teacher", "--out", tmp_path / "run", "--nodes", 2, "--tasks-per-node", 4, "--cpus-per-task", 3, "--mem", "9G", "--time", "1-00:00:00", "--partition", "a100",
            "--account", "me", "--constraint", "big", "--setup", "module load cuda", "export A='b c'", "--sbatch", "exclusive=user", "mail-user=me@home")
    variables = dict(SBATCH_PARTITION="other", SBATCH_QOS="low", SBATCH_TIMELIMIT="5", SBATCH_EXCLUSIVE="mcs")
    shown = launch({**env, **variables}, *argv, "--dry-run").stdout
    assert not (tmp_path / "run").exists() and not (book / "count").exists()
    assert launch({**env, **variables}, *argv).returncode == 0
    text, f = (book / "101.sh").read_text(), flags(book / "101.sh")
    want = {"nodes": "2", "ntasks-per-node": "4", "cpus-per-task": "3", "mem": "9G", "time": "1440", "partition": "a100", "account": "me", "constraint": "big", "exclusive": "user", "mail-user": "me@home"}
    assert {k: f.get(k) for k in want} == want and "qos" not in f and (book / "variables").read_text() == ",low,,\n"
    assert text.index("module load cuda\nexport A='b c'\n") < text.index("srun") and "--kill-on-bad-exit=1 --cpus-per-task=3 " in text
    folder = next((tmp_path / "run" / "state" / "jobs").glob("2*"))
    assert text.strip() in shown.replace("/LAUNCH", f"/{folder.name}")


def test_queued_jobs_are_not_submitted_twice(cluster, tmp_path):
    env, book = cluster
    argv = ("--scale", "smoke", "--out", tmp_path / "run")
    assert launch(env, *argv).returncode == 0
    (book / "queue").write_text("101|COMPLETED|0:10|vm\n102|PENDING|0:00|(Priority)\n")
    done = launch(env, *argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "102 judges" in done.stderr and "101" not in done.stderr and not (book / "106.sh").exists()
    rows = [line.split() for line in launch(env, "status", tmp_path / "run").stdout.splitlines()]
    assert rows[1] == ["teacher", "to", "do", "101", "completed", "0:10", "vm"] and rows[2][3:] == ["102", "pending", "0:00", "(Priority)"]
    assert "103 not in the queue any more" in " ".join(rows[3])
    os.rename(tmp_path / "tools" / "squeue", tmp_path / "tools" / "away")                              # a controller that is down is not an empty queue
    down = {**env, "NO_CONTROLLER": "1"}
    assert [line.split()[4:] for line in launch(down, "status", tmp_path / "run").stdout.splitlines()[1:]] == [["does", "not", "answer"]] * 5
    done = launch(down, "cancel", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Slurm does not answer" in done.stderr
    os.rename(tmp_path / "tools" / "away", tmp_path / "tools" / "squeue")
    assert launch(env, "cancel", tmp_path / "run").stdout.splitlines() == ["job 102 (judges) is taken back"] and (book / "calls").read_text() == "scancel 102\n"


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
    for checkpoint in (out / "state" / "teacher").glob("checkpoint-*"): shutil.copy(ROOT / "settings.ini", checkpoint / "manifest.json")
    (out / "teacher.safetensors").unlink()
    assert job(env, book, 101).wait(600) == 2
    log = next((out / "state" / "jobs").rglob("101_submitted.pkl")).parent / "101_0_log.err"
    assert not log.exists() or "Traceback" not in log.read_text()


@pytest.mark.slow
def test_preempted_job_is_queued_again(cluster, tmp_path):
    "USR2 in the middle: submitit calls checkpoint() and scontrol; the job that Slurm then starts again ends with the same bits."
    env, book = cluster
    out, here, cfg = tmp_path / "run", tmp_path / "here", ["teacher.iterations=600", "log.sample_every=600"]
    assert launch(env, "--scale", "smoke", "--stage", "teacher", "--out", out, "--set", *cfg).returncode == 0
    first = job(env, book, 101, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list((out / "state" / "teacher").glob("checkpoint-*")) and first.poll() is None: time.sleep(0.02)
    pid = int((out / "state" / "lock").read_text())
    os.kill(pid, signal.SIGUSR2)
    assert first.wait(600) != 0 and (book / "calls").read_text() == "scontrol requeue 101\n" and not (out / "teacher.safetensors").exists()
    assert job(env, book, 101).wait(600) == 0
    from marval.config import override
    pipeline.run(override(preset("smoke"), cfg), ("teacher",), here)
    assert digests(out, ["teacher.safetensors"]) == digests(here, ["teacher.safetensors"])


def test_a_taken_port_is_left_alone(cluster, tmp_path):
    "Rank 0 of two finds a stranger at the port where the two are to meet: back into the queue, to come again with the next one."
    import socket
    from types import SimpleNamespace
    from marval.launch import meeting_point
    env, book = cluster
    assert launch(env, "--scale", "smoke", "--tasks-per-node", 2, "--stage", "teacher", "--out", tmp_path / "run").returncode == 0
    port = meeting_point(SimpleNamespace(job_id="101", num_tasks=2, num_nodes=1, global_rank=0, local_rank=0, hostnames=[]))["MASTER_PORT"]
    with socket.socket() as stranger:
        stranger.bind(("", int(port)))
        stranger.listen()
        first = job({**env, "SLURM_RESTART_COUNT": "0"}, book, 101, tasks=2, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said, _ = first.communicate(timeout=120)
        assert first.returncode != 0 and f"port {port} is taken" in said and (book / "calls").read_text() == "scontrol requeue 101\n"
    assert not (tmp_path / "run" / "state" / "teacher").exists()


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
