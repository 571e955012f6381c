"""How long a distillation step takes (one update of phi, one of theta) beside one of MAR's own training: same network, batch and precision, random weights and data.

All contestants work in turn, round after round, in one run; each round has its own amount of masking, spread over what occurs in the stage. Operations are counted by `marval.plan`, and one step of each is counted for real; the peak of the device is that of a
large matrix product, measured in the same run. Parts of a step are told apart by marks between forward and backward passes, in rounds of their own.

    python bench/distill.py                                        # on a GPU: base, 32 images, bf16
    python bench/distill.py --size huge --batch 16 --set compute.recompute=blocks
    python bench/distill.py --size base --batch 32 --compile --profile /tmp/step.json     # and a Chrome trace of one step of each
    python bench/distill.py --device cpu --size base --batch 2 --set model.depth=2 --set model.head_depth=1   # a sixth of base, on a CPU
    python bench/distill.py --device cpu --size smoke --batch 4 --rounds 2 --out /tmp/distill.json            # a trial, seconds
"""
import argparse
import json
import random
import statistics
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from marval import train
from marval.config import override, preset
from marval.distill import DistillStage
from marval.evaluate import run_provenance
from marval.files import write_json
from marval.mar import MAR
from marval.plan import Meter, training_step
from marval.teacher import TeacherStage, masked_count
from marval.train import Resident, step_generator, step_seed
from memory import known_answer, peak, stored
from sampling import DTYPES, clock, on_gpu, wait

GOAL = 2.6  # times a training step


class Mark(torch.autograd.Function):
    "The identity, which tells when it is passed on the way back."
    @staticmethod
    def forward(ctx, x, tell):
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.tell()
        return g, None


class Laps:
    "Time by part: all that passes between one mark and the next belongs to the first. Events on a GPU, so that nothing waits; processor time on a CPU."
    def __init__(self, device): self.gpu, self.marks = device == "cuda", []

    def mark(self, name):
        if self.gpu: now = torch.cuda.Event(enable_timing=True); now.record()
        else: now = time.process_time()
        self.marks.append((name, now))

    def shares(self) -> dict:
        wait("cuda" if self.gpu else "cpu")
        parts = {}
        for (name, a), (_, b) in zip(self.marks, self.marks[1:]): parts[name] = parts.get(name, 0) + (a.elapsed_time(b) if self.gpu else b - a)
        return {k: v / sum(parts.values()) for k, v in parts.items()}


def marked(laps, net, name):
    "Tell the contexts of a network from what follows, there and back. Undone by `del net.contexts`."
    plain = net.contexts
    def contexts(*args):
        laps.mark(f"contexts of {name}")
        c = plain(*args)
        laps.mark("heads and losses")
        return Mark.apply(c, lambda: laps.mark(f"contexts of {name}")) if c.requires_grad else c
    net.contexts = contexts


class Contestant:
    "A way of doing a step."
    def __init__(self, name, stage, cfg, meter, masks, parts):
        self.name, self.stage, self.cfg, self.meter, self.masks, self.times, self.parts = name, stage, cfg, meter, masks, {}, parts
        self.images = getattr(cfg, stage.name).batch

    def step(self, r):
        "One step with the masking of round r."
        s = self.stage
        if s.name == "teacher": i = self.masks[r][0]
        else: i, s.d, s.known = 10, self.cfg.distill, [self.masks[r]]
        s.step(i, step_generator(0, s.name, i, s.device))

    def cost(self, r):
        B, parts = self.images // self.cfg.compute.accumulate, self.cfg.compute.accumulate
        return training_step(self.cfg, self.stage.name, self.meter, B, self.masks[r][1] if self.stage.name == "teacher" else self.masks[r]) * parts

    def shares(self, r):
        "Of the parts of one step."
        laps = Laps(self.stage.device)
        for name, net in self.parts.items(): marked(laps, net, name)
        try:
            plain = train.sum_gradients
            with patch.object(train, "sum_gradients", lambda params: (laps.mark("optimisers and averages"), plain(params))):   # the first thing that an update does
                laps.mark("data and noise")
                self.step(r)
                laps.mark("end")
        finally:
            for net in self.parts.values(): del net.contexts
        return laps.shares()


