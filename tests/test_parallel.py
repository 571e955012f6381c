"The number of processes, and of parts that a batch is cut into, is not part of the result."
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
import torch
from conftest import environment

STAGES = ("teacher", "distill", "rl")
CASES = (*STAGES, "dropout", "contexts")             # contexts: distillation whose two networks learn from one batch
DROPOUT = ["model.dropout=0.1"]
SHARDED = ["compute.sharding=fsdp"]


def build(kind, overrides):
    "A stage at smoke scale, 20 steps long, on real digits and untrained networks."
    from marval.config import override, preset
    from marval.data import load_digits_data, to_images, to_latents
    from marval.distill import DistillStage
    from marval.mar import MAR, patchify
    from marval.rewards import ClassifierReward, DigitNet
    from marval.rl import RLStage
    from marval.teacher import TeacherStage
    from marval.train import Resident
    cfg = override(preset("smoke"), [*(f"{s}.iterations=20" for s in STAGES), "log.checkpoint_every=100", "log.sample_every=20", *overrides])
    images, labels = load_digits_data()
    tokens = patchify(to_latents(images), cfg.model.patch_size)
    torch.manual_seed(0)
    net, reward = MAR(cfg.model).eval(), ClassifierReward(DigitNet())
    tokens = tokens.to(net.mask_token.dtype)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)          # the head starts at zero: wake it
    if kind == "teacher": return cfg, TeacherStage(cfg, Resident(tokens, labels))
    if kind == "distill": return cfg, DistillStage(cfg, net, Resident(tokens, labels), to_images)
    return cfg, RLStage(cfg, net, reward, to_images)


def work(jobs):
    """What a process of these tests does: train stages one after another, in float64 or float32, and keep what they have made. `stop` = n: the last rank, and it alone, is
    asked to stop in step n. Blocks are compiled without the kernels, which take a minute to build on a CPU."""
    from marval import train
    from marval.mar import save_weights
    from marval.parallel import group, on_first, rank, world
    torch.set_num_threads(1)
    train._BACKEND = "aot_eager"
    with group():
        for folder, kind, overrides, double, stop in jobs:
            torch.set_default_dtype(torch.float64 if double else torch.float32)
            cfg, stage = build(kind, overrides)
            step = stage.step
            def stopping(i, generator):
                if i + 1 == stop and rank() == world() - 1: os.kill(os.getpid(), signal.SIGINT)
                return step(i, generator)
            stage.step = stopping
            try: train.fit(stage, Path(folder), 0, cfg.log, progress=False)
            except train.Interrupted as e: print(f"rank {rank()}: {e}", flush=True)
            student = train.consolidated(stage.student)
            on_first(lambda: save_weights(student, Path(folder) / "student.safetensors"))


def run(*work):
    "Each (number of ranks, jobs) in processes of its own, side by side; returns what they printed."
    started = [rank for world, jobs in work for rank in start(world, jobs)]
    ended = end(started, 1800)
    for rank, (_, err) in zip(started, ended): assert rank.returncode == 0, err
    return "".join(out for out, _ in ended)


