"""Seconds an image of the models that the paper's first table compares, on one device at batch 1: ADM, DiT-XL/2, MAR and MARVAL, each with what it takes to get from noise to pixels.

ADM (guided-diffusion's class-conditional U-Net for 256 x 256, without the classifier that guides it to its best FID) and DiT-XL/2 (guided: two evaluations a step; then the decoder of Stable Diffusion's autoencoder) are built from `diffusers`,
MAR and MARVAL from this package, by `bench/sampling.py`. All weights are random: times don't depend on them. What was built is held against the published numbers of parameters and operations, to one per cent.

On a GPU whole images are drawn. On a CPU, where ADM would take hours, a few denoising steps are timed, and an image is reckoned as steps x median + decoding; the result says so. Results replace those of the same model, device, type and path.

    python bench/baselines.py                                                  # a GPU: everything, some minutes
    python bench/baselines.py --device cpu --threads 1 --models ADM DiT-XL/2   # a CPU: three steps of each
    python bench/baselines.py --device cpu --threads 1 --models MARVAL-B MAR-B --rounds 1
    python bench/baselines.py --device cpu --tiny --out /tmp/baselines.json    # a trial with small networks, seconds
"""
import argparse
import gc
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from sampling import DTYPES, Cell, Contestant, clock, on_gpu, random_weights

from marval.config import preset
from marval.diffusion import Schedule
from marval.evaluate import run_provenance
from marval.files import read_json, write_json

KIND = "marval-baselines"
STEPS, DIT_CFG = 250, 1.5                # of both, as published; 1.5 is DiT's guidance at its FID of 2.27
PUBLISHED = {                            # parameters, and multiplications and additions of one evaluation for one image, counted as one operation each pair
    "ADM": (554e6, 1120e9, "Dhariwal & Nichol 2021 (arXiv 2105.05233), operations by Peebles & Xie 2022 (arXiv 2212.09748)"),
    "DiT-XL/2": (675e6, 118.6e9, "Peebles & Xie 2022 (arXiv 2212.09748)"),
    "MAR-B": (208e6, None, "Li et al. 2024 (arXiv 2406.11838)"), "MAR-L": (479e6, None, "Li et al. 2024"), "MAR-H": (943e6, None, "Li et al. 2024")}
SCALES = dict(B="base", L="large", H="huge")
MODELS = ("ADM", "DiT-XL/2", *(f"{m}-{s}" for m in ("MAR", "MARVAL") for s in SCALES))


def adm(tiny):
    "guided-diffusion's 256 x 256 U-Net, and the shape of what it draws: widths 256 x (1, 1, 2, 2, 4, 4), two residual blocks a level, attention from 32 x 32 down, heads of 64, residual up- and downsampling, scale-shift norms, learned variance."
    from diffusers import UNet2DModel
    side, widths, head = (64, (32,) * 6, 8) if tiny else (256, (256, 256, 512, 512, 1024, 1024), 64)
    return UNet2DModel(sample_size=side, in_channels=3, out_channels=6, layers_per_block=2, num_class_embeds=1000, block_out_channels=widths, attention_head_dim=head, resnet_time_scale_shift="scale_shift",
                       down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3, up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
                       downsample_type="resnet", upsample_type="resnet", norm_eps=1e-5, norm_num_groups=32), (3, side, side)


def dit(tiny):
    "DiT-XL/2 for latents of 32 x 32 x 4: 28 blocks of width 1152 with 16 heads, patches of 2 x 2, learned variance."
    from diffusers import DiTTransformer2DModel
    side, heads, dim, layers = (8, 2, 8, 2) if tiny else (32, 16, 72, 28)
    return DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=dim, num_layers=layers, in_channels=4, out_channels=8, sample_size=side, patch_size=2, num_embeds_ada_norm=1000), (4, side, side)


def sd_vae(tiny):
    "The autoencoder of Stable Diffusion, which DiT draws latents of: stride 8, 83.7 M parameters."
    from diffusers import AutoencoderKL
    widths = (32,) * 4 if tiny else (128, 256, 512, 512)
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=256)


def parameters(net):
    "How many. diffusers gives every block of a DiT its own copy of the embedding of time and class, which the published network has once."
    n, blocks = sum(p.numel() for p in net.parameters()), getattr(net, "transformer_blocks", [])
    return n - sum(p.numel() for b in blocks[1:] for p in b.norm1.emb.parameters())


