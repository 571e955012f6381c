"The number of processes, and of parts that a batch is cut into, is not part of the result."
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import environment

STAGES = ("teacher", "distill", "rl")
DROPOUT = ["model.dropout=0.1"]


def build(kind, overrides):
    "A stage at smoke scale, 20 steps long, on real digits and untrained networks."
    from marval.config import override, preset
    from marval.data import load_digits_data, to_images, to_latents
    from marval.distill import DistillStage
    from marval.mar import MAR, patchify
    from marval.rewards import ClassifierReward, DigitNet
    from marval.rl import RLStage
    from marval.teacher import TeacherStage
    cfg = override(preset("smoke"), [*(f"{s}.iterations=20" for s in STAGES), "log.checkpoint_every=100", "log.sample_every=20", *overrides])
    images, labels = load_digits_data()
    tokens = patchify(to_latents(images), cfg.model.patch_size)
    torch.manual_seed(0)
    net, reward = MAR(cfg.model).eval(), ClassifierReward(DigitNet())
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)          # the head starts at zero: wake it
    if kind == "teacher": return cfg, TeacherStage(cfg, tokens, labels)
    if kind == "distill": return cfg, DistillStage(cfg, net, tokens, labels, to_images)
    return cfg, RLStage(cfg, net, reward, to_images)


def work(jobs):
    "What a process of these tests does: train stages one after another. `stop` = n: the last rank, and it alone, is asked to stop in step n."
    from marval.parallel import group, rank, world
    from marval.train import Interrupted, fit
    torch.set_num_threads(1)
    with group():
        for folder, kind, overrides, stop in jobs:
            cfg, stage = build(kind, overrides)
            step = stage.step
            def stopping(i, generator):
                if i + 1 == stop and rank() == world() - 1: os.kill(os.getpid(), signal.SIGINT)
                return step(i, generator)
            stage.step = stopping
            try: fit(stage, Path(folder), 0, cfg.log, progress=False)
            except Interrupted as e: print(f"rank {rank()}: {e}", flush=True)


def run(world, jobs):
    "`work` on so many ranks; returns what they printed."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(world))
    start = lambda r: subprocess.Popen([sys.executable, __file__, json.dumps(jobs)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                       env=environment(**place, RANK=str(r), LOCAL_RANK=str(r)))
    ranks = [start(r) for r in range(world)]
    ended = [rank.communicate(timeout=1800) for rank in ranks]
    for rank, (_, err) in zip(ranks, ended): assert rank.returncode == 0, err
    return "".join(out for out, _ in ended)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folder with all runs, named case-world, and what the interrupted ones said. Four processes: one rank, then two, then one again."
    out = tmp_path_factory.mktemp("parallel")
    job = lambda name, kind, overrides=(), stop=None: (str(out / name), kind, list(overrides), stop)
    cases = [*((kind, kind, []) for kind in STAGES), ("dropout", "teacher", DROPOUT)]
    once = [job(f"{name}-1", kind, o) for name, kind, o in cases]
    once += [job(f"{name}-parts", kind, [*o, "compute.accumulate=4"]) for name, kind, o in cases]
    once += [job(f"{kind}-blocks", kind, ["compute.recompute=blocks"]) for kind in STAGES] + [job("dropout-blocks", "teacher", [*DROPOUT, "compute.recompute=blocks", "compute.accumulate=2"])]
    once += [job(f"{kind}-bf16", kind, ["compute.precision=bf16"]) for kind in STAGES]
    said = run(1, once + [job(f"{kind}-1to2", kind, stop=10) for kind in STAGES])
    for kind in STAGES: shutil.copytree(out / f"{kind}-1to2", out / f"{kind}-half")
    said += run(2, [job(f"{name}-2", kind, o) for name, kind, o in cases] + [job("teacher-2parts", "teacher", ["compute.accumulate=2"])]
                + [job(f"{kind}-1to2", kind) for kind in STAGES] + [job(f"{kind}-2to1", kind, stop=10) for kind in STAGES])
    said += run(1, [job(f"{kind}-2to1", kind) for kind in STAGES])
    return out, said


def state(runs, name): return torch.load(runs[0] / name / "checkpoint.pt", weights_only=True)


def weights(runs, name): return {f"{m}.{k}": v for m, module in state(runs, name)["modules"].items() for k, v in module.items()}


def off(runs, a, b):
    "Largest difference of two runs' weights and averages, over the largest weight."
    x, y = weights(runs, a), weights(runs, b)
    assert x.keys() == y.keys() and state(runs, a)["step"] == state(runs, b)["step"] == 20
    worst = max(float((x[k] - y[k]).abs().max()) for k in x) / max(float(v.abs().max()) for v in x.values())
    print(f"{a} against {b}: {worst:.1e}")
    return worst


def log(runs, name): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (runs[0] / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", [*STAGES, "dropout"])
def test_two_ranks_are_one(runs, case):
    "Weights, averages, log and pictures."
    assert off(runs, f"{case}-2", f"{case}-1") < 1e-6
    for mine, theirs in zip(log(runs, f"{case}-2"), log(runs, f"{case}-1"), strict=True): assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert (runs[0] / f"{case}-2" / "samples" / "000020.png").exists()


@pytest.mark.parametrize("case", STAGES)
@pytest.mark.parametrize("way", ["1to2", "2to1"])
def test_goes_on_with_another_number(runs, case, way):
    "Stopped after 10 steps, by a signal to the last rank alone; all stop after the same step, and others go on."
    assert off(runs, f"{case}-{way}", f"{case}-1") < 1e-6
    for mine, theirs in zip(log(runs, f"{case}-{way}"), log(runs, f"{case}-1"), strict=True): assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert len(re.findall(f"rank . *: {case} stopped at step 10 of 20", runs[1])) == 3


@pytest.mark.parametrize("case", [*STAGES, "dropout"])
def test_accumulation(runs, case):
    "Four parts one after another are one batch."
    assert off(runs, f"{case}-parts", f"{case}-1") < 1e-6
    if case == "teacher": assert off(runs, "teacher-2parts", "teacher-1") < 1e-6


@pytest.mark.parametrize("case", [*STAGES, "dropout"])
def test_recomputed_blocks(runs, case):
    "Activation checkpointing changes nothing, dropout in parts of a batch included."
    assert off(runs, f"{case}-blocks", f"{case}-1") < 1e-6


@pytest.mark.parametrize("case", STAGES)
def test_bf16(runs, case):
    "Another result, but a close one; what is kept is float32 and finite."
    kept = weights(runs, f"{case}-bf16").values()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in kept) and 1e-6 < off(runs, f"{case}-bf16", f"{case}-1") < 0.05
    for mine, theirs in zip(log(runs, f"{case}-bf16"), log(runs, f"{case}-1"), strict=True):
        print({k: (mine[k], theirs[k]) for k in theirs})
        if case != "distill": assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_impossible_batch(tmp_path):
    "A batch that can't be cut is refused in one line."
    from marval.config import BadInput
    with pytest.raises(BadInput, match="teacher.batch=16 in 1 x 3 parts .* expected a multiple of 3"): build("teacher", ["compute.accumulate=3"])


if __name__ == "__main__": work(json.loads(sys.argv[1]))
