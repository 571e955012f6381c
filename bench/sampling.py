"""How long it takes to draw an image: one step against the chain of a hundred, `sampling.sample` against `FastSampler`, beside what the machine could do at best.

Weights are random: the time doesn't depend on them. A cell is a size, a number K of autoregressive steps and a batch; all its contestants draw in turn, from the same orders and noise, round after round, and medians count. The
ceilings (matrix products and memory) are measured in the same run. Results are written after every cell, the most telling ones come first, and cells of an earlier run on the same device are kept unless they are measured again.

    python bench/sampling.py                                   # all sizes on a GPU, as many cells as fit into 9 minutes
    python bench/sampling.py --minutes 60 --compile            # more of them, and torch.compile as one more contestant
    python bench/sampling.py --size base --K 64 --batch 1 --profile /tmp/trace   # one cell, and a Chrome trace per contestant
    python bench/sampling.py --device cpu --size base --K 8 --batch 1 --rounds 1 --patience 900 --minutes 30 # what a CPU can do
    python bench/sampling.py --device cpu --size smoke --K 4 --batch 1 2 --chain-steps 3 --out /tmp/sampling.json   # a trial, seconds
"""
import argparse
import copy
import gc
import json
import statistics
import time
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from marval.config import preset
from marval.cost import Phase, least_time, phases, total
from marval.data import to_images
from marval.diffusion import Schedule
from marval.evaluate import run_provenance
from marval.fast import FastSampler
from marval.files import write_json
from marval.mar import MAR, unpatchify
from marval.sampling import OneStep, TeacherChain, draw_noise, random_orders, sample
from marval.vae import KL16, LATENT_SCALE

CFG = dict(base=2.9, large=3.0, huge=3.2)          # the chain's, as MAR and the paper run it; 3 elsewhere
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
SIZES, KS, BATCHES = ("base", "large", "huge"), (64, 8, 16, 32, 256), (1, 256, 8, 64)


def wait(device):
    if device == "cuda": torch.cuda.synchronize()


def on_gpu(p, args, name) -> bool:
    "Is it a GPU that shall be measured? Ends the program where there is none; sets threads, and where results of this benchmark go."
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available(): p.error("--device cuda: there is no GPU here")
    if args.threads: torch.set_num_threads(args.threads)
    short = torch.cuda.get_device_name().replace("NVIDIA", "").split()[0].lower() if gpu else "cpu"
    args.out = args.out or Path(__file__).parent/"results"/f"{name}_{short}.json"
    return gpu