def size(name, build) -> dict:
    "Parameters and operations of a network without numbers, beside the published ones. A `RuntimeError` where they are further apart than 1 %."
    with torch.device("meta"):
        net, shape = build(False)
        with FlopCounterMode(display=False) as counter: net(torch.empty(1, *shape), torch.zeros(1, dtype=torch.long), class_labels=torch.zeros(1, dtype=torch.long))
    have, (*want, source) = (parameters(net), counter.get_total_flops() / 2), PUBLISHED[name]
    return agreed(name, have, want) | {"source": source}


def agreed(name, have, want) -> dict:
    "Built beside published, or a `RuntimeError`."
    for what, h, w in zip(("parameters", "operations"), have, want):
        if w and abs(h / w - 1) > 0.01: raise RuntimeError(f"{name} as built has {h:.4g} {what}; expected {w:.4g} within 1 %")
    return {"parameters": have[0], "published_parameters": want[0], "multiply_adds": have[1], "published_multiply_adds": want[1]}


class Denoiser:
    "A network that is evaluated once (or twice, guided) a step on the whole image, and the decoder behind it, if any."
    def __init__(self, args, name, dtype):
        build, self.device, self.dtype = {"ADM": adm, "DiT-XL/2": dit}[name], args.device, DTYPES[dtype]
        place = lambda net: net.eval().requires_grad_(False) if self.dtype == torch.float32 else net.eval().requires_grad_(False).to(self.dtype)
        torch.manual_seed(0)
        with torch.device(args.device): net, self.shape = build(args.tiny)
        self.net, self.cfg, self.vae = place(net), DIT_CFG if name == "DiT-XL/2" else None, None
        if self.cfg:
            with torch.device(args.device): self.vae = place(sd_vae(args.tiny))
        self.batch, self.steps = args.batch, args.steps
        abar = Schedule.cosine(device=args.device).abar.flip(0)[:: max(1, 1000 // self.steps)][: self.steps].to(self.dtype)   # any schedule costs the same
        self.abar = torch.cat([abar, abar.new_ones(1)])

    def start(self): return torch.randn(self.batch, *self.shape, device=self.device, dtype=self.dtype)

    def step(self, x, i):
        "One step of the respaced ancestral chain: the noise in x_t, x_0, x_{t-1} of a draw in between. The classes are 0; the null class is 1000."
        C, labels, t = self.shape[0], torch.zeros(self.batch, dtype=torch.long, device=self.device), torch.full((1,), i, dtype=torch.long, device=self.device)
        if self.cfg:
            cond, null = self.net(torch.cat([x, x]), t.expand(2 * self.batch), class_labels=torch.cat([labels, labels + 1000])).sample[:, :C].chunk(2)
            eps = null + self.cfg * (cond - null)
        else: eps = self.net(x, t.expand(self.batch), class_labels=labels).sample[:, :C]
        now, then = self.abar[i], self.abar[i + 1]
        x0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        return then.sqrt() * x0 + (1 - then).sqrt() * torch.randn_like(x)

    def decode(self, z): return z if self.vae is None else self.vae.decode(z / 0.18215).sample

    @torch.inference_mode()
    def measure(self, args) -> dict:
        "Whole images, or a few steps after one to warm up."
        few = args.measured is not None and args.measured < self.steps
        steps, kept = [], [self.start()]
        def advance(i): kept[0] = self.step(kept[0], i)
        def image():
            x = self.start()
            for i in range(self.steps): x = self.step(x, i)
            return self.decode(x)
        for i in range(1 + (args.measured if few else 1)): steps.append(clock(self.device, lambda: advance(i)))
        if few:
            step, steps = median(steps[1:]), steps[1:]
            decodes = [clock(self.device, lambda: self.decode(kept[0])) for _ in range(1 + args.rounds)][1:] if self.vae is not None else [{"seconds": 0., "cpu_seconds": 0.}]
            whole = {k: self.steps * step[k] + median(decodes)[k] for k in step}
            return whole | {"measured": f"{len(steps)} of {self.steps} steps", "rounds": 1, "step_seconds": [s["seconds"] for s in steps], "step_cpu_seconds": [s["cpu_seconds"] for s in steps],
                            "decode_seconds": median(decodes)["seconds"], "decode_cpu_seconds": median(decodes)["cpu_seconds"]}
        self.decode(kept[0])
        return median([clock(self.device, image) for _ in range(args.rounds)]) | {"measured": "whole images", "rounds": args.rounds}


def median(times): return {k: statistics.median(t[k] for t in times) for k in times[0]}


def denoiser(args, name, dtype) -> list[dict]:
    "ADM or DiT-XL/2."
    net = Denoiser(args, name, dtype)
    made = {"parameters": parameters(net.net)} if args.tiny else size(name, {"ADM": adm, "DiT-XL/2": dit}[name])
    return [made | net.measure(args) | dict(model=name, path="diffusers", sampler="chain", steps=args.steps, cfg=net.cfg, K=None, decoded=True)]


def masked(args, name, dtype, model) -> list[dict]:
    "MAR by its chain, or MARVAL by one step, eagerly (plain) and prepared (fast)."
    sampler = "chain" if name.startswith("MAR-") else "one step"
    made = {"parameters": sum(p.numel() for p in model.parameters())}
    if not args.tiny:
        want, _, source = PUBLISHED["MAR-" + name[-1]]
        made = agreed(name, (made["parameters"], None), (want, None)) | {"source": source}
    scale, rows = SCALES[name[-1]], []
    cell = Cell(SimpleNamespace(device=args.device, chain_steps=args.chain_steps, decode=True, vaes=args.vaes), scale, model, args.K, args.batch)
    for path in args.paths:
        c = Contestant(cell, sampler, path, dtype)
        times = [clock(args.device, c.run)]
        if not (args.device == "cpu" and times[0]["seconds"] > 20): times = []                    # nothing to warm up that would show
        times += [clock(args.device, c.run) for _ in range(args.rounds - len(times))]
        rows.append(made | median(times) | dict(model=name, scale=scale, path=path, sampler=sampler, steps=args.chain_steps if sampler == "chain" else 1, cfg=c.cfg if sampler == "chain" else None, K=args.K,
                                                decoded=True, measured="whole images", rounds=len(times)))
    return rows


def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    p.add_argument("--dtype", nargs="+", default=None, choices=tuple(DTYPES), help="default: fp32 and bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--paths", nargs="+", default=("plain", "fast"), choices=("plain", "fast"), help="of MAR and MARVAL; the fast one keeps a second copy of the weights")
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--K", type=int, default=64, help="autoregressive steps of MAR and MARVAL")
    p.add_argument("--measured", type=int, default=None, help="denoising steps of ADM and DiT that are run (default: all on a GPU, 3 on a CPU)")
    p.add_argument("--rounds", type=int, default=3, help="images, or decodings, of each; medians count")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--tiny", action="store_true", help="small networks and few steps: a trial of the program, whose times mean nothing")
    p.add_argument("--out", type=Path, default=None, help="default: bench/results/baselines_DEVICE.json")
    args = p.parse_args(argv)
    if args.tiny and not args.out: p.error("--tiny: expected --out, so that no real result is replaced")
    gpu = on_gpu(p, args, "baselines")
    if min(args.batch, args.K, args.rounds, args.measured or 1) < 1: p.error("--batch, --K, --rounds, --measured: expected at least 1")
    args.dtype = args.dtype or (["fp32", "bf16"] if gpu else ["fp32"])
    if args.measured is None and not gpu: args.measured = 3
    args.steps, args.chain_steps, args.vaes = (5, 3, {}) if args.tiny else (STEPS, 100, {})
    if args.tiny: args.K = min(args.K, 4)
    return args


def versions():
    from importlib.metadata import version
    return {k: version(k) for k in ("torch", "diffusers")}


def main(argv=None):
    args = arguments(argv)
    facts = run_provenance() | versions() | dict(threads=torch.get_num_threads(), batch=args.batch, weights="random", tiny=args.tiny)
    key = lambda r: tuple(r[k] for k in ("model", "path", "dtype", "device", "threads", "batch", "K"))
    runs = {key(r): r for r in (read_json(args.out)["runs"] if args.out.exists() else [])}
    for name in args.models:
        model = random_weights(preset("tiny" if args.tiny else SCALES[name[-1]]).model, args.device) if name.startswith("MAR") else None
        for dtype in args.dtype:
            for row in masked(args, name, dtype, model) if model is not None else denoiser(args, name, dtype):
                row = {"model": row.pop("model"), "dtype": dtype} | row | facts
                runs[key(row)] = row
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_json(args.out, {"kind": KIND, "runs": list(runs.values())})
                print(f"{name:9} {row['path']:9} {dtype}: {row['seconds']:9.3f} s an image on the clock, {row['cpu_seconds']:9.3f} s of processors; {row['measured']}, {row['parameters'] / 1e6:.1f} M parameters", flush=True)
        del model
        args.vaes.clear()
        gc.collect()
    print(args.out)


if __name__ == "__main__": main()
