"""How long a distillation step takes (one update of phi, one of theta) beside one of MAR's own training:
same network, batch and precision, random weights and data.

All contestants work in turn, round after round, in one run; each round has its own amount of masking,
spread over what occurs in the stage. Operations are counted by `marval.plan`, and one step of each is
counted for real; the peak of the device is that of a large matrix product, measured in the same run.
Parts of a step are told apart by marks between forward and backward passes, in rounds of their own.

examples:
    python bench/distill.py                                        # on a GPU: base, 32 images, bf16
    python bench/distill.py --size huge --batch 16 --recompute blocks
    python bench/distill.py --compile --profile /tmp/step.json     # and a Chrome trace of one step of each
    python bench/distill.py --device cpu --set model.depth=2 --set model.head_depth=1   # a sixth of base
    python bench/distill.py --device cpu --size smoke --batch 4 --rounds 2 --out /tmp/distill.json   # a trial
"""
import random
import statistics
import sys
import time
from dataclasses import replace
from unittest.mock import patch

import torch
from common import (DTYPES, SCALES, adapted, clock, device_arguments, entry_point, facts, keep, out_file,
                    parser, settle, stored, wait, whole)
from memory import known_answer, peak, stored_bytes
from torch.profiler import ProfilerActivity, profile

from marval import train
from marval.config import preset
from marval.cost import flop_counter
from marval.distill import DistillStage
from marval.mar import MAR
from marval.plan import Meter, training_step
from marval.teacher import TeacherStage, masked_count
from marval.train import Resident, step_generator, step_seed

GOAL = 2.6  # times a training step


class Mark(torch.autograd.Function):
    "The identity, which tells when the backward pass comes by."
    @staticmethod
    def forward(ctx, x, tell):
        ctx.tell = tell
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        ctx.tell()
        return g, None


class Laps:
    """Time by part: all that passes between one mark and the next belongs to the first. Events on a GPU, so
    that nothing waits; processor time on a CPU."""
    def __init__(self, device): self.gpu, self.marks = device == "cuda", []

    def mark(self, name):
        now = time.process_time()
        if self.gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self.marks.append((name, now))

    def shares(self) -> dict:
        wait("cuda" if self.gpu else "cpu")
        parts = {}
        for (name, a), (_, b) in zip(self.marks, self.marks[1:]):
            parts[name] = parts.get(name, 0) + (a.elapsed_time(b) if self.gpu else b - a)
        return {k: v / sum(parts.values()) for k, v in parts.items()}


def marked(laps, net, name):
    "Tell the contexts of a network from what follows, forward and backward. Undone by `del net.contexts`."
    original = net.contexts
    def contexts(*args):
        laps.mark(f"contexts of {name}")
        c = original(*args)
        laps.mark("heads and losses")
        return Mark.apply(c, lambda: laps.mark(f"contexts of {name}")) if c.requires_grad else c
    net.contexts = contexts


