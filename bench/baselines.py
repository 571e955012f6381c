"""Seconds an image of the models that the paper's first table compares, on one device at batch 1: ADM,
DiT-XL/2, MAR and MARVAL, each with what it takes to get from noise to pixels.

ADM (guided-diffusion's class-conditional U-Net for 256 x 256, without the classifier that guides it to
its best FID) and DiT-XL/2 (guided: two evaluations a step; then the decoder of Stable Diffusion's
autoencoder) are built from `diffusers`, MAR and MARVAL from this package, by `bench/sampling.py`. All
weights are random: times don't depend on them. What was built is held against the published numbers of
parameters and operations, to one per cent.

On a GPU whole images are drawn. On a CPU, where ADM would take hours, a few denoising steps are timed,
and an image is reckoned as steps x median + decoding; the result says so. Results replace those of the
same model, device, type and path.

examples:
    python bench/baselines.py                                   # a GPU: everything, some minutes
    python bench/baselines.py --device cpu --threads 1 --models ADM DiT-XL/2   # three steps of each
    python bench/baselines.py --device cpu --threads 1 --models MARVAL-B MAR-B --rounds 1
    python bench/baselines.py --device cpu --tiny --out /tmp/baselines.json    # a trial, small networks
"""
import gc
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent))  # where this file is loaded by its path
from common import (DTYPES, BadInput, clock, device_arguments, entry_point, facts, keep, parser, settle,
                    stored, whole)
from sampling import Cell, Contestant, random_weights

from marval.config import preset
from marval.cost import flop_counter
from marval.diffusion import Schedule

KIND = "marval-baselines"
STEPS, DIT_CFG = 250, 1.5     # of both, as published; 1.5 is DiT's guidance at its FID of 2.27
ADM_SOURCE = ("Dhariwal & Nichol 2021 (arXiv 2105.05233), "
              "operations by Peebles & Xie 2022 (arXiv 2212.09748)")
PUBLISHED = {                 # parameters; multiply-adds of one evaluation for one image; source
    "ADM": (554e6, 1120e9, ADM_SOURCE),
    "DiT-XL/2": (675e6, 118.6e9, "Peebles & Xie 2022 (arXiv 2212.09748)"),
    "MAR-B": (208e6, None, "Li et al. 2024 (arXiv 2406.11838)"),
    "MAR-L": (479e6, None, "Li et al. 2024"),
    "MAR-H": (943e6, None, "Li et al. 2024")}
SCALES = dict(B="base", L="large", H="huge")
MODELS = ("ADM", "DiT-XL/2", *(f"{m}-{s}" for m in ("MAR", "MARVAL") for s in SCALES))


def adm(tiny):
    """guided-diffusion's 256 x 256 U-Net, and the shape of what it draws: widths 256 x (1, 1, 2, 2, 4, 4),
    two residual blocks a level, attention from 32 x 32 down, heads of 64, residual up- and downsampling,
    scale-shift norms, learned variance."""
    from diffusers import UNet2DModel
    side, widths, head = (64, (32,) * 6, 8) if tiny else (256, (256, 256, 512, 512, 1024, 1024), 64)
    net = UNet2DModel(
        sample_size=side, in_channels=3, out_channels=6, layers_per_block=2, num_class_embeds=1000,
        block_out_channels=widths, attention_head_dim=head, resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        downsample_type="resnet", upsample_type="resnet", norm_eps=1e-5, norm_num_groups=32)
    return net, (3, side, side)


def dit(tiny):
    """DiT-XL/2 for latents of 32 x 32 x 4: 28 blocks of width 1152 with 16 heads, patches of 2 x 2, learned
    variance."""
    from diffusers import DiTTransformer2DModel
    side, layers = (8, 2) if tiny else (32, 28)
    heads, dim = (2, 8) if tiny else (16, 72)
    net = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=dim, num_layers=layers, in_channels=4, out_channels=8,
        sample_size=side, patch_size=2, num_embeds_ada_norm=1000)
    return net, (4, side, side)


def sd_vae(tiny):
    "The autoencoder of Stable Diffusion, which DiT draws latents of: stride 8, 83.7 M parameters."
    from diffusers import AutoencoderKL
    widths = (32,) * 4 if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=widths, layers_per_block=2, latent_channels=4, sample_size=256)


BUILD = {"ADM": adm, "DiT-XL/2": dit}


def parameters(net):
    """How many. diffusers gives every block of a DiT its own copy of the embedding of time and class, which
    the published network has once."""
    n, blocks = sum(p.numel() for p in net.parameters()), getattr(net, "transformer_blocks", [])
    return n - sum(p.numel() for b in blocks[1:] for p in b.norm1.emb.parameters())


def size(name, build) -> dict:
    "Parameters and operations of a network without numbers, or a `RuntimeError`, see `agreed`."
    with torch.device("meta"):
        net, shape = build(False)
        labels = torch.zeros(1, dtype=torch.long)
        with flop_counter() as counter: net(torch.empty(1, *shape), labels, class_labels=labels)
    *want, source = PUBLISHED[name]
    return agreed(name, (parameters(net), counter.get_total_flops() / 2), want) | {"source": source}