def end(ranks, seconds):
    "What each has printed, (stdout, stderr), within so many seconds for all of them; none outlives this call."
    last = time.monotonic() + seconds
    try: return [rank.communicate(timeout=max(1, last - time.monotonic())) for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None: rank.kill()
            rank.wait()


def start(world, jobs, *program):
    "`work`, or another program, on so many ranks."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]), WORLD_SIZE=str(world))
    return [subprocess.Popen([sys.executable, *(program or (__file__,)), *(jobs if program else [json.dumps(jobs)])], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=environment(**place, RANK=str(r), LOCAL_RANK=str(r))) for r in range(world)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "Folder with all runs, named case-world, and what the interrupted ones said. In float64, so that rounding hides nothing; fp32 and bf16 are cases of their own."
    out = tmp_path_factory.mktemp("parallel")
    job = lambda name, kind, overrides=(), double=True, stop=None: (str(out / name), kind, list(overrides), double, stop)
    cases, single = [*((kind, kind, []) for kind in STAGES), ("dropout", "teacher", DROPOUT), ("contexts", "distill", ["distill.share=contexts"])], lambda name, *o: [job(f"{kind}-{name}", kind, o, double=False) for kind in STAGES]
    half = lambda way, *o: [job(f"{kind}-{way}", kind, o, stop=10) for kind in STAGES]
    straight = lambda n, *more: [job(f"{name}-{n}", kind, [*o, *more]) for name, kind, o in cases]
    parts = [job(f"{name}-parts", kind, [*o, "compute.accumulate=4"]) for name, kind, o in cases]
    blocks = [job("dropout-blocks", "teacher", [*DROPOUT, "compute.recompute=blocks", "compute.accumulate=2"]), job("rl-blocks", "rl", ["compute.recompute=blocks"])]
    low = [job(f"{kind}-2fbf16", kind, [*SHARDED, "compute.precision=bf16"], double=False) for kind in ("distill", "rl")]
    sharded = straight("2f", *SHARDED) + low + [*(job(f"{kind}-compiled", kind, [*SHARDED, "compute.compile=on"]) for kind in ("teacher", "distill")),
                                          job("dropout-2fparts", "teacher", [*DROPOUT, *SHARDED, "compute.accumulate=2", "compute.recompute=blocks"])]
    said = run((1, half("1to2") + half("1to2f", *SHARDED) + straight(1) + parts + blocks), (1, single("fp32") + single("bf16", "compute.precision=bf16")),
               (2, half("2to1") + straight(2) + [job("teacher-2parts", "teacher", ["compute.accumulate=2"])] + single("fp32-2")), (2, half("2fto1", *SHARDED) + sharded))
    said += run((2, [job(f"{kind}-1to2", kind) for kind in STAGES]), (2, [job(f"{kind}-1to2f", kind, SHARDED) for kind in STAGES]), (1, [job(f"{kind}-{way}", kind) for kind in STAGES for way in ("2to1", "2fto1")]))
    return out, said


def checkpoint(folder):
    "The last checkpoint, read without the help of the package: steps done, name -> weights and averages."
    from safetensors.torch import load_file
    last, pieces = max(folder.glob("checkpoint-*")), {}
    for file in sorted(last.glob("*.safetensors")):
        for name, x in load_file(file).items():
            if name.startswith("modules/"): pieces.setdefault(".".join(name.split("/")[1:]), []).append(x)
    return json.loads((last / "manifest.json").read_text())["step"], {k: torch.cat(xs) if len(xs) > 1 else xs[0] for k, xs in pieces.items()}


def weights(runs, name): return checkpoint(runs[0] / name)[1]


def off(runs, a, b):
    "Largest difference of two runs' weights and averages, over the largest weight."
    (i, x), (j, y) = checkpoint(runs[0] / a), checkpoint(runs[0] / b)
    assert x.keys() == y.keys() and i == j == 20
    worst = max(float((x[k] - y[k]).abs().max()) for k in x) / max(float(v.abs().max()) for v in x.values())
    print(f"{a} against {b}: {worst:.1e}")
    return worst


def log(runs, name): return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in (runs[0] / name / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("ranks", ["2", "2f"], ids=["replicated", "sharded"])
def test_two_ranks_are_one(runs, case, ranks):
    "Weights, averages, log, pictures and the network that is kept."
    from marval.mar import load_weights
    mine, one = f"{case}-{ranks}", f"{case}-1"
    assert off(runs, mine, one) < 1e-6
    for row, same in zip(log(runs, mine), log(runs, one), strict=True): assert row == pytest.approx(same, rel=1e-4, abs=1e-6)
    assert (runs[0] / mine / "samples" / "000020.png").read_bytes() == (runs[0] / one / "samples" / "000020.png").read_bytes()
    kept, alone = (load_weights(runs[0] / name / "student.safetensors").state_dict() for name in (mine, one))
    average = {k.split(".", 1)[1]: v for k, v in weights(runs, mine).items() if k.startswith(("ema.", "student."))}
    assert kept.keys() == alone.keys() == average.keys()
    for k, v in kept.items(): assert v.equal(average[k]) and v.shape == alone[k].shape and torch.allclose(v, alone[k], rtol=0, atol=1e-6), k


def test_shares(runs):
    "Two ranks write a folder of about equal files, and nothing else."
    shards = max((runs[0] / "distill-2f").glob("*checkpoint*"))
    sizes = {p.name: p.stat().st_size for p in shards.iterdir()}
    print(shards.name, sizes)
    assert shards.name == "checkpoint-00000020" and sizes.keys() == {"manifest.json", "00000-00000.safetensors", "00001-00000.safetensors"}
    assert sizes["00001-00000.safetensors"] > 0.8 * sizes["00000-00000.safetensors"]


def test_compiled_and_parts(runs):
    "Compiled blocks, accumulation and recomputed blocks within sharded networks."
    assert max(off(runs, "teacher-compiled", "teacher-1"), off(runs, "distill-compiled", "distill-1"), off(runs, "dropout-2fparts", "dropout-1")) < 1e-6


@pytest.mark.parametrize("case", STAGES)
@pytest.mark.parametrize("way", ["1to2", "2to1", "1to2f", "2fto1"])
def test_goes_on_with_another_number(runs, case, way):
    "Stopped after 10 steps, by a signal to the last rank alone; all stop after the same step, and others go on, from a file or (f) a folder of shares."
    assert off(runs, f"{case}-{way}", f"{case}-1") < 1e-6
    for mine, theirs in zip(log(runs, f"{case}-{way}"), log(runs, f"{case}-1"), strict=True): assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert len(re.findall(f"rank . *: {case} stopped at step 10 of 20", runs[1])) == 6


@pytest.mark.parametrize("case", CASES)
def test_accumulation(runs, case):
    "Four parts one after another are one batch."
    assert off(runs, f"{case}-parts", f"{case}-1") < 1e-6
    if case == "teacher": assert off(runs, "teacher-2parts", "teacher-1") < 1e-6


@pytest.mark.parametrize("case", ["dropout", "rl"])
def test_recomputed_blocks(runs, case):
    "Activation checkpointing changes nothing: within parts of a batch and with dropout, within the roll-out's own checkpoints."
    assert off(runs, f"{case}-blocks", f"{case}-1") < 1e-6


@pytest.mark.parametrize("case", STAGES)
def test_two_ranks_in_fp32(runs, case):
    "Rounding, which Adam enlarges where the true gradient is zero, is all that is left."
    assert off(runs, f"{case}-fp32-2", f"{case}-fp32") < 5e-4
    for mine, theirs in zip(log(runs, f"{case}-fp32-2"), log(runs, f"{case}-fp32"), strict=True): assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", STAGES)
def test_bf16(runs, case):
    "Another result, but a close one; what is kept is float32 and finite."
    kept = weights(runs, f"{case}-bf16").values()
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in kept) and 1e-5 < off(runs, f"{case}-bf16", f"{case}-fp32") < 0.05
    for mine, theirs in zip(log(runs, f"{case}-bf16"), log(runs, f"{case}-fp32"), strict=True):
        print({k: (round(mine[k], 4), round(theirs[k], 4)) for k in theirs})
        key = "phi" if case == "distill" else "loss"                           # theta's own loss has expectation 0 at every theta
        assert mine[key] == pytest.approx(theirs[key], rel=0.05)


@pytest.mark.parametrize("case", ["distill", "rl"])
def test_sharded_bf16(runs, case):
    "Frozen networks are stored in two types, which their shares must survive: what is left is the rounding of sums."
    assert off(runs, f"{case}-2fbf16", f"{case}-bf16") < 0.02


def test_killed_while_saving(runs):
    "Rank 0 is killed in its second save, when the shares are written and the manifest is not: the first one counts, and what was left of the second is cleared away."
    script = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import test_parallel
from marval import checkpoint
finish, saves = checkpoint._finish, []
def dying(*args):
    saves.append(1)
    if len(saves) == 2: os.kill(os.getpid(), signal.SIGKILL)
    return finish(*args)
checkpoint._finish = dying
test_parallel.work([(sys.argv[2], "teacher", [*test_parallel.SHARDED, "log.checkpoint_every=5"], True, None)])
"""
    folder = runs[0] / "teacher-killed"
    ranks = start(2, [str(Path(__file__).parent), str(folder)], "-c", script)
    try: assert ranks[0].wait(timeout=300) == -signal.SIGKILL
    finally:
        for rank in ranks: rank.kill()
        end(ranks, 60)
    assert {p.name for p in folder.glob("*checkpoint*")} == {"checkpoint-00000005", ".checkpoint.tmp"}
    assert {p.name for p in (folder / ".checkpoint.tmp").iterdir()} == {"00000-00000.safetensors", "00001-00000.safetensors"} and checkpoint(folder)[0] == 5
    run((1, [(str(folder), "teacher", [], True, None)]))
    assert off(runs, "teacher-killed", "teacher-1") < 1e-6 and {p.name for p in folder.glob("*checkpoint*")} == {"checkpoint-00000005", "checkpoint-00000020"}


def test_impossible_batch(tmp_path):
    "A batch that can't be cut is refused in one line."
    from marval.config import BadInput
    with pytest.raises(BadInput, match="teacher.batch=16 in 1 x 3 parts .* expected a multiple of 3"): build("teacher", ["compute.accumulate=3"])


def test_pipeline(tmp_path):
    "A run folder served by two ranks: rank 0 keeps the books, a finished stage is skipped by both, a refusal reaches both. Sharded, the same weights are kept."
    script = """
import sys
from pathlib import Path
from marval import pipeline
from marval.config import BadInput, override, preset
cfg, out = override(preset("smoke"), ["teacher.iterations=6"]), Path(sys.argv[1])
print([pipeline.run(cfg, ("teacher",), out)["teacher"] for _ in range(2)])
try: pipeline.run(override(cfg, ["compute.precision=bf16"]), ("teacher",), out)
except BadInput as e: print(e)
pipeline.run(override(cfg, ["compute.sharding=fsdp"]), ("teacher",), out.with_name("sharded"))
"""
    ranks = start(2, [str(tmp_path / "run")], "-c", script)
    ended = end(ranks, 600)
    for rank, (printed, err) in zip(ranks, ended):
        assert rank.returncode == 0, err
        assert "['done', 'skipped']" in printed and "compute.precision=fp32, now compute.precision=bf16" in printed
    assert sum("[1/1] teacher: finished before, skipped" in printed for printed, _ in ended) == 1
    assert (tmp_path / "run" / "teacher.safetensors").exists() and (tmp_path / "run" / "state" / "teacher" / "done.json").exists()
    from marval.mar import load_weights
    whole, shared = (load_weights(tmp_path / name / "teacher.safetensors").state_dict() for name in ("run", "sharded"))
    assert whole.keys() == shared.keys() and max(float((v - shared[k]).abs().max()) for k, v in whole.items()) < 1e-4


if __name__ == "__main__": work(json.loads(sys.argv[1]))
