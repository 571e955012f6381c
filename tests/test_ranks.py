"""Ranks that come late, twice or never, that are killed, stopped or fail: whoever is left says so.

One process imports torch, and forks the ranks of each case from itself, so that a case takes seconds."""
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import LAUNCH, Launched, environment, wait_for

LATEST = 120 # seconds until every rank of a case must have ended, on a machine that is busy


# What a rank does once all have met.

def talk(n=100):
    from marval.parallel import anyone
    for _ in range(n):
        anyone(False)
        time.sleep(0.02)


def killed(): os.kill(os.getpid(), signal.SIGKILL)


def stopped(): os.kill(os.getpid(), signal.SIGSTOP)


def wrong():
    from marval.border import BadInput
    raise BadInput("weights.pth: no such file")


def mistaken(): raise KeyError("oops")


def busy(): time.sleep(LATEST)


def slow():
    "A rank that works for longer than another one may be silent."
    time.sleep(4)
    talk(1)


def again():
    "The group is left, and another one is formed."
    talk(1)


def frozen():
    "Everything on the machine stops for a while, this rank and its neighbour."
    talk(20)
    print("ready", flush=True)
    talk(200)


def ports():
    "The addresses at which this process listens."
    talk(1)
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if
            os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")}
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = row.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in mine: print(local.split(":")[0], flush=True)
    talk(1)


def forming():
    "Killed between the meeting and the first exchange."


