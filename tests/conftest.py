"What the tests share: the real command line as a process, and a few helpers."
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from marval.border import BadInput

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "slurm" / "launch.py"
SLOW_FIXTURES = {"runs"}
WEIGHTS = ("teacher.safetensors", "student.safetensors", "student_rl.safetensors",
           "judges/reward.safetensors", "judges/heldout.safetensors", "judges/clip.safetensors")


def environment(**more) -> dict:
    "The environment of a child: this checkout's package, one thread."
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


class Launched:
    "slurm/launch.py in a process group of its own, as a terminal would start it."
    def __init__(self, *args, cwd=None, **kwargs):
        self.process = subprocess.Popen([sys.executable, str(LAUNCH), *map(str, args)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        start_new_session=True, env=environment(**kwargs.pop("env", {})), **kwargs)

    def signal(self, number, group=True):
        "As Ctrl-C does, to the whole group; or to the launcher alone."
        (os.killpg if group else os.kill)(self.process.pid, number)

    def end(self, timeout=900):
        "Exit status, stdout, stderr."
        try: out, err = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.communicate()
            raise
        return self.process.returncode, out, err

    def gone(self, timeout=20):
        "Has every process of the group ended, the job included?"
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            try: os.killpg(self.process.pid, 0)
            except ProcessLookupError: return True
            time.sleep(0.1)
        return False


def wait_for(condition, process, timeout=600):
    "Wait until something is true, or the process has ended; returns whether it is true."
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if condition(): return True
        if process.poll() is not None: return condition()
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def outcome(f, /, *args, **kwargs):
    "What a call gives; a refusal has to be one printable line, and a short one."
    try: return f(*args, **kwargs)
    except BadInput as e:
        assert str(e).isprintable() and len(str(e)) < 2000
        return e


def digests(out: Path, names=WEIGHTS) -> dict: return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}


def contents(folder: Path) -> dict: return {p.relative_to(folder): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def pytest_collection_modifyitems(items):
    "Tests that ask for a fixture which takes minutes are slow."
    for item in items:
        if SLOW_FIXTURES.intersection(item.fixturenames): item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    "As many threads here as in the processes that tests start: another number rounds sums differently."
    import torch
    torch.set_num_threads(1)


def last_step(stage: Path) -> int:
    "Steps done by the last checkpoint in a stage's folder; 0 = there is none."
    from marval.checkpoint import newest, read_manifest
    path = newest(stage)
    return read_manifest(path).step if path else 0


@pytest.fixture(scope="session")
def launch():
    "slurm/launch.py as a module."
    spec = importlib.util.spec_from_file_location("launch", LAUNCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    "A whole run at smoke scale that nobody disturbed, through the real command; returns its folder and what it printed."
    out = tmp_path_factory.mktemp("reference") / "run"
    status, stdout, stderr = Launched("--scale", "smoke", "--cluster", "local", "--out", out).end()
    assert status == 0, stderr
    return out, stdout