def quantiles(cfg, rounds):
    "For each round, a step of the teacher whose masking is near the middle of its share of all, with its number of visible tokens; and for the student, a number of visible tokens."
    t, L = cfg.teacher, cfg.model.seq_len
    drawn = [1 - random.Random(step_seed(cfg.seed, "teacher/mask", i)).random() for i in range(10, 2000)]
    steps = [10 + min(range(len(drawn)), key=lambda j: abs(drawn[j] - (r + .5) / rounds)) for r in range(rounds)]
    return [(i, L - masked_count(L, t.mask_min, t.mask_std, drawn[i - 10])) for i in steps]


def contestants(args, cfg):
    m, device, B = cfg.model, args.device, cfg.distill.batch
    g = torch.Generator().manual_seed(0)
    data = Resident(torch.randn(2 * B, m.seq_len, m.token_dim, generator=g), torch.arange(2 * B) % m.class_num)
    teacher = TeacherStage(cfg, data, device, decode=lambda z: z)
    torch.manual_seed(0)
    with torch.device(device): net = MAR(m)
    with torch.no_grad():
        for p in net.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    student = DistillStage(cfg, net, data, lambda z: z, device=device)
    plain, dropping = (Meter(m, cfg.compute.precision, cfg.compute.recompute == "blocks", d) for d in (False, True))
    masks = quantiles(cfg, args.rounds)
    known = [student.known[int((r + .5) / args.rounds * len(student.known))] for r in range(args.rounds)]
    nets = {"theta": student.theta, "phi": student.phi, "the teacher": student.teacher}
    yield Contestant("MAR", teacher, cfg, dropping, masks, {"the network": teacher.model})
    for share in ("none", "contexts"):
        for mul in args.phi_mul:
            own = replace(cfg, distill=replace(cfg.distill, share=share, phi_mul=mul))
            yield Contestant(f"GSIM, share {share}, phi_mul {mul}", student, own, plain, known, nets)


def fastest(device, dtype, kind) -> float:
    "Operations a second of a large matrix product, the best of several."
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(clock(device, lambda: a @ b)[kind] for _ in range(10))


def measure(args, cfg) -> dict:
    kind, all_ = "seconds" if args.device == "cuda" else "cpu_seconds", list(contestants(args, cfg))
    ceiling = fastest(args.device, DTYPES[cfg.compute.precision], kind)
    for c in all_: c.step(0)                                                               # allocates the optimisers' averages, compiles
    for r in range(args.rounds):
        for c in all_ if args.device == "cuda" else (): c.step(r)                          # each length of sequence once, unmeasured
        for _ in range(args.repeats):
            for c in all_: c.times.setdefault(r, []).append(clock(args.device, lambda: c.step(r)))
        print(f"round {r + 1} of {args.rounds}", flush=True)
    rows, middle = {}, args.rounds // 2
    for c in all_:
        mean = lambda k: statistics.mean(statistics.median(t[k] for t in c.times[r]) for r in range(args.rounds))
        costs, seconds = [c.cost(r) for r in range(args.rounds)], mean(kind)
        flops = statistics.mean(p.both for p in costs)
        with FlopCounterMode(display=False) as counter: c.step(middle)
        s = c.stage
        rows[c.name] = {"seconds": mean("seconds"), "cpu_seconds": mean("cpu_seconds"), "images_per_second": c.images / seconds, "flops": flops, "mfu": flops / seconds / ceiling,
                        "counted_over_predicted": counter.get_total_flops() / costs[middle].both, "peak_bytes": max(peak(args.device, lambda: c.step(r)) for r in {0, args.rounds - 1}),
                        "predicted_bytes": max(p.bytes for p in costs) / cfg.compute.accumulate, "stored_bytes": stored(*s.modules().values(), *s.optimizers().values(), *([s.teacher] if s.name == "distill" else [])), "shares": c.shares(middle)}
    mar = rows["MAR"]
    for r in rows.values(): r |= {"ratio": (r[kind]) / mar[kind], "flops_ratio": r["flops"] / mar["flops"]}
    if args.profile: trace(args, all_, middle)
    return {"timed_by": kind, "peak_flops": ceiling, "instrument": known_answer(args.device), "goal": GOAL, "runs": rows}