class Contestant:
    "A way of doing a step."
    def __init__(self, name, stage, cfg, meter, masks, parts):
        self.name, self.stage, self.cfg = name, stage, cfg
        self.meter, self.masks, self.parts = meter, masks, parts
        self.times, self.images = {}, getattr(cfg, stage.name).batch

    def step(self, r):
        "One step with the masking of round r."
        s, i = self.stage, 10
        if s.name == "teacher": i = self.masks[r][0]
        else: s.d, s.known = self.cfg.distill, [self.masks[r]]
        s.step(i, step_generator(0, s.name, i, s.device))

    def cost(self, r):
        parts = self.cfg.compute.accumulate
        known = self.masks[r][1] if self.stage.name == "teacher" else self.masks[r]
        return training_step(self.cfg, self.stage.name, self.meter, self.images // parts, known) * parts

    def shares(self, r):
        "Of the parts of one step. The first thing that an update does is to sum gradients."
        laps, original = Laps(self.stage.device), train.sum_gradients
        def sum_gradients(params):
            laps.mark("optimisers and averages")
            return original(params)
        for name, net in self.parts.items(): marked(laps, net, name)
        try:
            with patch.object(train, "sum_gradients", sum_gradients):
                laps.mark("data and noise")
                self.step(r)
                laps.mark("end")
        finally:
            for net in self.parts.values(): del net.contexts
        return laps.shares()

    def stored_bytes(self):
        s = self.stage
        frozen = [s.teacher] if s.name == "distill" else []
        return stored_bytes(*s.modules().values(), *s.optimizers().values(), *frozen)


def quantiles(cfg, rounds):
    """For each round, a step of the teacher whose masking is near the middle of its share of all, and how
    many tokens are visible in it."""
    t, L = cfg.teacher, cfg.model.seq_len
    drawn = [1 - random.Random(step_seed(cfg.seed, "teacher/mask", i)).random() for i in range(10, 2000)]
    middles = [(r + .5) / rounds for r in range(rounds)]
    steps = [10 + min(range(len(drawn)), key=lambda j: abs(drawn[j] - q)) for q in middles]
    return [(i, L - masked_count(L, t.mask_min, t.mask_std, drawn[i - 10])) for i in steps]


def contestants(args, cfg):
    m, device, B = cfg.model, args.device, cfg.distill.batch
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2 * B, m.seq_len, m.token_dim, generator=g)
    data = Resident(tokens, torch.arange(2 * B) % m.class_num)
    teacher = TeacherStage(cfg, data, device, decode=lambda z: z)
    torch.manual_seed(0)
    with torch.device(device): net = MAR(m)
    with torch.no_grad():
        for p in net.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    student = DistillStage(cfg, net, data, lambda z: z, device=device)
    blocks = cfg.compute.recompute == "blocks"
    still, dropping = (Meter(m, cfg.compute.precision, blocks, dropout) for dropout in (False, True))
    masks = quantiles(cfg, args.rounds)
    yield Contestant("MAR", teacher, cfg, dropping, masks, {"the network": teacher.model})
    known = [student.known[int((r + .5) / args.rounds * len(student.known))] for r in range(args.rounds)]
    nets = {"theta": student.theta, "phi": student.phi, "the teacher": student.teacher}
    for share in ("none", "contexts"):
        for mul in args.phi_mul:
            own = replace(cfg, distill=replace(cfg.distill, share=share, phi_mul=mul))
            yield Contestant(f"GSIM, share {share}, phi_mul {mul}", student, own, still, known, nets)


def fastest(device, dtype, kind) -> float:
    "Operations a second of a large matrix product, the best of several."
    side = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(clock(device, lambda: a @ b)[kind] for _ in range(10))


def take_turns(args, all_):
    "Fills the contestants' times, round by round. The first steps allocate, compile and warm up."
    for c in all_: c.step(0)
    for r in range(args.rounds):
        if args.device == "cuda":
            for c in all_: c.step(r)                      # each length of sequence once, unmeasured
        for _ in range(args.repeats):
            for c in all_: c.times.setdefault(r, []).append(clock(args.device, lambda: c.step(r)))
        print(f"round {r + 1} of {args.rounds}", flush=True)


def row(args, c, kind, ceiling) -> dict:
    "What is told of a contestant."
    rounds, middle = range(args.rounds), args.rounds // 2
    def mean(k): return statistics.mean(statistics.median(t[k] for t in c.times[r]) for r in rounds)
    costs, seconds = [c.cost(r) for r in rounds], mean(kind)
    flops = statistics.mean(p.both for p in costs)
    with flop_counter() as counter: c.step(middle)
    peaks = [peak(args.device, lambda: c.step(r)) for r in {0, args.rounds - 1}]
    return {"seconds": mean("seconds"), "cpu_seconds": mean("cpu_seconds"),
            "images_per_second": c.images / seconds, "flops": flops, "mfu": flops / seconds / ceiling,
            "counted_over_predicted": counter.get_total_flops() / costs[middle].both,
            "peak_bytes": max(peaks),
            "predicted_bytes": max(p.bytes for p in costs) / c.cfg.compute.accumulate,
            "stored_bytes": c.stored_bytes(), "shares": c.shares(middle)}


