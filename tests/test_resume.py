"A run that is killed again and again ends with the bits of one that nobody disturbed."
import json
import random
import signal
import time

import pytest
from conftest import Launched, contents, digests, last_step, wait_for

from marval import pipeline
from marval.config import preset

ENDLESS = "teacher.iterations=1000000000"       # a run that a signal must find alive goes on until it is told
TIMES = {"seconds", "seconds_per_image", "seconds_per_image_fast", "speedup", "speedup_fast"}


def figures(out):
    "Everything in metrics.json but what a clock has measured."
    def strip(d): return {k: strip(v) for k, v in d.items() if k not in TIMES} if isinstance(d, dict) else d
    return strip(json.loads((out / "metrics.json").read_text()))


def seconds(out): return {stage: json.loads((out / "state" / stage / "done.json").read_text())["seconds"] for stage in pipeline.DIGITS}


def test_uninterrupted(reference):
    "Every product is there, the table is printed, and a second call has nothing to do."
    out, printed = reference
    assert all((out / name).is_file() for node in pipeline.DIGITS.values() for name in node.writes) and (out / "config.json").is_file()
    assert all(name in printed for name in ("teacher", "one_step_init", "student_rl", "FD", "diversity"))
    assert list((out / "state" / "teacher" / "samples").glob("*.png")) and (out / "state" / "distill" / "log.jsonl").is_file()
    assert "<img" in (out / "report.html").read_text() and "http" not in (out / "report.html").read_text().split("base64,")[0]
    before, weights = contents(out), digests(out)
    status, stdout, stderr = Launched("--scale", "smoke", "--cluster", "local", "--out", out).end()
    assert (status, stderr) == (0, "") and "nothing to do" in stdout and contents(out) == before
    assert set(pipeline.run(preset("smoke"), pipeline.select("all", preset("smoke")), out).values()) == {"skipped"} and digests(out) == weights


@pytest.mark.slow
def test_killed_at_five_random_moments(reference, tmp_path):
    """SIGKILL once in each stage, at a moment drawn at random from the time the stage takes; in turns for the whole process group and for the launcher alone, whose
    job must then end by itself. Then to the end."""
    out, length, seed, killed = tmp_path / "run", seconds(reference[0]), time.time_ns(), []
    rng, argv = random.Random(seed), ("--scale", "smoke", "--cluster", "local", "--out", out)
    print("seed of the moments:", seed)
    for i, stage in enumerate(pipeline.DIGITS):
        run, moment, logs = Launched(*argv), rng.uniform(0, 0.3) * length[stage], set((out / "state" / "jobs").glob("*/*_log.out"))
        reached = lambda: any(f"] {stage}" in log.read_text() for log in set((out / "state" / "jobs").glob("*/*_log.out")) - logs)
        assert wait_for(reached, run.process)
        time.sleep(moment)
        if run.process.poll() is not None: continue          # the machine has become faster since the reference
        run.signal(signal.SIGKILL, group=i % 2 == 0)
        run.end()
        assert run.gone(), "the job outlives its launcher"
        killed.append(stage)
        print(f"killed {moment:.1f} s into {stage}, of about {length[stage]:.1f} s")
    status, _, stderr = Launched(*argv).end()
    assert status == 0 and killed, stderr
    assert digests(out) == digests(reference[0]) and figures(out) == figures(reference[0])


@pytest.mark.parametrize("group, tasks", [(True, 1), (False, 1), pytest.param(True, 2, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGINT to the launcher", "Ctrl-C, two processes"])
def test_interrupted(group, tasks, tmp_path):
    "The step is finished and saved, the command to go on with is shown, nothing runs on; and it does go on."
    out = tmp_path / "run"
    argv = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", out, "--tasks-per-node", tasks, "--set", ENDLESS,
            "log.checkpoint_every=1000000", "log.sample_every=1000000")
    run = Launched(*argv)
    log = out / "state" / "teacher" / "log.jsonl"
    assert wait_for(lambda: log.exists() and log.stat().st_size > 0, run.process)
    run.signal(signal.SIGINT, group=group)
    status, _, stderr = run.end()
    last = stderr.splitlines()[-1]
    assert status == 130 and last.startswith("interrupted: teacher stopped at step ") and str(out) in last and "launch.py" in last and "Traceback" not in stderr
    assert run.gone()
    step = int(last.split("step ")[1].split()[0])
    assert last_step(out / "state" / "teacher") == step >= 10
    again = Launched(*argv)
    assert wait_for(lambda: max(json.loads(line)["step"] for line in log.read_text().splitlines() if line.endswith("}")) > step + 10, again.process)
    again.signal(signal.SIGTERM, group=False)
    status, _, stderr = again.end()
    assert status == 130 and int(stderr.splitlines()[-1].split("step ")[1].split()[0]) > step + 10


def test_second_interrupt_stops_at_once(tmp_path):
    "Outside the training loop there is no step to finish: a job that is slow to hear is killed by the second Ctrl-C."
    out = tmp_path / "run"
    run = Launched("--scale", "smoke", "--cluster", "local", "--stage", "teacher", "--out", out, "--set", ENDLESS)
    assert wait_for(lambda: list((out / "state" / "jobs").glob("*/*_log.out")), run.process)
    run.signal(signal.SIGINT)
    time.sleep(0.3)
    if run.process.poll() is None: run.signal(signal.SIGINT)
    status, _, stderr = run.end()
    assert status == 130 and stderr.splitlines()[-1].startswith("interrupted") and run.gone()
    assert not (out / "teacher.safetensors").exists()