def agreed(name, have, want) -> dict:
    "Built beside published; a `RuntimeError` where they are more than 1 % apart."
    for what, h, w in zip(("parameters", "operations"), have, want):
        if w and abs(h / w - 1) > 0.01:
            raise RuntimeError(f"{name} as built has {h:.4g} {what}; expected {w:.4g} within 1 %")
    return {"parameters": have[0], "published_parameters": want[0],
            "multiply_adds": have[1], "published_multiply_adds": want[1]}


class Denoiser:
    "A network evaluated once (guided: twice) a step on the whole image, and the decoder behind it, if any."
    def __init__(self, args, name, dtype):
        self.device, self.dtype = args.device, DTYPES[dtype]
        torch.manual_seed(0)
        with torch.device(args.device): net, self.shape = BUILD[name](args.tiny)
        self.net, self.cfg, self.vae = self._place(net), DIT_CFG if name == "DiT-XL/2" else None, None
        if self.cfg:
            with torch.device(args.device): self.vae = self._place(sd_vae(args.tiny))
        self.batch, self.steps = args.batch, args.steps
        every = max(1, 1000 // self.steps)                              # any schedule costs the same
        abar = Schedule.cosine(device=args.device).abar.flip(0)[::every][:self.steps].to(self.dtype)
        self.abar = torch.cat([abar, abar.new_ones(1)])

    def _place(self, net):
        net = net.eval().requires_grad_(False)
        return net if self.dtype == torch.float32 else net.to(self.dtype)

    def start(self): return torch.randn(self.batch, *self.shape, device=self.device, dtype=self.dtype)

    def eps(self, x, i):
        "Predicted noise, guided where the model is. The classes are 0; the null class is 1000."
        C, long = self.shape[0], dict(dtype=torch.long, device=self.device)
        labels, t = torch.zeros(self.batch, **long), torch.full((1,), i, **long)
        if not self.cfg: return self.net(x, t.expand(self.batch), class_labels=labels).sample[:, :C]
        both = torch.cat([labels, labels + 1000])
        out = self.net(torch.cat([x, x]), t.expand(2 * self.batch), class_labels=both).sample[:, :C]
        cond, null = out.chunk(2)
        return null + self.cfg * (cond - null)

    def step(self, x, i):
        "One step of the respaced ancestral chain: the noise in x_t, x_0, x_{t-1} of a draw in between."
        eps, now, then = self.eps(x, i), self.abar[i], self.abar[i + 1]
        x0 = ((x - (1 - now).sqrt() * eps) / now.sqrt()).clamp(-1, 1)
        return then.sqrt() * x0 + (1 - then).sqrt() * torch.randn_like(x)

    def decode(self, z): return z if self.vae is None else self.vae.decode(z / 0.18215).sample

    def image(self):
        x = self.start()
        for i in range(self.steps): x = self.step(x, i)
        return self.decode(x)

    @torch.inference_mode()
    def measure(self, args) -> dict:
        "Whole images, or a few steps after one to warm up."
        x = self.step(self.start(), 0)
        if args.measured is not None and args.measured < self.steps: return self._few(args, x)
        self.decode(x)
        times = [clock(self.device, self.image) for _ in range(args.rounds)]
        return median(times) | {"measured": "whole images", "rounds": args.rounds}

    def _few(self, args, x):
        steps = []
        for i in range(1, 1 + args.measured):
            kept = []
            steps.append(clock(self.device, lambda: kept.append(self.step(x, i))))
            x = kept[0]
        decodes = [{"seconds": 0., "cpu_seconds": 0.}]
        if self.vae is not None:
            self.decode(x)
            decodes = [clock(self.device, lambda: self.decode(x)) for _ in range(args.rounds)]
        step, decode = median(steps), median(decodes)
        whole_image = {k: self.steps * step[k] + decode[k] for k in step}
        return whole_image | {
            "measured": f"{len(steps)} of {self.steps} steps", "rounds": 1,
            "step_seconds": [s["seconds"] for s in steps],
            "step_cpu_seconds": [s["cpu_seconds"] for s in steps],
            "decode_seconds": decode["seconds"], "decode_cpu_seconds": decode["cpu_seconds"]}


def median(times): return {k: statistics.median(t[k] for t in times) for k in times[0]}


def denoiser(args, name, dtype) -> list[dict]:
    "ADM or DiT-XL/2."
    net = Denoiser(args, name, dtype)
    made = {"parameters": parameters(net.net)} if args.tiny else size(name, BUILD[name])
    about = dict(model=name, path="diffusers", sampler="chain", steps=args.steps, cfg=net.cfg, K=None)
    return [made | net.measure(args) | about | {"decoded": True}]


def masked(args, name, dtype, model) -> list[dict]:
    "MAR by its chain, or MARVAL by one step, eagerly (plain) and prepared (fast)."
    made = {"parameters": sum(p.numel() for p in model.parameters())}
    if not args.tiny:
        want, _, source = PUBLISHED["MAR-" + name[-1]]
        made = agreed(name, (made["parameters"], None), (want, None)) | {"source": source}
    scale, chain = SCALES[name[-1]], name.startswith("MAR-")
    kind = "chain" if chain else "one step"
    asked = SimpleNamespace(device=args.device, chain_steps=args.chain_steps, kinds=(kind,), decode=True,
                            vaes=args.vaes)
    cell, rows = Cell(asked, scale, model, args.K, args.batch), []
    for path in args.paths:
        c = Contestant(cell, kind, path, dtype)
        times = [clock(args.device, c.run)]
        slow = args.device == "cpu" and times[0]["seconds"] > 20        # nothing to warm up that would show
        if not slow: times = []
        times += [clock(args.device, c.run) for _ in range(args.rounds - len(times))]
        rows.append(made | median(times) | dict(
            model=name, scale=scale, path=path, sampler=kind, steps=args.chain_steps if chain else 1,
            cfg=c.cfg if chain else None, K=args.K, decoded=True, measured="whole images", rounds=len(times)))
    return rows


def arguments(argv=None):
    p = parser(__doc__)
    device_arguments(p)
    p.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    p.add_argument("--dtype", nargs="+", default=None, choices=tuple(DTYPES),
                   help="default: fp32 and bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--paths", nargs="+", default=("plain", "fast"), choices=("plain", "fast"),
                   help="of MAR and MARVAL; the fast one keeps a second copy of the weights")
    p.add_argument("--batch", type=whole(1, 1024), default=1)
    p.add_argument("--K", type=whole(1, 256), default=64, help="autoregressive steps of MAR and MARVAL")
    p.add_argument("--measured", type=whole(1, STEPS), default=None,
                   help="denoising steps of ADM and DiT that are run (default: all on a GPU, 3 on a CPU)")
    p.add_argument("--rounds", type=whole(1, 1000), default=3,
                   help="images, or decodings, of each; medians count")
    p.add_argument("--tiny", action="store_true",
                   help="small networks and few steps: a trial of the program, whose times mean nothing")
    args = p.parse_args(argv)
    if args.tiny and not args.out: raise BadInput("--tiny: expected --out, to replace no real result")
    gpu = settle(args, "baselines")
    args.dtype = args.dtype or (["fp32", "bf16"] if gpu else ["fp32"])
    if args.measured is None and not gpu: args.measured = 3
    args.steps, args.chain_steps, args.vaes = (5, 3, {}) if args.tiny else (STEPS, 100, {})
    if args.tiny: args.K = min(args.K, 4)
    return args


def versions():
    "Of what the networks are built from; diffusers may be missing where only MAR and MARVAL are timed."
    from importlib.metadata import PackageNotFoundError, version
    try: found = version("diffusers")
    except PackageNotFoundError: found = None
    return {"torch": torch.__version__, "diffusers": found}


def key(row): return tuple(row.get(k) for k in ("model", "path", "dtype", "device", "threads", "batch", "K"))


def earlier(path) -> dict:
    "Rows of earlier runs, by what tells them apart. `BadInput` where the file holds something else."
    rows = stored(path, kind=str, runs=list).get("runs", [])
    if all(isinstance(r, dict) for r in rows): return {key(r): r for r in rows}
    raise BadInput(f"{path}: no result of this benchmark; expected a list of objects as its runs")


def measured(args, name):
    "Rows of one model, as they come."
    model = None
    if name.startswith("MAR"):
        model = random_weights(preset("tiny" if args.tiny else SCALES[name[-1]]).model, args.device)
    for dtype in args.dtype:
        rows = masked(args, name, dtype, model) if model is not None else denoiser(args, name, dtype)
        for row in rows: yield {"model": row.pop("model"), "dtype": dtype} | row
    args.vaes.clear()


def work(argv=None) -> dict:
    "Parse, measure, store; returns the rows that were measured."
    args = arguments(argv)
    about = facts() | versions() | dict(batch=args.batch, weights="random", tiny=args.tiny)
    runs, new = earlier(args.out), []
    for name in args.models:
        for row in measured(args, name):
            new.append(row | about)
            runs[key(new[-1])] = new[-1]
            keep(args.out, {"kind": KIND, "runs": list(runs.values())})
            print(f"{name:9} {row['path']:9} {row['dtype']}: {row['seconds']:9.3f} s an image on the clock, "
                  f"{row['cpu_seconds']:9.3f} s of processors; {row['measured']}, "
                  f"{row['parameters'] / 1e6:.1f} M parameters", flush=True)
        gc.collect()
    print(args.out)
    return {"runs": new}


@entry_point
def main(argv) -> int:
    work(argv)
    return 0


if __name__ == "__main__": sys.exit(main())
