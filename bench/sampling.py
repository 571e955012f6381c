"""How long it takes to draw an image: one step against the chain of a hundred, `sampling.sample` against
`FastSampler`, beside what the machine could do at best.

Weights are random: the time doesn't depend on them. A cell is a size, a number K of autoregressive steps
and a batch. All its contestants draw in turn, from the same orders and noise, round after round, and
medians count. The ceilings (matrix products and memory) are measured in the same run. Results are written
after every cell, the most telling ones come first, and cells of an earlier run on the same device are
kept unless they are measured again.

examples:
    python bench/sampling.py                          # all sizes on a GPU, as many cells as fit in 9 minutes
    python bench/sampling.py --minutes 60 --compile   # more of them, and torch.compile as one more contestant
    python bench/sampling.py --size base --K 64 --batch 1 --profile /tmp/trace   # a cell, and traces of it
    python bench/sampling.py --device cpu --size base --K 8 --batch 1 --rounds 1 --patience 900 --minutes 30
    python bench/sampling.py --device cpu --size smoke --K 4 --batch 1 --chain-steps 3 --out s.json  # a trial
"""
import argparse
import copy
import gc
import statistics
import sys
import time
from functools import lru_cache
from itertools import product

import torch
from common import (DTYPES, SCALES, BadInput, clock, device_arguments, entry_point, facts, keep, number,
                    out_file, parser, settle, stored, wait, whole)

from marval.config import preset
from marval.cost import Phase, flop_counter, least_time, phases, total
from marval.data import to_images
from marval.diffusion import Schedule
from marval.fast import FastSampler
from marval.mar import MAR, unpatchify
from marval.sampling import OneStep, TeacherChain, draw_noise, random_orders, sample
from marval.vae import KL16, LATENT_SCALE

CFG = dict(base=2.9, large=3.0, huge=3.2)          # the chain's, as MAR and the paper run it; 3 elsewhere
SIZES, KS, BATCHES = ("base", "large", "huge"), (64, 8, 16, 32, 256), (1, 256, 8, 64)
KINDS = ("one step", "chain")