def rank_of_a_case(what):
    "What a forked process does: join the others, act, and tell how it ended by its exit status and one line."
    from marval.border import BadInput
    from marval.meeting import LostRank, announce
    from marval.parallel import anyone, dist, group
    announce("stage teacher")
    if what == "forming": dist.init_process_group = lambda *_, **__: killed()
    try:
        for _ in range(2 if what == "again" else 1):
            with group():
                anyone(False)
                globals()[what]()
    except BadInput as e: status, line = 2, f"error: {e}"
    except LostRank as e: status, line = 1, f"error: {e}"
    else: status, line = 0, ""
    if line: print(line, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def zygote():
    "Fork the ranks that are asked for, one JSON line each: environment, what to do, a file for its output."
    import marval.parallel  # noqa: F401, what takes so long
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.update(asked["env"])
            for fd, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{asked['file']}.{name}", os.O_CREAT | os.O_WRONLY, 0o600), fd)
            try: rank_of_a_case(asked["what"])
            finally:
                import traceback
                traceback.print_exc()
                os._exit(9)
        print(pid, flush=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    "A function that starts a rank."
    parent = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=environment(TORCH_CPP_LOG_LEVEL="FATAL"))
    assert parent.stdout.readline() == "ready\n"
    folder, names = tmp_path_factory.mktemp("ranks"), iter(range(1000))

    def start(what, **env):
        file = folder / str(next(names))
        asked = dict(env={k: str(v) for k, v in env.items()}, what=what, file=str(file))
        print(json.dumps(asked), file=parent.stdin, flush=True)
        return Rank(int(parent.stdout.readline()), file)
    yield start
    parent.stdin.close()
    parent.kill()
    parent.wait()


class Rank:
    "A forked process. Its parent never asks, so it becomes a zombie when it ends, whose status can be read."
    def __init__(self, pid, file): self.pid, self.file = pid, file

    def stat(self): return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()

    def status(self):
        "As in `subprocess`; None while it runs."
        fields = self.stat()
        if fields[0] != "Z": return None
        code = int(fields[49])
        return -(code & 127) if code & 127 else code >> 8

    def said(self, name="err"): return Path(f"{self.file}.{name}").read_text()

    def kill(self):
        if self.status() is None: os.kill(self.pid, signal.SIGKILL)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def places(world, **env):
    "The environments of so many ranks."
    same = dict(WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(),
                MARVAL_MEET_TIMEOUT=LATEST, MARVAL_LOST_TIMEOUT=LATEST)
    return [dict(RANK=r, LOCAL_RANK=r, **same | env) for r in range(world)]


def end(ranks, seconds=LATEST):
    "Their exit statuses. None of them outlives this call."
    last = time.monotonic() + seconds
    try:
        found = [rank.status() for rank in ranks]
        while None in found and time.monotonic() < last:
            time.sleep(0.05)
            found = [rank.status() for rank in ranks]
        return found
    finally:
        for rank in ranks: rank.kill()


def one_line(rank, pattern):
    "What a rank has said is one line of this form."
    said = rank.said()
    assert re.fullmatch(f"error: {pattern}\n", said), said


DIED, ENDED = r"rank {} of 2 \(process \d+\) died in stage teacher", "rank {} of 2 ended in stage teacher: {}"
STILL = r"rank {} of 2 \(process \d+\) stood still for 2 s \(MARVAL_LOST_TIMEOUT\) in stage teacher"
FILE = r"weights\.pth: no such file"
CASES = {
    # name: what the two do, how they end, and what those that are left say
    "1 killed": (("talk", "killed"), (1, -9), DIED.format(1)),
    "0 killed": (("killed", "talk"), (-9, 1), DIED.format(0)),
    "1 killed before the first exchange": (("talk", "forming"), (1, -9), DIED.format(1)),
    "1 killed while 0 is busy": (("busy", "killed"), (1, -9), DIED.format(1)),
    "1 refuses": (("talk", "wrong"), (1, 2), ENDED.format(1, FILE)),
    "0 refuses": (("wrong", "talk"), (2, 1), ENDED.format(0, FILE)),
    "1 fails": (("talk", "mistaken"), (1, 9), ENDED.format(1, "KeyError: 'oops'")),
    "1 stopped": (("talk", "stopped"), (1, -9), STILL.format(1)),
    "0 stopped": (("stopped", "talk"), (-9, 1), STILL.format(0)),
    "0 slow": (("slow", "slow"), (0, 0), ""),
    "twice": (("again", "again"), (0, 0), ""),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks(case, start):
    "Whoever is left ends with one line that names the other, and those that stand still are killed."
    acts, statuses, line = CASES[case]
    patience = 2 if {"stopped", "slow"} & set(acts) else LATEST
    ranks = [start(act, **env) for act, env in zip(acts, places(2, MARVAL_LOST_TIMEOUT=patience))]
    assert tuple(end(ranks)) == statuses, [rank.said() for rank in ranks]
    for rank, status, act in zip(ranks, statuses, acts):
        if status == 1: one_line(rank, line)
        elif status == 2: one_line(rank, FILE)
        elif status != 9: assert rank.said() == ""


def test_three_ranks(start):
    "The neighbours of a rank that was killed say the same."
    ranks = [start(act, **env) for act, env in zip(("talk", "killed", "talk"), places(3))]
    assert end(ranks) == [1, -9, 1]
    for i in (0, 2): one_line(ranks[i], r"rank 1 of 3 \(process \d+\) died in stage teacher")


def test_all_stopped_at_once(start):
    "A laptop that slept: nobody was silent for longer than the others."
    ranks = [start("frozen", **env) for env in places(2, MARVAL_LOST_TIMEOUT=2)]
    last = time.monotonic() + LATEST
    while not all(rank.said("out") for rank in ranks) and time.monotonic() < last: time.sleep(0.05)
    for rank in ranks: os.kill(rank.pid, signal.SIGSTOP)
    time.sleep(4)
    for rank in ranks: os.kill(rank.pid, signal.SIGCONT)
    assert end(ranks) == [0, 0], [rank.said() for rank in ranks]


LOOPBACK = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}  # as /proc/net has it


def test_nobody_else_is_answered(start):
    "On one machine, ranks listen on the loopback interface alone."
    if not Path("/proc/net/tcp").exists(): pytest.skip("no /proc/net/tcp on this system")
    ranks = [start("ports", **env) for env in places(2)]
    assert end(ranks) == [0, 0], [rank.said() for rank in ranks]
    for rank in ranks:
        heard = rank.said("out").split()
        assert heard and set(heard) <= LOOPBACK, heard


@pytest.mark.parametrize("who, line", [
    (0, r"rank 1 of 2 did not come within 2 s \(MARVAL_MEET_TIMEOUT\); expected all ranks to start together"),
    (1, r"rank 0 is missing: nobody answers at 127\.0\.0\.1:\d+ \(Connection refused\) within 2 s .*"),
])
def test_alone(who, line, start):
    "A rank whose neighbour never comes."
    rank = start("talk", **places(2, MARVAL_MEET_TIMEOUT=2)[who])
    assert end([rank]) == [2]
    one_line(rank, line)


def test_many_missing(start):
    rank = start("talk", **places(30, MARVAL_MEET_TIMEOUT=1)[0])
    assert end([rank]) == [2]
    one_line(rank, "rank 1, 2, 3, 4, 5, 6, 7, 8 and 21 more of 30 did not come within 1 s .*")


def test_twice_and_of_two_minds(start):
    "Two processes with one rank; two that disagree on how many there are."
    envs = places(3)
    ranks = [start("talk", **env) for env in (envs[0], envs[1], envs[1])]
    assert sorted(end(ranks)) == [1, 1, 2]
    for rank in ranks: one_line(rank, "two processes have RANK=1; expected one for each rank")
    envs = places(2)
    ranks = [start("talk", **envs[0]), start("talk", **envs[1] | dict(WORLD_SIZE=3))]
    assert end(ranks) == [2, 1]
    for rank in ranks: one_line(rank, "rank 0 has WORLD_SIZE=2, rank 1 has 3; expected the same")


TAKEN = r"rank 0 can't listen at 127\.0\.0\.1:\d+ \(Address already in use\); expected a free port .*"


@pytest.mark.parametrize("stranger", ["silent", "talkative", "gone"])
def test_a_taken_port(stranger, start):
    "Rank 0 says so at once; rank 1, who can't know who it is that answers, in the time that it has."
    with socket.create_server(("127.0.0.1", 0)) as s:
        envs = places(2, MASTER_PORT=s.getsockname()[1])
        first, began = start("talk", **envs[0]), time.monotonic()
        second = start("talk", **envs[1] | dict(MARVAL_MEET_TIMEOUT=4))
        s.settimeout(0.1)
        met, last = [], time.monotonic() + LATEST
        while second.status() is None and time.monotonic() < last:
            try: met.append(s.accept()[0])
            except TimeoutError: continue
            if stranger == "talkative": met[-1].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n" * 100)
            if stranger == "gone": met.pop().close()
        assert end([first, second]) == [2, 2], [rank.said() for rank in (first, second)]
    assert time.monotonic() - began < LATEST
    one_line(first, TAKEN)
    one_line(second, r"what answers at 127\.0\.0\.1:\d+ is not rank 0 of this run; expected .*")


BAD = {
    "rank": (dict(RANK="abc"), "RANK=abc: expected a whole number"),
    "rank beyond": (dict(RANK=2), "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0: expected ranks from 0 to WORLD_SIZE"),
    "rank below": (dict(RANK=-1), "RANK=-1: expected a whole number in [0, 1048576]"),
    "superscript": (dict(RANK="²"), "RANK=²: expected a whole number"),
    "nobody": (dict(WORLD_SIZE=0), "WORLD_SIZE=0: expected a whole number in [1, 1048576]"),
    "no address": (dict(MASTER_ADDR=""), "the environment lacks MASTER_ADDR"),
    "no port": (dict(MASTER_PORT=""), "the environment lacks MASTER_PORT"),
    "port beyond": (dict(MASTER_PORT=70000), "MASTER_PORT=70000: expected a whole number in [1, 65535]"),
    "escape": (dict(MASTER_ADDR="a\x1b[31mb"), r"MASTER_ADDR=a\x1b[31mb: expected at most 253 printable"),
    "unknown": (dict(MASTER_ADDR="no.such.invalid"), "MASTER_ADDR='no.such.invalid' does not resolve"),
    "no name": (dict(MASTER_ADDR="a" * 70 + ".b"), "does not resolve"),
    "wait": (dict(MARVAL_MEET_TIMEOUT="soon"), "MARVAL_MEET_TIMEOUT=soon: expected a number in [1, 1000000]"),
    "no wait": (dict(MARVAL_MEET_TIMEOUT=0), "MARVAL_MEET_TIMEOUT=0: expected a number in [1, 1000000]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_environment(case, start):
    "A rank whose environment can't be meant."
    env, clue = BAD[case]
    rank = start("talk", **places(2, MARVAL_MEET_TIMEOUT=2)[0] | env)
    assert end([rank]) == [2], rank.said()
    assert clue in rank.said() and rank.said().count("\n") == 1 and rank.said().startswith("error: ")


# ---- the whole command

TWO = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--tasks-per-node", "2", "--out",
       "run", "--set", "teacher.iterations=1000000", "log.sample_every=1000000")


def process_of(run, rank):
    "The id of a rank of a run that was launched."
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getsid(int(folder.name)) != run.process.pid: continue
            works = b"core._submit" in (folder / "cmdline").read_bytes()
            name = f"SUBMITIT_LOCAL_GLOBALID={rank}\0".encode()
            if works and name in (folder / "environ").read_bytes(): return int(folder.name)
        except OSError: pass


@pytest.mark.parametrize("rank, number, what", [
    (1, signal.SIGKILL, "died"),
    pytest.param(0, signal.SIGKILL, "died", marks=pytest.mark.slow),
    pytest.param(1, signal.SIGSTOP, r"stood still for 5 s \(MARVAL_LOST_TIMEOUT\)", marks=pytest.mark.slow),
])
def test_launched(rank, number, what, tmp_path):
    "A run of two processes, one of which is killed or stopped in the middle: one line, and nothing is left."
    patience = "5" if number == signal.SIGSTOP else "60"
    run = Launched(*TWO, cwd=tmp_path, env=dict(MARVAL_LOST_TIMEOUT=patience))
    log = tmp_path / "run" / "state" / "teacher" / "log.jsonl"
    assert wait_for(lambda: log.exists() and log.stat().st_size, run.process)
    os.kill(process_of(run, rank), number)
    status, _, err = run.end(LATEST)
    line = rf"error: rank {rank} of 2 \(process \d+\) {what} in stage teacher; run the same command again .*"
    assert status == 1 and re.fullmatch(line, err.splitlines()[-1]), err
    assert err.count("error: ") == 1 and "Traceback" not in err and "[c10d]" not in err and run.gone()


def test_launched_at_a_taken_port(tmp_path):
    "Somebody else was faster at the port that the launcher has chosen: the launch ends at once."
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("launch", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.launch.free_port = lambda: int(sys.argv[2])
sys.exit(module.main(sys.argv[3:]))
"""
    with socket.create_server(("127.0.0.1", 0)) as s:
        command = [sys.executable, "-c", script, str(LAUNCH), str(s.getsockname()[1]), *TWO]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True,
                              timeout=LATEST)
    assert done.returncode == 2 and re.fullmatch(f"error: {TAKEN}\n", done.stderr), done.stderr


@pytest.mark.slow
def test_torchrun(tmp_path):
    "torchrun serves the store where ranks meet; the others then do not."
    script = tmp_path / "script.py"
    script.write_text("from marval.parallel import anyone, group, rank, world\n"
                      "with group(): print(f'rank {rank()} of {world()}: {anyone(rank() == 1)}')\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
               f"--master-port={free_port()}", script]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=2 * LATEST)
    assert done.returncode == 0, done.stderr
    assert all(f"rank {r} of 2: True" in done.stdout for r in range(2)), done.stdout


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    zygote()