def trace(args, all_, r):
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=kinds) as p:
        for c in all_:
            with torch.profiler.record_function(c.name): c.step(r)
        wait(args.device)
    p.export_chrome_trace(args.profile)


def arguments(argv=None):
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--size", default="base", choices=("smoke", "digits", "tiny", "base", "large", "huge"))
    p.add_argument("--batch", type=int, default=None, help="images a step (default: 32 on a GPU, 2 on a CPU)")
    p.add_argument("--precision", choices=tuple(DTYPES), default=None, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--accumulate", type=int, default=1, metavar="N", help="parts that the batch is worked off in")
    p.add_argument("--compile", action="store_true", help="torch.compile for the blocks that are trained")
    p.add_argument("--phi-mul", nargs="+", type=int, default=(4, 1), help="diffusion times a token and update of phi")
    p.add_argument("--rounds", type=int, default=4, help="amounts of masking")
    p.add_argument("--repeats", type=int, default=None, help="steps of each in a round, whose median counts (default: 5 on a GPU, 1 on a CPU)")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one step of each")
    p.add_argument("--out", type=Path, default=None, help="default: bench/results/distill_DEVICE.json")
    args = p.parse_args(argv)
    gpu = on_gpu(p, args, "distill")
    args.batch, args.precision, args.repeats = args.batch or (32 if gpu else 2), args.precision or ("bf16" if gpu else "fp32"), args.repeats or (5 if gpu else 1)
    return args


def main(argv=None):
    args = arguments(argv)
    facts = run_provenance() | {"threads": torch.get_num_threads()}
    cfg = override(preset(args.size), [f"teacher.batch={args.batch}", f"distill.batch={args.batch}", f"compute.precision={args.precision}", f"compute.accumulate={args.accumulate}",
                                       f"compute.compile={'on' if args.compile else 'off'}", "distill.phi_first=0", "distill.phi_updates=1", *args.set])
    cell = {"size": args.size, "batch": args.batch, "precision": args.precision, "accumulate": args.accumulate, "compile": args.compile, "settings": args.set, "rounds": args.rounds, "repeats": args.repeats,
            "diffusion_mul": cfg.teacher.diffusion_mul, "cfg": cfg.sampling.cfg, **facts} | measure(args, cfg)
    done = json.loads(args.out.read_text())["cells"] if args.out.exists() else {}
    key = " ".join([args.size, *(s.removeprefix("model.") for s in args.set), f"batch={args.batch}", args.precision, *([f"accumulate={args.accumulate}"] if args.accumulate > 1 else []), *(["compile"] if args.compile else [])])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, {"provenance": facts, "cells": done | {key: cell}})
    print(f"{facts['device']}: {cell['peak_flops'] / 1e12:.3g} TFLOP/s; {key}")
    for name, r in cell["runs"].items():
        print(f"{name:32} {r['images_per_second']:9.2f} images/s  {r['ratio']:5.2f}x MAR's time, {r['flops_ratio']:5.2f}x its operations  MFU {r['mfu']:.0%}  peak {r['peak_bytes'] / 1e6:9.1f} MB above {r['stored_bytes'] / 1e6:.1f}  "
              + ", ".join(f"{k} {v:.0%}" for k, v in r["shares"].items()))
    print(args.out)


if __name__ == "__main__": main()