def ceilings(device: str, dtype: torch.dtype, tiny: bool = False) -> dict:
    "Operations a second of a large matrix product, bytes a second of a copy or a matrix-vector product."
    gpu = device == "cuda"
    def best(f, n): return min(clock(device, f)["seconds"] for _ in range(n))
    side, words = (128, 2**20) if tiny else (8192, 2**28) if gpu else (1536, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rate = 2 * side**3 / best(lambda: a @ b, 10 if gpu else 3)
    x, y = torch.zeros(words, device=device), torch.empty(words, device=device)
    copied = 8 * words / best(lambda: y.copy_(x), 10)
    w = torch.zeros(2**14, words // 2**14, device=device, dtype=dtype)
    v = torch.ones(words // 2**14, 1, device=device, dtype=dtype)
    read = w.numel() * w.element_size() / best(lambda: w @ v, 10)
    return {"flops": rate, "bytes": max(copied, read), "copy_bytes": copied, "read_bytes": read}


def random_weights(m, device):
    "A MAR with MAR's initial weights, zeros made small numbers: the output depends on everything."
    torch.manual_seed(0)
    with torch.device(device): model = MAR(m)
    with torch.no_grad():
        for p in model.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


@lru_cache
def decoder_cost(m):
    "Operations an image, and weights, of KL-16's decoder; counted on tensors without numbers."
    side = m.img_size // m.vae_stride
    with torch.device("meta"):
        vae = KL16(channels=m.vae_embed_dim)
        z = torch.empty(1, m.vae_embed_dim, side, side)
    with flop_counter() as counter: vae.decode(z)
    return counter.get_total_flops(), sum(p.numel() for p in vae.decoder.parameters())


class Skip:
    "Stands in for a head: the tokens are the noise. What remains is the backbone."
    def __init__(self, head): self.table = head.table
    def __call__(self, h, table, w, noise): return noise[0]


class Contestant:
    "One way of drawing the images of a cell. Paths: plain, fast, `fast compile`, and `fast no graph`."
    def __init__(self, cell, kind: str, path: str, dtype: str):
        self.cell, self.times = cell, []
        self.kind, self.path, self.dtype = kind, path, dtype
        one = kind == "one step"
        self.draw, self.cfg = (cell.one, 1.) if one else (cell.chain, cell.cfg)
        self.noise = [z[:1].clone() for z in cell.noise] if one else cell.noise
        self.model = cell.model if path != "plain" or dtype == "fp32" else cell.bf16()
        self.decode = cell.decoder(DTYPES[dtype])
        if path == "plain":
            self.noise = [z.to(DTYPES[dtype]) for z in self.noise]
            self.run = self.plain
        else: self.run = self.sampler(self.decode)

    @property
    def name(self): return f"{self.kind}, {self.path}, {self.dtype}"

    def remember(self): self.images = self.run().float()

    def plain(self):
        with torch.inference_mode():
            tokens = sample(self.model, self.cell.labels, self.draw, self.cell.K, self.cfg,
                            orders=self.cell.orders, noise=self.noise)
            return self.decode(unpatchify(tokens, self.model.cfg.patch_size)) if self.decode else tokens

    def sampler(self, decode, headless=False):
        graph = self.cell.device == "cuda" and self.path != "fast no graph"   # of the chain, too: at its best
        fast = FastSampler(self.model, self.draw, self.cell.K, self.cfg, dtype=DTYPES[self.dtype],
                           decode=decode, compile=self.path == "fast compile", graph=graph)
        if headless: fast.head = Skip(fast.head)
        return lambda: fast.sample(self.cell.labels, self.cell.orders, self.noise)

    def parts(self, seconds):
        "Shares of backbone, head and decoder, by leaving them out; of the fast paths alone."
        if self.path == "plain": return {}
        def median(f):
            f()
            return statistics.median(clock(self.cell.device, f)["seconds"] for _ in range(3))
        body = median(self.sampler(None, True))
        tokens = median(self.sampler(None)) if self.decode else seconds
        parts = {"backbone": body, "head": tokens - body, "decode": seconds - tokens}
        return {k: v / seconds for k, v in parts.items()}

    def busy(self, trace=None):
        "Share of the time in which the GPU computes, the rest being gaps. A Chrome trace where asked."
        gpu = self.cell.device == "cuda"
        seconds = statistics.median(t["seconds"] for t in self.times)
        if not (gpu and self.kind == "one step") and trace is None: return None
        kinds = [torch.profiler.ProfilerActivity.CUDA] * gpu
        if not gpu or trace is not None: kinds.append(torch.profiler.ProfilerActivity.CPU)
        with torch.profiler.profile(activities=kinds) as p:
            self.run()
            wait(self.cell.device)
        name = self.name.replace(", ", "-").replace(" ", "-")
        if trace is not None: p.export_chrome_trace(f"{trace}-{name}.json")
        on_gpu = (e for e in p.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA)
        return min(1., sum(e.self_device_time_total for e in on_gpu) * 1e-6 / seconds) if gpu else None


class Cell:
    "A size, K and batch, with what the contestants share."
    def __init__(self, args, size, model, K, B):
        self.args, self.size, self.model = args, size, model
        self.K, self.B, self.device = K, B, args.device
        m, sched = model.cfg, Schedule.cosine(device=args.device)
        self.cfg = CFG.get(size, 3.)
        self.one, self.chain = OneStep(sched), TeacherChain(sched, args.chain_steps)
        g = torch.Generator(args.device).manual_seed(1)
        self.labels = torch.arange(B, device=args.device) % m.class_num
        self.orders = random_orders(B, m.seq_len, g, args.device)
        rounds = self.chain.rounds if "chain" in args.kinds else 1
        self.noise = draw_noise(B, m.seq_len, K, m.token_dim, rounds, g, args.device)
        self.low, self.decoders = None, {}

    def bf16(self):
        if self.low is None: self.low = copy.deepcopy(self.model).to(torch.bfloat16)
        return self.low

    def decoder(self, dtype):
        "KL-16 with random weights, 16 images at a time; None where tokens are what is asked for."
        if not self.args.decode or self.model.cfg.vae_stride == 1: return None
        if dtype not in self.decoders: self.decoders[dtype] = self._decoder(dtype)
        return self.decoders[dtype]

    def _decoder(self, dtype):
        if dtype not in self.args.vaes:
            with torch.device(self.device): vae = KL16(channels=self.model.cfg.vae_embed_dim)
            vae = vae.eval().requires_grad_(False)
            self.args.vaes[dtype] = vae.to(dtype=dtype, memory_format=torch.channels_last)
        vae = self.args.vaes[dtype]
        def decode(latents):
            parts = (latents / LATENT_SCALE).split(16)
            return torch.cat([to_images(vae.decode(z.to(dtype)).float()) for z in parts])
        return decode

    def phases(self, kind, path, dtype):
        "What a draw computes and reads, the decoder with it."
        steps, guided = (0, False) if kind == "one step" else (self.args.chain_steps, True)
        room = 2 ** (24 if self.device == "cuda" else 22)
        found = phases(self.model.cfg, self.K, self.B, steps, guided, dtype.itemsize, path != "plain", room)
        if not self.decoder(dtype): return found
        flops, weights = decoder_cost(self.model.cfg)
        return [Phase("decode", self.B * flops, -(-self.B // 16) * weights * dtype.itemsize), *found]

    def expected(self, kind, path, dtype):
        "A guess in seconds, to leave out what is slow: twice the roofline, 10 microseconds a call."
        c, m = self.args.ceilings[dtype], self.model.cfg
        steps = 1 if kind == "one step" else self.args.chain_steps
        calls = self.K * (30 * m.depth + steps * (10 * m.head_depth + 30)) if path == "plain" else 0
        return 2 * least_time(self.phases(kind, path, DTYPES[dtype]), c["flops"], c["bytes"]) + 1e-5 * calls

    def measure(self, deadline) -> dict:
        "All contestants, in turn."
        rows, entered = {}, []
        for dtype, path in self.args.paths:
            for kind in (k for k in KINDS if k in self.args.kinds):
                name = f"{kind}, {path}, {dtype}"
                guess = self.expected(kind, path, dtype)
                if guess > self.args.patience or 2 * guess > deadline - time.monotonic():
                    rows[name] = {"skipped": f"expected to take {guess:.0f} s a draw"}
                    continue
                rows[name], found = self._enter(kind, path, dtype)
                entered += found
        if not entered: return rows
        self._rounds(entered, deadline)
        for c, first in entered: rows[c.name].update(self._row(c, first["seconds"], deadline))
        for name, d in distances([c for c, _ in entered]).items(): rows[name]["distance"] = d
        return rows

    def _enter(self, kind, path, dtype):
        "A contestant's first draw: its row, and itself with the time that this took, unless it fails."
        self.decoder(DTYPES[dtype])
        if path == "plain" and dtype == "bf16": self.bf16()
        before = self._memory()                              # the models that others share are there already
        try:
            c = Contestant(self, kind, path, dtype)
            first = clock(self.device, c.remember)
        except (torch.OutOfMemoryError, RuntimeError) as e:
            return {"skipped": f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"}, []
        own = sum(p.numel() * p.element_size() for p in c.model.parameters()) if path == "plain" else 0
        peak = torch.cuda.max_memory_allocated() - before + own if self.device == "cuda" else None
        if self.device == "cpu" and first["seconds"] > 20: c.times.append(first)    # a warm-up would not show
        return {"first_seconds": first["seconds"], "peak_bytes": peak}, [(c, first)]

    def _rounds(self, entered, deadline):
        "As many as fit into half of the time that is left; each contestant draws once in each."
        once = max(1e-9, sum(first["seconds"] for _, first in entered))
        rounds = max(1, min(self.args.rounds, int((deadline - time.monotonic()) / 2 / once)))
        for _ in range(rounds):
            for c, _ in entered:
                if len(c.times) < rounds: c.times.append(clock(self.device, c.run))

    def _memory(self):
        if self.device != "cuda": return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _row(self, c, first, deadline):
        wall, cpu = (statistics.median(t[k] for t in c.times) for k in ("seconds", "cpu_seconds"))
        found, ceiling = self.phases(c.kind, c.path, DTYPES[c.dtype]), self.args.ceilings[c.dtype]
        flops, read = total(found)
        least = least_time(found, ceiling["flops"], ceiling["bytes"])
        more = self.args.parts and deadline - time.monotonic() > 10 * wall + 4 * first
        return {"seconds": wall, "cpu_seconds": cpu, "rounds": len(c.times),
                "images_per_second": self.B / wall, "flops": flops, "weight_bytes": read,
                "roofline_seconds": least, "of_roofline": wall / least,
                "shares": c.parts(wall) if more else {}, "busy": c.busy() if more else None}


def distance(a, b) -> float:
    "||a - b|| / ||b||"
    return ((a - b).double().norm() / b.double().norm()).item()


def distances(contestants) -> dict:
    "Relative distance of what each drew from what the plain float32 path drew, by name."
    base = {c.kind: c for c in contestants if (c.path, c.dtype) == ("plain", "fp32")}
    others = [c for c in contestants if c.kind in base and c is not base[c.kind]]
    return {c.name: distance(c.images, base[c.kind].images) for c in others}


def arguments(argv=None):
    p = parser(__doc__)
    device_arguments(p)
    p.add_argument("--size", nargs="+", default=SIZES, choices=SCALES)
    p.add_argument("--K", nargs="+", type=whole(1, 256), default=KS, help="autoregressive steps")
    p.add_argument("--batch", nargs="+", type=whole(1, 4096), default=BATCHES)
    p.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    p.add_argument("--dtype", nargs="+", default=None, choices=tuple(DTYPES),
                   help="of the fast path (default: bf16 on a GPU, fp32 on a CPU)")
    p.add_argument("--compile", action="store_true", help="also the fast path through torch.compile")
    p.add_argument("--no-graph", action="store_true", help="also the fast path without a CUDA graph")
    p.add_argument("--chain-steps", type=whole(2, 1000), default=100)
    p.add_argument("--rounds", type=whole(1, 1000), default=3, help="at most so many of each")
    p.add_argument("--minutes", type=number(0, 10_000), default=9, help="stop after so many")
    p.add_argument("--patience", type=number(0), default=60,
                   help="leave out what is expected to take more seconds a draw")
    p.add_argument("--decode", action=argparse.BooleanOptionalAction, default=None,
                   help="count the tokenizer's decoder in (default: on a GPU)")
    p.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True,
                   help="also measure the shares of backbone, head and decoder")
    p.add_argument("--tiny", action="store_true",
                   help="rough ceilings and 3 steps of the chain: a trial, whose times mean nothing")
    p.add_argument("--profile", metavar="PREFIX", help="a Chrome trace of each contestant of the first cell")
    return settled(p.parse_args(argv))


def settled(args):
    "What follows from the arguments given."
    if args.tiny and not args.out: raise BadInput("--tiny: expected --out, to replace no real result")
    if args.tiny: args.chain_steps = 3
    gpu = settle(args, "sampling")
    if args.profile: out_file(f"{args.profile}-trace.json")
    if args.decode is None: args.decode = gpu
    fast = args.dtype or (["bf16"] if gpu else ["fp32"])
    ways = ["fast"] + ["fast compile"] * args.compile + ["fast no graph"] * args.no_graph
    args.paths = [(d, way) for way in ways for d in fast] + [(d, "plain") for d in ("fp32", "bf16")[:1 + gpu]]
    args.vaes = {}
    return args


def cells(args):
    "Size, K and batch, the most telling first: K = 64 for one image and for many, other sizes, other K."
    def rank(values): return {v: i for i, v in enumerate(values)}
    size, K, batch = map(rank, (args.size, args.K, args.batch))
    every = (c for c in product(args.size, args.K, args.batch) if c[1] <= preset(c[0]).model.seq_len)
    return sorted(every, key=lambda c: (3 * size[c[0]] + 3 * K[c[1]] + 2 * batch[c[2]], c))


def show(name, K, B, runs):
    for who, r in runs.items():
        told = r.get("skipped") or (f"{1e3 * r['seconds']:10.1f} ms {r['images_per_second']:10.3f} images/s "
                                    f"{r['of_roofline']:6.2f}x roofline")
        print(f"{name:6} K {K:3} batch {B:3}  {who:28} {told}", flush=True)


def earlier(args, device: str) -> dict:
    "Cells that an earlier run on this device left, on any number of threads."
    old = stored(args.out, provenance=dict, cells=dict)
    same = str(old.get("provenance", {}).get("device", "")).split(", ")[0] == device.split(", ")[0]
    return old["cells"] if same else {}


def others(cell, own) -> dict:
    "Contestants that an earlier run of the same commit left in a cell; none where anything differs."
    if not isinstance(cell, dict) or own["commit"] == "unknown": return {}
    runs = cell.get("runs") if all(cell.get(k) == v for k, v in own.items()) else None
    return runs if isinstance(runs, dict) else {}


def work(argv=None) -> dict:
    "Parse, measure, store; returns the cells that were measured."
    args = arguments(argv)
    deadline = time.monotonic() + 60 * args.minutes
    about = facts() | {"chain_steps": args.chain_steps, "decode": args.decode}
    done, new = earlier(args, about["device"]), {}
    types = dict.fromkeys(d for d, _ in args.paths)
    args.ceilings = {d: ceilings(args.device, DTYPES[d], args.tiny) for d in types}
    print(about["device"])
    for d, c in args.ceilings.items():
        print(f"{d}: {c['flops'] / 1e12:.3g} TFLOP/s, {c['bytes'] / 1e9:.4g} GB/s", flush=True)
    size, model, todo = None, None, cells(args)
    for i, (name, K, B) in enumerate(todo):
        if time.monotonic() > deadline:
            print("time is up; left out: " + "; ".join(f"{s} K {k} batch {b}" for s, k, b in todo[i:]))
            break
        if name != size: model = None                        # freed before the next one is made
        if model is None: size, model = name, random_weights(preset(name).model, args.device)
        cell = Cell(args, name, model, K, B)
        runs = cell.measure(deadline)
        own = {k: about[k] for k in ("commit", "torch", "threads", "chain_steps", "decode")}
        key = f"{name} K={K} batch={B}"
        new[key] = {"size": name, "K": K, "batch": B, "cfg": cell.cfg, **own, "ceilings": args.ceilings,
                    "runs": others(done.get(key), own) | runs}
        keep(args.out, {"provenance": about, "cells": done | new})
        show(name, K, B, runs)
        if args.profile and i == 0: trace(cell, args.profile)
    print(args.out)
    return {"cells": new}


def trace(cell, prefix):
    for dtype, path in cell.args.paths:
        for kind in cell.args.kinds:
            c = Contestant(cell, kind, path, dtype)
            c.run()
            c.times.append(clock(cell.device, c.run))
            c.busy(prefix)


@entry_point
def main(argv) -> int:
    work(argv)
    return 0


if __name__ == "__main__": sys.exit(main())
