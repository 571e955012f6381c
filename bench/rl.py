"""How much memory a step of RL needs, against the number K of autoregressive steps, with each of them
computed again in the backward pass (rl.recompute=steps) and without. Beside it, what `marval.plan` says.

One stage, random weights; what is stored (weights, averages, optimiser) is there before the step that is
watched. On a GPU its allocator tells the peak, on a CPU every allocation is followed. Tokenizer and
reward take part with --images all, with random weights (ViT-H-14 needs open_clip); without a reward, it
is a mean of squares. And the roll-out that should fit into 80 GB: huge, K = 64, tokenizer, ViT-H-14, 8
images: the second command measures it, the third predicts it alone.

examples:
    python bench/rl.py            # on a GPU: base, 8 images, bf16, K = 8, 16, 32, 64, tokenizer and reward
    python bench/rl.py --size huge --K 64 --batch 8 --recompute steps     # the large one
    python bench/rl.py --predict  # what the plan says of the large one, without running anything
    python bench/rl.py --device cpu --batch 1 --set model.width=192 --set model.depth=2   # 256 tokens, narrow
    python bench/rl.py --device cpu --size digits --K 2 4 8 16 --out /tmp/rl.json     # a trial, seconds
"""
import sys
from dataclasses import replace
from unittest.mock import patch

import torch
from common import (DTYPES, SCALES, adapted, clock, device_arguments, entry_point, facts, keep, parser,
                    settle, stored, whole)
from memory import known_answer, peak, stored_bytes

from marval import plan
from marval.config import preset
from marval.data import to_images
from marval.mar import MAR
from marval.rl import RLStage
from marval.train import step_generator

GOAL = 1.2
LARGE = {"rl.batch": 8, "sampling.K": 64, "compute.accumulate": 1, "rl.recompute": "steps"}


def tokenizer(cfg, device):
    "KL-16's decoder with random weights, as a function, and itself."
    from marval.vae import KL16
    with torch.device(device): vae = KL16(channels=cfg.model.vae_embed_dim).eval().requires_grad_(False)
    return (lambda z: to_images(vae.decode(z / cfg.data.latent_scale, checkpoint=True))), vae


def image_tower(cfg, device):
    "A score of the configuration's architecture, with random weights, as a function, and itself."
    from marval.text_rewards import TextScore, architecture, build_towers
    arch, m = architecture(cfg.rl.reward_model), cfg.model
    dtype = torch.bfloat16 if cfg.compute.precision == "bf16" else torch.float32
    score = TextScore(arch, build_towers(arch, device).visual.to(dtype), 1.0, checkpoint=True)
    text = torch.randn(m.class_num, arch.config["embed_dim"], device=device)
    return (lambda x, y: score.score(x, text[y])), score


def build(args, cfg):
    "The stage, and the networks beside it."
    decode, reward, beside = (lambda z: z), (lambda x, y: -x.square().flatten(1).mean(1)), []
    if args.images != "none":
        decode, vae = tokenizer(cfg, args.device)
        beside.append(vae)
    if args.images == "all":
        reward, score = image_tower(cfg, args.device)
        beside.append(score)
    torch.manual_seed(0)
    with torch.device(args.device): net = MAR(cfg.model)
    with torch.no_grad():
        for p in net.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    return RLStage(cfg, net, reward, decode, device=args.device), beside