def measure(args, cfg) -> dict:
    kind, all_ = "seconds" if args.device == "cuda" else "cpu_seconds", list(contestants(args, cfg))
    ceiling = fastest(args.device, DTYPES[cfg.compute.precision], kind)
    take_turns(args, all_)
    rows = {c.name: row(args, c, kind, ceiling) for c in all_}
    mar = rows["MAR"]
    for r in rows.values(): r |= {"ratio": r[kind] / mar[kind], "flops_ratio": r["flops"] / mar["flops"]}
    if args.profile: trace(args, all_, args.rounds // 2)
    return {"timed_by": kind, "peak_flops": ceiling, "instrument": known_answer(args.device), "goal": GOAL,
            "runs": rows}


def trace(args, all_, r):
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    with profile(activities=kinds) as p:
        for c in all_:
            with torch.profiler.record_function(c.name): c.step(r)
        wait(args.device)
    p.export_chrome_trace(args.profile)


def arguments(argv=None):
    p = parser(__doc__)
    device_arguments(p)
    p.add_argument("--size", default="base", choices=SCALES)
    p.add_argument("--batch", type=whole(1, 4096), default=None,
                   help="images a step (default: 32 on a GPU, 2 on a CPU)")
    p.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--accumulate", type=whole(1, 4096), default=1, metavar="N",
                   help="parts that the batch is worked off in")
    p.add_argument("--compile", action="store_true", help="torch.compile for the blocks that are trained")
    p.add_argument("--recompute", choices=("none", "blocks"), default="none",
                   help="blocks: activations inside blocks are computed again, to save memory")
    p.add_argument("--phi-mul", nargs="+", type=whole(1, 64), default=(4, 1),
                   help="diffusion times a token and update of phi")
    p.add_argument("--rounds", type=whole(1, 100), default=4, help="amounts of masking")
    p.add_argument("--repeats", type=whole(1, 1000), default=None,
                   help="steps of each in a round, whose median counts (default: 5 on a GPU, 1 on a CPU)")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    p.add_argument("--profile", metavar="FILE", help="write a Chrome trace of one step of each")
    args = p.parse_args(argv)
    gpu = settle(args, "distill")
    if args.profile: args.profile = str(out_file(args.profile))
    args.batch = args.batch or (32 if gpu else 2)
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.repeats = args.repeats or (5 if gpu else 1)
    return args


def configuration(args):
    own = {"teacher.batch": args.batch, "distill.batch": args.batch, "compute.precision": args.precision,
           "compute.accumulate": args.accumulate, "compute.compile": "on" if args.compile else "off",
           "compute.recompute": args.recompute,
           "distill.phi_first": 0, "distill.phi_updates": 1}
    return adapted(preset(args.size), own, args.set)


def show(cell):
    for name, r in cell["runs"].items():
        parts = ", ".join(f"{k} {v:.0%}" for k, v in r["shares"].items())
        print(f"{name:32} {r['images_per_second']:9.2f} images/s  {r['ratio']:5.2f}x MAR's time, "
              f"{r['flops_ratio']:5.2f}x its operations  MFU {r['mfu']:.0%}  "
              f"peak {r['peak_bytes'] / 1e6:9.1f} MB above {r['stored_bytes'] / 1e6:.1f}  {parts}")


def work(argv=None) -> dict:
    "Parse, measure, store; returns the cell that was measured."
    args = arguments(argv)
    done, about, cfg = stored(args.out, cells=dict).get("cells", {}), facts(), configuration(args)
    cell = {k: getattr(args, k) for k in ("size", "batch", "precision", "accumulate", "compile")}
    cell |= {"settings": args.set, "rounds": args.rounds, "repeats": args.repeats,
             "diffusion_mul": cfg.teacher.diffusion_mul, "cfg": cfg.sampling.cfg, **about}
    cell |= measure(args, cfg)
    extra = [f"accumulate={args.accumulate}"] * (args.accumulate > 1) + ["compile"] * args.compile
    extra += ["recompute=blocks"] * (args.recompute == "blocks")
    settings = [s.removeprefix("model.") for s in args.set]
    key = " ".join([args.size, *settings, f"batch={args.batch}", args.precision, *extra])
    keep(args.out, {"provenance": about, "cells": done | {key: cell}})
    print(f"{about['device']}: {cell['peak_flops'] / 1e12:.3g} TFLOP/s; {key}")
    show(cell)
    print(args.out)
    return {"cells": {key: cell}}


@entry_point
def main(argv) -> int:
    work(argv)
    return 0


if __name__ == "__main__": sys.exit(main())
