"""A real Slurm of one node, on loopback, started here and stopped here: Debian's packages slurm-wlm and munge, with folders, ports and a key of their own.
Jobs of two gloo processes through the whole graph, taken away in the middle."""
import ctypes
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, digests, environment, last_step

pytestmark = pytest.mark.slow
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])      # daemons live where only root looks
CONF = """
ClusterName=marval
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
EnforcePartLimits=ALL
KillWait=5
MinJobAge=3600
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=64000
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def daemon(*command, log):
    "A process that does not outlive this one."
    die = lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM)            # PR_SET_PDEATHSIG
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=open(log, "ab"), stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=die, env={**os.environ, "PATH": PATH})


def mine(conf, **also):
    "Ids of processes of this cluster's jobs, known by their environment."
    want, found = [f"{k}={v}".encode() for k, v in dict(SLURM_CONF=conf, **also).items()], []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if set(want) <= set(path.read_bytes().split(b"\0")): found.append(int(path.parent.name))
        except OSError: pass
    return [pid for pid in found if pid != os.getpid()]


class Cluster:
    "What one does on a login node."
    def __init__(self, conf):
        self.conf = conf
        self.env = environment(PATH=PATH, SLURM_CONF=str(conf))
        self.env = {k: v for k, v in self.env.items() if k == "SLURM_CONF" or not k.startswith(("SBATCH_", "SLURM_", "SUBMITIT_"))}

    def tool(self, *command):
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, timeout=60)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def launch(self, *argv): return subprocess.run([sys.executable, str(LAUNCH), *map(str, argv)], capture_output=True, text=True, env=self.env, timeout=300)

    def state(self, job): return self.tool("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait(self, condition, what, timeout=300):
        end = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < end, f"waited {timeout} s in vain for {what}\n{self.tool('squeue', '--states=all')}"
            time.sleep(0.1)

    def back_in_the_queue(self, job):
        "Wait until Slurm has taken a job back; then let it start at once, not in two minutes."
        self.wait(lambda: self.state(job) == "PENDING", f"job {job} to be queued again", 180)
        self.tool("scontrol", "update", f"JobId={job}", "StartTime=now")


def free_ports(n):
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets: s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets: s.close()
    return ports


@pytest.fixture(scope="module")
def cluster():
    "A cluster of one node."
    missing = [name for name in PROGRAMS if not shutil.which(name, path=PATH)]
    if missing: pytest.skip(f"no {missing[0]} here; to run the tests on a real Slurm: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="marval-slurm-"))
    folder.chmod(0o755)
    conf, key, daemons = folder / "slurm.conf", folder / "munge.key", []
    try:
        import pwd
        conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], user=pwd.getpwuid(os.getuid()).pw_name, folder=folder, ports=free_ports(2)))
        key.write_bytes(secrets.token_bytes(64))
        key.chmod(0o600)
        for name in ("state", "spool"): (folder / name).mkdir()
        os.environ["SLURM_CONF"] = str(conf)                            # the daemons' children need it
        start = lambda name, *options: daemons.append(daemon(shutil.which(name, path=PATH), *options, log=folder / f"{name}.log"))
        start("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")
        start("slurmctld", "-D", "-f", str(conf))
        start("slurmd", "-D", "-f", str(conf))
        cluster, end = Cluster(conf), time.monotonic() + 60
        idle = lambda: subprocess.run(["sinfo", "--noheader", "--format=%T"], capture_output=True, text=True, env=cluster.env).stdout.strip() == "idle"
        while not idle():
            said = "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in folder.glob("*.log"))
            assert time.monotonic() < end and all(d.poll() is None for d in daemons), f"Slurm does not start\n{said}"
            time.sleep(0.2)
        yield cluster
    finally:
        if daemons: subprocess.run(["scancel", "--state=PENDING,RUNNING,SUSPENDED"] + [f"--user={os.getuid()}"], capture_output=True, env={**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}, timeout=60)
        os.environ.pop("SLURM_CONF", None)
        for d in reversed(daemons): d.terminate()
        for d in daemons:
            try: d.wait(15)
            except subprocess.TimeoutExpired: d.kill()
        for pid in mine(conf):
            try: os.kill(pid, signal.SIGKILL)
            except ProcessLookupError: pass
        shutil.rmtree(folder, ignore_errors=True)


TWO = ("--scale", "smoke", "--tasks-per-node", "2")
LONGER = ("--set", "teacher.iterations=200", "distill.iterations=40", "rl.iterations=16", "log.sample_every=1000")


def jobs(out): return {stage: job for stage, job in re.findall(r"^(\w+) +job (\d+) ", out, re.M)}


def step(out, stage):
    "How far a stage's last checkpoint is; 0 = there is none."
    return last_step(out / "state" / stage)


def test_found(cluster):
    "auto sees that a controller answers."
    done = cluster.launch(*TWO, "--dry-run")
    assert done.returncode == 0 and "\ncluster slurm" in done.stdout and done.stdout.count("#SBATCH --ntasks-per-node=2") == 3 and done.stdout.count("#SBATCH --ntasks-per-node=1") == 2


def test_taken_away_and_back(cluster, tmp_path):
    """All stages as jobs of two processes. The teacher's is preempted by USR2, that of distillation is killed by `scontrol requeue`; both come again, and the weights are those of two processes
    on this machine that nobody disturbed."""
    out, here, start = tmp_path / "run", tmp_path / "here", time.monotonic()
    done = cluster.launch(*TWO, "--out", out, *LONGER)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    job = jobs(done.stdout)
    assert list(job) == ["teacher", "judges", "distill", "rl", "evaluate"]
    for stage, act in (("teacher", ("scancel", "--signal=USR2")), ("distill", ("scontrol", "requeue"))):
        cluster.wait(lambda: list((out / "state" / stage).glob("checkpoint-*")), f"a checkpoint of {stage}")
        cluster.tool(*act, job[stage])
        cluster.back_in_the_queue(job[stage])
        assert not (out / "state" / stage / "done.json").exists() and not list(out.rglob("*.tmp*"))
        print(f"{stage}: {' '.join(act)} at step {step(out, stage)}, {time.monotonic() - start:.0f} s after the start")
        assert 0 < step(out, stage)
    cluster.wait(lambda: cluster.state(job["evaluate"]) not in ("PENDING", "RUNNING", "COMPLETING"), "the last job to end")
    print(f"all jobs: {time.monotonic() - start:.0f} s")
    said = cluster.launch("status", out)
    assert said.returncode == 0 and [line.split()[:4] for line in said.stdout.splitlines()[1:6]] == [[stage, "done", job[stage], "completed"] for stage in job], said.stdout
    logs = next((out / "state" / "jobs").glob("*/*_0_log.out")).parent
    told = (logs / f"{job['teacher']}_0_log.out").read_text() + (logs / f"{job['teacher']}_0_log.err").read_text()
    assert told.count("[1/1] teacher: goes on") == 1 and len(re.findall(r"Requeued job", told)) == 1 and "Traceback" not in told
    assert "[1/1] distill: goes on" in (logs / f"{job['distill']}_0_log.out").read_text()
    ports = {line for f in logs.glob(f"{job['teacher']}_*_log.out") for line in re.findall(r"process \d of 2 meets the others at (\S+)", f.read_text())}
    assert len(ports) == 2                                              # one for each start, the same for both processes
    done = cluster.launch(*TWO, "--cluster", "local", "--out", here, *LONGER)
    assert done.returncode == 0, done.stderr
    assert digests(out) == digests(here)


def test_looked_after(cluster, tmp_path):
    "status, logs and cancel; a second start while jobs are in the queue is refused; a job that runs out of time comes again."
    out = tmp_path / "run"
    argv = (*TWO, "--out", out, "--set", "teacher.iterations=1000000", "log.checkpoint_every=1000000", "log.sample_every=1000000")
    job = jobs(cluster.launch(*argv).stdout)
    log = out / "state" / "teacher" / "log.jsonl"
    cluster.wait(lambda: log.exists() and log.stat().st_size, "the teacher to learn")
    said = [line.split() for line in cluster.launch("status", out).stdout.splitlines()]
    assert said[1][:2] == ["teacher", "step"] and said[1][5:7] == [job["teacher"], "running"] and [row[1:5] for row in said[2:6]] == [["to", "do", job[row[0]], "pending"] for row in said[2:6]]
    shown = cluster.launch("logs", out)
    assert shown.returncode == 0 and "[1/1] teacher" in shown.stdout and f"{job['teacher']}_0_log.out" in shown.stdout
    refused = cluster.launch("logs", out, "--stage", "rl")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1 and "rl" in refused.stderr
    again = cluster.launch(*argv)
    assert again.returncode == 2 and again.stderr.count("\n") == 1 and (job["teacher"] in again.stderr or "in use" in again.stderr)
    cluster.tool("scontrol", "update", f"JobId={job['teacher']}", "TimeLimit=1")        # time is up: Slurm sends USR2 by itself
    cluster.wait(lambda: cluster.state(job["teacher"]) == "PENDING", "the job to be queued again", 180)
    reached = step(out, "teacher")
    assert reached > 0                                                  # no checkpoint was due: it saved itself when it was told to go
    cluster.tool("scontrol", "update", f"JobId={job['teacher']}", "TimeLimit=60", "StartTime=now")
    cluster.wait(lambda: f'"step": {(reached // 10 + 2) * 10},' in log.read_text(), "the teacher to go on")
    gone = cluster.launch("cancel", out)
    assert gone.returncode == 0 and gone.stdout.count("is taken back") == 5, gone.stderr
    cluster.wait(lambda: all(cluster.state(j) == "CANCELLED" for j in job.values()), "the jobs to end", 120)
    cluster.wait(lambda: not mine(cluster.conf, SLURM_JOB_ID=job["teacher"]), "the processes to end", 120)
    assert "nothing to cancel" in cluster.launch("cancel", out).stdout
    assert step(out, "teacher") > reached and not list(out.rglob("*.tmp*"))             # TERM was enough to save


def test_failing_rank_ends_the_job(cluster, tmp_path):
    "One of two processes is killed: the job fails at once, and what waited for it is dropped."
    out = tmp_path / "run"
    job = jobs(cluster.launch(*TWO, "--out", out, "--set", "teacher.iterations=1000000", "log.sample_every=1000000").stdout)
    cluster.wait(lambda: step(out, "teacher"), "a checkpoint")
    [victim] = [pid for pid in mine(cluster.conf, SLURM_JOB_ID=job["teacher"], SLURM_PROCID="1") if b"submitit.core._submit" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    cluster.wait(lambda: cluster.state(job["teacher"]) == "FAILED", "the job to fail", 120)
    cluster.wait(lambda: all(cluster.state(j) == "CANCELLED" for s, j in job.items() if s != "teacher"), "the others to be dropped", 120)
    cluster.wait(lambda: not mine(cluster.conf, SLURM_JOB_ID=job["teacher"]), "the processes to end", 120)
    assert "failed" in cluster.launch("status", out).stdout


@pytest.mark.parametrize("extra", [("--partition", "nowhere"), ("--nodes", "5", "--tasks-per-node", "2", "--set", *(f"{s}.batch=80" for s in ("teacher", "distill", "rl"))), ("--sbatch", "gres=unicorn:1")], ids=["partition", "nodes", "gres"])
def test_refused(extra, cluster, tmp_path):
    "Slurm's own words, in one line, and nothing is left in the queue."
    before = cluster.tool("squeue", "--noheader")
    done = cluster.launch("--scale", "smoke", "--out", tmp_path / "run", *extra)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: sbatch refused the job of stage teacher: "), done.stderr
    assert cluster.tool("squeue", "--noheader") == before
    print(done.stderr)