def clock(device, f) -> dict:
    "Seconds of one call: on the wall, and of the processor."
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    wait(device)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def ceilings(device: str, dtype: torch.dtype) -> dict:
    "Operations a second of a large matrix product, bytes a second of the better of a copy and a matrix-vector product. Best of several."
    gpu = device == "cuda"
    best = lambda f, n: min(clock(device, f)["seconds"] for _ in range(n))
    side, words = (8192, 2**28) if gpu else (1536, 2**25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rate = 2 * side**3 / best(lambda: a @ b, 10 if gpu else 3)
    x, y, v = torch.zeros(words, device=device), torch.empty(words, device=device), torch.ones(words // 2**14, 1, device=device, dtype=dtype)
    w = torch.zeros(2**14, words // 2**14, device=device, dtype=dtype)
    copied, read = 8 * words / best(lambda: y.copy_(x), 10), w.numel() * w.element_size() / best(lambda: w @ v, 10)
    return {"flops": rate, "bytes": max(copied, read), "copy_bytes": copied, "read_bytes": read}


def random_weights(m, device):
    "A MAR with MAR's start, its zeros replaced by small numbers, so that the head's output depends on everything."
    torch.manual_seed(0)
    with torch.device(device): model = MAR(m)
    with torch.no_grad():
        for p in model.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


@lru_cache
def decoder_cost(m):
    "Operations an image, and weights, of KL-16's decoder; counted on tensors without numbers."
    with torch.device("meta"): vae, z = KL16(channels=m.vae_embed_dim), torch.empty(1, m.vae_embed_dim, m.img_size // m.vae_stride, m.img_size // m.vae_stride)
    with FlopCounterMode(display=False) as counter: vae.decode(z)
    return counter.get_total_flops(), sum(p.numel() for p in vae.decoder.parameters())


class Skip:
    "Stands in for a head: the tokens are the noise. What remains is the backbone."
    def __init__(self, head): self.table = head.table
    def __call__(self, h, table, w, noise): return noise[0]


class Contestant:
    "One way of drawing the images of a cell."
    def __init__(self, cell, kind: str, path: str, dtype: str):
        self.cell, self.kind, self.path, self.dtype, self.times = cell, kind, path, dtype, []
        c, type_ = cell, DTYPES[dtype]
        self.draw, self.cfg, self.noise = (c.one, 1., [z[:1].clone() for z in c.noise]) if kind == "one step" else (c.chain, c.cfg, c.noise)
        self.model = c.model if path != "plain" or dtype == "fp32" else c.bf16()
        self.decode = c.decoder(type_)
        if path == "plain": self.run, self.noise = self.plain, [z.to(type_) for z in self.noise]
        else: self.run = self.sampler(self.decode)

    @property
    def name(self): return f"{self.kind}, {self.path}, {self.dtype}"

    def remember(self): self.images = self.run().float()

    def plain(self):
        with torch.inference_mode():
            tokens = sample(self.model, self.cell.labels, self.draw, self.cell.K, self.cfg, orders=self.cell.orders, noise=self.noise)
            return self.decode(unpatchify(tokens, self.model.cfg.patch_size)) if self.decode else tokens

    def sampler(self, decode, headless=False):
        fast = FastSampler(self.model, self.draw, self.cell.K, self.cfg, dtype=DTYPES[self.dtype], decode=decode, compile="compile" in self.path, graph=torch.device(self.cell.device).type == "cuda")
        if headless: fast.head = Skip(fast.head)
        return lambda: fast.sample(self.cell.labels, self.cell.orders, self.noise)

    def parts(self, seconds):
        "Shares of backbone, head and decoder, by leaving them out; of the fast paths alone."
        if self.path == "plain": return {}
        median = lambda f: (f(), statistics.median(clock(self.cell.device, f)["seconds"] for _ in range(3)))[1]
        body, tokens = median(self.sampler(None, True)), median(self.sampler(None)) if self.decode else seconds
        return {"backbone": body / seconds, "head": (tokens - body) / seconds, "decode": (seconds - tokens) / seconds}

    def busy(self, trace=None):
        "Share of the wall-clock time in which the GPU computes; the rest is launching and gaps. Optionally a Chrome trace."
        gpu, seconds = self.cell.device == "cuda", statistics.median(t["seconds"] for t in self.times)
        if not (gpu and self.kind == "one step") and trace is None: return None
        kinds = [torch.profiler.ProfilerActivity.CPU] * (not gpu or trace is not None) + [torch.profiler.ProfilerActivity.CUDA] * gpu
        with torch.profiler.profile(activities=kinds) as p:
            self.run()
            wait(self.cell.device)
        if trace is not None: p.export_chrome_trace(f"{trace}-{self.name.replace(', ', '-').replace(' ', '-')}.json")
        return min(1., sum(e.self_device_time_total for e in p.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA) * 1e-6 / seconds) if gpu else None


class Cell:
    "A size, K and batch, with what the contestants share."
    def __init__(self, args, size, model, K, B):
        self.args, self.size, self.model, self.K, self.B, self.device = args, size, model, K, B, args.device
        m, self.cfg, sched = model.cfg, CFG.get(size, 3.), Schedule.cosine(device=args.device)
        self.one, self.chain = OneStep(sched), TeacherChain(sched, args.chain_steps)
        g = torch.Generator(args.device).manual_seed(1)
        self.labels, self.orders = torch.arange(B, device=args.device) % m.class_num, random_orders(B, m.seq_len, g, args.device)
        self.noise = draw_noise(B, m.seq_len, K, m.token_dim, self.chain.rounds, g, args.device)
        self.low, self.decoders = None, {}

    def bf16(self):
        if self.low is None: self.low = copy.deepcopy(self.model).to(torch.bfloat16)
        return self.low

    def decoder(self, dtype):
        "KL-16 with random weights, 16 images at a time; None where tokens are what is asked for."
        if not self.args.decode or self.model.cfg.vae_stride == 1: return None
        if dtype not in self.decoders:
            if dtype not in self.args.vaes:
                with torch.device(self.device): vae = KL16(channels=self.model.cfg.vae_embed_dim)
                self.args.vaes[dtype] = vae.eval().requires_grad_(False).to(dtype=dtype, memory_format=torch.channels_last)
            vae = self.args.vaes[dtype]
            def decode(latents): return torch.cat([to_images(vae.decode(z.to(dtype)).float()) for z in (latents / LATENT_SCALE).split(16)])
            self.decoders[dtype] = decode
        return self.decoders[dtype]

    def phases(self, kind, path, dtype):
        "What a draw computes and reads, the decoder with it."
        decoded = [Phase("decode", self.B * decoder_cost(self.model.cfg)[0], -(-self.B // 16) * decoder_cost(self.model.cfg)[1] * dtype.itemsize)] if self.decoder(dtype) else []
        return decoded + phases(self.model.cfg, self.K, self.B, 0 if kind == "one step" else self.args.chain_steps, kind == "chain", dtype.itemsize, path != "plain", 2 ** (24 if self.device == "cuda" else 22))

    def expected(self, kind, path, dtype):
        "A guess in seconds, to leave out what cannot be waited for: half of the ceilings, and 10 microseconds a call of the plain path."
        c, m = self.args.ceilings[dtype], self.model.cfg
        calls = self.K * (30 * m.depth + (1 if kind == "one step" else self.args.chain_steps) * (10 * m.head_depth + 30)) if path == "plain" else 0
        return 2 * least_time(self.phases(kind, path, DTYPES[dtype]), c["flops"], c["bytes"]) + 1e-5 * calls

    def measure(self, deadline) -> dict:
        "All contestants, in turn."
        rows, entered = {}, []
        kinds = [(k, p, d) for d, p in self.args.paths for k in ("one step", "chain") if k in self.args.kinds]
        for kind, path, dtype in kinds:
            name, guess = f"{kind}, {path}, {dtype}", self.expected(kind, path, dtype)
            if guess > self.args.patience or 2 * guess > deadline - time.monotonic():
                rows[name] = {"skipped": f"expected to take {guess:.0f} s a draw"}
                continue
            self.decoder(DTYPES[dtype])
            if path == "plain" and dtype == "bf16": self.bf16()
            before = self._memory()                                                         # the models that others share are there already
            try:
                c = Contestant(self, kind, path, dtype)
                first = clock(self.device, c.remember)
            except (torch.cuda.OutOfMemoryError, RuntimeError) as e:
                rows[name] = {"skipped": f"{type(e).__name__}: {str(e).splitlines()[0][:120]}"}
                continue
            own = sum(p.numel() * p.element_size() for p in c.model.parameters()) if path == "plain" else 0
            rows[name] = {"first_seconds": first["seconds"], "peak_bytes": torch.cuda.max_memory_allocated() - before + own if self.device == "cuda" else None}
            entered.append((c, first))
            if self.device == "cpu" and first["seconds"] > 20: c.times.append(first)         # nothing to warm up that would show
        if not entered: return rows
        rounds = max(1, min(self.args.rounds, int((deadline - time.monotonic()) / 2 / max(1e-9, sum(f["seconds"] for _, f in entered)))))
        for _ in range(rounds):
            for c, _ in entered:
                if len(c.times) < rounds: c.times.append(clock(self.device, c.run))
        for c, _ in entered: rows[c.name].update(self._row(c, rows[c.name]["first_seconds"], deadline))
        self._distances(rows, [c for c, _ in entered])
        return rows

    def _memory(self):
        if self.device != "cuda": return 0
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _row(self, c, first, deadline):
        wall, cpu = (statistics.median(t[k] for t in c.times) for k in ("seconds", "cpu_seconds"))
        ps, ceiling = self.phases(c.kind, c.path, DTYPES[c.dtype]), self.args.ceilings[c.dtype]
        (flops, read), enough = total(ps), deadline - time.monotonic() > 10 * wall + 4 * first
        return {"seconds": wall, "cpu_seconds": cpu, "rounds": len(c.times), "images_per_second": self.B / wall, "flops": flops, "weight_bytes": read,
                "roofline_seconds": least_time(ps, ceiling["flops"], ceiling["bytes"]), "of_roofline": wall / least_time(ps, ceiling["flops"], ceiling["bytes"]),
                "shares": c.parts(wall) if enough and self.args.parts else {}, "busy": c.busy() if enough and self.args.parts else None}

    def _distances(self, rows, entered):
        "Relative distance of the images (tokens, without a decoder) from the plain float32 path's."
        for kind in ("one step", "chain"):
            base = next((c for c in entered if (c.kind, c.path, c.dtype) == (kind, "plain", "fp32")), None)
            for c in entered:
                if base and c.kind == kind and c is not base: rows[c.name]["distance"] = ((c.images - base.images).norm() / base.images.norm()).item()


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--size", nargs="+", default=SIZES, choices=("smoke", "digits", "tiny", *SIZES))
    p.add_argument("--K", nargs="+", type=int, default=KS)
    p.add_argument("--batch", nargs="+", type=int, default=BATCHES)
    p.add_argument("--kinds", nargs="+", default=("one step", "chain"), choices=("one step", "chain"))
    p.add_argument("--dtype", nargs="+", default=None, choices=tuple(DTYPES), help="of the fast path (default: bf16 on a GPU, fp32 on a CPU)")
    p.add_argument("--compile", action="store_true", help="also the fast path through torch.compile")
    p.add_argument("--chain-steps", type=int, default=100)
    p.add_argument("--rounds", type=int, default=3, help="at most so many of each; fewer where time is short")
    p.add_argument("--minutes", type=float, default=9, help="stop after so many")
    p.add_argument("--patience", type=float, default=60, help="leave out what is expected to take more seconds a draw")
    p.add_argument("--decode", action=argparse.BooleanOptionalAction, default=None, help="count the tokenizer's decoder in (default: on a GPU)")
    p.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help="also measure the shares of backbone, head and decoder")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--profile", metavar="PREFIX", help="after the first cell, write a Chrome trace of each contestant, PREFIX-name.json")
    p.add_argument("--out", type=Path, default=None, help="default: bench/results/sampling_DEVICE.json")
    args = p.parse_args(argv)
    gpu = on_gpu(p, args, "sampling")
    if args.decode is None: args.decode = gpu
    plain = ["fp32", "bf16"] if gpu else ["fp32"]
    fast = args.dtype or (["bf16"] if gpu else ["fp32"])
    args.paths = [(d, "fast") for d in fast] + [(d, "fast compile") for d in fast if args.compile] + [(d, "plain") for d in plain]
    args.vaes = {}
    return args


def cells(args):
    "Size, K and batch, the most telling first: K = 64 for one image and for many, then other sizes, then other K."
    rank = lambda values: {v: i for i, v in enumerate(values)}
    size, K, batch = map(rank, (args.size, args.K, args.batch))
    return sorted(product(args.size, args.K, args.batch), key=lambda c: (3 * size[c[0]] + 3 * K[c[1]] + 2 * batch[c[2]], c))


def main(argv=None):
    args = arguments(argv)
    deadline, facts = time.monotonic() + 60 * args.minutes, run_provenance() | {"threads": torch.get_num_threads(), "chain_steps": args.chain_steps, "decode": args.decode}
    args.ceilings = {d: ceilings(args.device, DTYPES[d]) for d in {d for d, _ in args.paths}}
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    done = old.get("cells", {}) if old.get("provenance", {}).get("device", "").split(", ")[0] == facts["device"].split(", ")[0] else {}   # on any number of threads
    print(facts["device"] + "".join(f"\n{d}: {c['flops'] / 1e12:.3g} TFLOP/s, {c['bytes'] / 1e9:.4g} GB/s" for d, c in args.ceilings.items()), flush=True)
    size, model = None, None
    for i, (name, K, B) in enumerate(cells(args)):
        if time.monotonic() > deadline:
            print("time is up; left out: " + "; ".join(f"{s} K {k} batch {b}" for s, k, b in cells(args)[i:]), flush=True)
            break
        if K > preset(name).model.seq_len: continue
        if name != size: model, size = None, name; model = random_weights(preset(name).model, args.device)
        cell = Cell(args, name, model, K, B)
        rows = cell.measure(deadline)
        done[f"{name} K={K} batch={B}"] = {"size": name, "K": K, "batch": B, "cfg": cell.cfg, **{k: facts[k] for k in ("commit", "torch", "threads", "chain_steps", "decode")}, "ceilings": args.ceilings, "runs": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"provenance": facts, "cells": done})
        for who, r in rows.items():
            print(f"{name:6} K {K:3} batch {B:3}  {who:28} " + (r["skipped"] if "skipped" in r else f"{1e3 * r['seconds']:10.1f} ms {r['images_per_second']:10.3f} images/s {r['of_roofline']:6.2f}x roofline"), flush=True)
        if args.profile and i == 0: trace(cell, args.profile)
    print(args.out)


def trace(cell, prefix):
    for dtype, path in cell.args.paths:
        for kind in cell.args.kinds:
            c = Contestant(cell, kind, path, dtype)
            c.run()
            c.times.append(clock(cell.device, c.run))
            c.busy(prefix)


if __name__ == "__main__": main()