def predicted(cfg, images) -> dict:
    "What the plan says of a step: bytes beyond what is stored (gradients with them), and bytes in all."
    if images == "decoder":
        with patch.object(plan, "rewards_cost", lambda cfg: plan.Through()): return predicted(cfg, "all")
    if images == "all":
        n = plan.need(cfg, "rl", 1)
        there = sum(t.weights for t in plan._images(cfg))
        return {"predicted_bytes": n.gradients + n.activations + n.images - there, "predicted_total": n.bytes}
    meter = plan.Meter(cfg.model, cfg.compute.precision, cfg.compute.recompute == "blocks")
    alone = replace(cfg, data=replace(cfg.data, name="digits"))
    own = plan._rl(alone, meter, cfg.rl.batch // cfg.compute.accumulate)[0]
    there = 16 * meter.params + meter.asked
    return {"predicted_bytes": 4 * meter.params + own, "predicted_total": there + 4 * meter.params + own}


def measure(args, cfg):
    "Rows for each way and K, on one stage."
    stage, beside = build(args, cfg)
    stage.step(0, step_generator(0, "rl", 0, args.device))          # allocates the optimiser's averages
    there = stored_bytes(stage.policy, stage.student, stage.frozen, stage.opt, *beside)
    for way in args.recompute:
        for K in args.K:
            stage.cfg = adapted(cfg, {"sampling.K": K, "rl.recompute": way})
            stage.r = stage.cfg.rl
            row = {"K": K, "recompute": way, "stored_bytes": there, **predicted(stage.cfg, args.images)}
            yield row | watched(args, stage, K, there)


def watched(args, stage, K, there) -> dict:
    "One step: its peak and its time; or why there is none."
    times = []
    def step(): stage.step(K, step_generator(0, "rl", K, args.device))
    try: most = peak(args.device, lambda: times.append(clock(args.device, step)))
    except torch.OutOfMemoryError as e:
        stage.opt.zero_grad(set_to_none=True)
        return {"skipped": str(e).splitlines()[0][:120]}
    return {"peak_bytes": most, "total_bytes": there + most, **times[0]}


def arguments(argv=None):
    p = parser(__doc__)
    device_arguments(p)
    p.add_argument("--size", default="base", choices=SCALES)
    p.add_argument("--K", nargs="+", type=whole(1, 256), default=(8, 16, 32, 64), help="autoregressive steps")
    p.add_argument("--batch", type=whole(1, 4096), help="images a step (default: 8 on a GPU, 1 on a CPU)")
    p.add_argument("--recompute", nargs="+", choices=("steps", "none"), default=("steps", "none"))
    p.add_argument("--precision", choices=tuple(DTYPES), help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--images", choices=("all", "decoder", "none"),
                   help="what takes part: tokenizer and reward, the tokenizer alone, neither "
                        "(default: all on a GPU, none on a CPU)")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    p.add_argument("--predict", action="store_true", help="only the large roll-out, on paper")
    args = p.parse_args(argv)
    gpu = settle(args, "rl")
    args.batch = args.batch or (8 if gpu else 1)
    args.precision = args.precision or ("bf16" if gpu else "fp32")
    args.images = args.images or ("all" if gpu else "none")
    return args


def large() -> dict:
    "The plan's word on the roll-out that should fit into 80 GB."
    n = plan.need(adapted(preset("huge"), LARGE), "rl", 1)
    parts = ("weights", "gradients", "optimiser", "averages", "activations", "images")
    fits = n.bytes < 80e9
    print(f"huge, K 64, 8 images, tokenizer and ViT-H-14: {n.bytes / 1e9:.1f} GB predicted, "
          f"{'fits' if fits else 'does not fit'} into 80 GB", flush=True)
    return {"settings": [f"{k}={v}" for k, v in LARGE.items()], "bytes": n.bytes, "fits_80_GB": fits,
            "parts": {k: getattr(n, k) for k in parts}}


def show(row):
    seen = row.get("skipped") or (f"{row['peak_bytes'] / 1e6:9.1f} MB above the "
                                  f"{row['stored_bytes'] / 1e6:.1f} stored")
    print(f"recompute {row['recompute']:5} K {row['K']:3}  {seen}; "
          f"predicted {row['predicted_bytes'] / 1e6:.1f} MB", flush=True)


def summary(rows):
    "The largest K over the smallest, for both ways."
    for way in ("steps", "none"):
        by = {r["K"]: r for r in rows if r["recompute"] == way and "peak_bytes" in r}
        if len(by) < 2: continue
        most, least = by[max(by)], by[min(by)]
        print(f"recompute {way}: K {max(by)} over K {min(by)}: "
              f"{most['total_bytes'] / least['total_bytes']:.2f} in all, "
              f"{most['peak_bytes'] / least['peak_bytes']:.2f} of what the step adds (goal: {GOAL})")


def merged(rows, row):
    "Those of other K and ways are kept."
    others = [r for r in rows if (r["K"], r["recompute"]) != (row["K"], row["recompute"])]
    return sorted([*others, row], key=lambda r: (r["recompute"] != "steps", r["K"]))


def configuration(args):
    own = {"rl.batch": args.batch, "compute.precision": args.precision, "compute.accumulate": 1,
           "sampling.K": args.K[0], "rl.recompute": args.recompute[0]}
    return adapted(preset(args.size), own, args.set)


def work(argv=None) -> dict:
    "Parse, measure, store; returns the cell that was measured."
    args = arguments(argv)
    about, cfg, old = facts(), configuration(args), stored(args.out, cells=dict)
    settings = [s.removeprefix("model.") for s in args.set]
    beside = {"all": ["images"], "decoder": ["decoder"], "none": []}[args.images]
    key = " ".join([args.size, *settings, f"batch={args.batch}", args.precision, *beside])
    cells, big, rows = old.get("cells", {}), old.get("large"), []
    if args.predict or args.size == "huge" and args.images == "all": big = large()
    result = {"provenance": about, "large": big, "cells": cells}
    if args.predict:
        keep(args.out, result)
        return result
    right = known_answer(args.device)
    print(f"{about['device']}; {key}; the instrument shows {right:.4f} of a known peak", flush=True)
    rows = cells.get(key, {}).get("runs", [])
    for row in measure(args, cfg):
        rows = merged(rows, row | about)
        cells[key] = {"size": args.size, "batch": args.batch, "precision": args.precision,
                      "images": args.images, "settings": args.set, "instrument": right, "goal": GOAL,
                      "runs": rows}
        keep(args.out, result)
        show(row)
    summary(rows)
    print(args.out)
    return {"cells": {key: cells[key]}}


@entry_point
def main(argv) -> int:
    work(argv)
    return 0


if __name__ == "__main__": sys.exit(main())
