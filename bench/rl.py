"""How much memory a step of RL needs, against the number K of autoregressive steps, with each of them computed again on the way back (rl.recompute=steps) and without. Beside it, what `marval.plan` says.

One stage, random weights; what is stored (weights, averages, optimiser) is there before the step that is watched. On a GPU its allocator tells the peak, on a CPU every allocation is followed. Tokenizer and reward take part with
--images, with random weights (ViT-H-14 needs open_clip); without, the reward is a mean of squares. And the roll-out that should fit into 80 GB: huge, K = 64, tokenizer, ViT-H-14, 8 images: the second command measures it, the third predicts it alone.

    python bench/rl.py                                                    # on a GPU: base, 8 images, bf16, K = 8, 16, 32, 64, tokenizer and reward
    python bench/rl.py --size huge --K 64 --batch 8 --recompute steps     # the large one
    python bench/rl.py --predict                                          # what the plan says of the large one, without running anything
    python bench/rl.py --device cpu --batch 1 --set model.width=192 --set model.depth=2 --set model.head_width=256 --set model.head_depth=1   # 256 tokens as in base, a narrow network
    python bench/rl.py --device cpu --size digits --K 2 4 8 16 --out /tmp/rl.json     # a trial, seconds
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from marval.config import override, preset
from marval.data import to_images
from marval.evaluate import run_provenance
from marval.files import write_json
from marval.mar import MAR
from marval.plan import Meter, _images, _rl, need
from marval.rl import RLStage
from marval.train import step_generator
from memory import known_answer, peak, stored
from sampling import DTYPES, clock, on_gpu

GOAL, LARGE = 1.2, ["rl.batch=8", "sampling.K=64", "compute.accumulate=1", "rl.recompute=steps"]


def images_and_reward(cfg, device):
    "KL-16 and an image tower of the configuration's architecture, both with random weights."
    from marval.text_rewards import TextScore, architecture, build_towers
    from marval.vae import KL16
    arch, m = architecture(cfg.rl.reward_model), cfg.model
    with torch.device(device): vae = KL16(channels=m.vae_embed_dim).eval().requires_grad_(False)
    tower = build_towers(arch, device)
    visual = tower.visual.to(torch.bfloat16 if cfg.compute.precision == "bf16" else torch.float32)
    score, text = TextScore(arch, visual, 1.0, checkpoint=True), torch.randn(m.class_num, arch.config["embed_dim"], device=device)
    return (lambda z: to_images(vae.decode(z / cfg.data.latent_scale, checkpoint=True))), (lambda x, y: score.score(x, text[y])), (vae, score)


def build(args, cfg):
    "The stage, and the networks beside it."
    decode, reward, beside = images_and_reward(cfg, args.device) if args.images else ((lambda z: z), (lambda x, y: -x.square().flatten(1).mean(1)), ())
    torch.manual_seed(0)
    with torch.device(args.device): net = MAR(cfg.model)
    with torch.no_grad():
        for p in net.diffloss.parameters():
            if not p.any(): p.normal_(0, 0.02)
    return RLStage(cfg, net, reward, decode, device=args.device), beside


def predicted(cfg, images) -> dict:
    "What the plan says of a step: bytes beyond what is stored (gradients with them), and bytes in all; tokenizer and reward where they take part."
    if images:
        n = need(cfg, "rl", 1)
        there = sum(t.weights for t in _images(cfg))
        return {"predicted_bytes": n.gradients + n.activations + n.images - there, "predicted_total": n.bytes}
    meter = Meter(cfg.model, cfg.compute.precision, cfg.compute.recompute == "blocks")
    own = _rl(replace(cfg, data=replace(cfg.data, name="digits")), meter, cfg.rl.batch // cfg.compute.accumulate)[0]
    return {"predicted_bytes": 4 * meter.params + own, "predicted_total": 20 * meter.params + meter.asked + own}


def measure(args, cfg):
    "Cells for each way and K, on one stage."
    stage, beside = build(args, cfg)
    stage.step(0, step_generator(0, "rl", 0, args.device))                                    # allocates the optimiser's averages
    there = stored(stage.policy, stage.student, stage.frozen, stage.opt, *beside)
    for way in args.recompute:
        for K in args.K:
            own = override(cfg, [f"sampling.K={K}", f"rl.recompute={way}"])
            stage.cfg, stage.r = own, own.rl
            told = predicted(own, args.images)
            row = {"K": K, "recompute": way, "stored_bytes": there, **told}
            try:
                times = []
                row["peak_bytes"] = peak(args.device, lambda: times.append(clock(args.device, lambda: stage.step(K, step_generator(0, "rl", K, args.device)))))
                row |= {"total_bytes": there + row["peak_bytes"], **times[0]}
            except torch.cuda.OutOfMemoryError as e:
                stage.opt.zero_grad(set_to_none=True)
                row["skipped"] = str(e).splitlines()[0][:120]
            yield row


def arguments(argv=None):
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--size", default="base", choices=("smoke", "digits", "tiny", "base", "large", "huge"))
    p.add_argument("--K", nargs="+", type=int, default=(8, 16, 32, 64))
    p.add_argument("--batch", type=int, default=None, help="images a step (default: 8 on a GPU, 1 on a CPU)")
    p.add_argument("--recompute", nargs="+", choices=("steps", "none"), default=("steps", "none"))
    p.add_argument("--precision", choices=tuple(DTYPES), default=None, help="default: bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--images", action=argparse.BooleanOptionalAction, default=None, help="tokenizer and reward take part (default: on a GPU)")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    p.add_argument("--threads", type=int, default=None)
    p.add_argument("--predict", action="store_true", help="only the large roll-out, on paper")
    p.add_argument("--out", type=Path, default=None, help="default: bench/results/rl_DEVICE.json")
    args = p.parse_args(argv)
    gpu = on_gpu(p, args, "rl")
    args.batch, args.precision, args.images = args.batch or (8 if gpu else 1), args.precision or ("bf16" if gpu else "fp32"), gpu if args.images is None else args.images
    return args


def large() -> dict:
    "The plan's word on the roll-out that should fit into 80 GB."
    n = need(override(preset("huge"), LARGE), "rl", 1)
    return {"settings": LARGE, "bytes": n.bytes, "fits_80_GB": n.bytes < 80e9, "parts": {k: getattr(n, k) for k in ("weights", "gradients", "optimiser", "averages", "activations", "images")}}


def main(argv=None):
    args = arguments(argv)
    facts = run_provenance() | {"threads": torch.get_num_threads()}
    cfg = override(preset(args.size), [f"rl.batch={args.batch}", f"compute.precision={args.precision}", "compute.accumulate=1", f"sampling.K={args.K[0]}", f"rl.recompute={args.recompute[0]}", *args.set])
    key = " ".join([args.size, *(s.removeprefix("model.") for s in args.set), f"batch={args.batch}", args.precision, *(["images"] if args.images else [])])
    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    cells, big = old.get("cells", {}), old.get("large")
    rows = cells.get(key, {}).get("runs", [])                                                     # those of other K are kept
    if args.predict or args.size == "huge":
        big = large()
        print(f"huge, K 64, 8 images, tokenizer and ViT-H-14: {big['bytes'] / 1e9:.1f} GB predicted, {'fits' if big['fits_80_GB'] else 'does not fit'} into 80 GB", flush=True)
    if args.predict:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        return write_json(args.out, {"provenance": facts, "large": big, "cells": cells})
    right = known_answer(args.device)
    print(f"{facts['device']}; {key}; the instrument shows {right:.4f} of a known peak", flush=True)
    for row in measure(args, cfg):
        rows = sorted([r for r in rows if (r["K"], r["recompute"]) != (row["K"], row["recompute"])] + [row | facts], key=lambda r: (r["recompute"] != "steps", r["K"]))
        cells[key] = {"size": args.size, "batch": args.batch, "precision": args.precision, "images": args.images, "settings": args.set, "instrument": right, "goal": GOAL, "runs": rows}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, {"provenance": facts, "large": big, "cells": cells})
        seen = row.get("skipped") or f"{row['peak_bytes'] / 1e6:9.1f} MB above the {row['stored_bytes'] / 1e6:.1f} stored"
        print(f"recompute {row['recompute']:5} K {row['K']:3}  {seen}; predicted {row['predicted_bytes'] / 1e6:.1f} MB", flush=True)
    for way in ("steps", "none"):
        by = {r["K"]: r for r in rows if r["recompute"] == way and "peak_bytes" in r}
        if len(by) > 1: print(f"recompute {way}: K {max(by)} over K {min(by)}: {by[max(by)]['total_bytes'] / by[min(by)]['total_bytes']:.2f} in all, {by[max(by)]['peak_bytes'] / by[min(by)]['peak_bytes']:.2f} of what the step adds (goal: {GOAL})")
    print(args.out)


if __name__ == "__main__": main()
