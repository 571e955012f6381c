"""Fewer autoregressive steps on digits: quality against K, reveal schedules compared, for the teacher's chain and the one-step student of a run folder. What nbs/23_fewer_steps reads.

Every cell is a list of counts (how many tokens each step reveals) and a sampling seed. All cells of a seed share orders and noise, token by token, so that their difference is the schedule's. Schedules that come to the same counts are
drawn once. `best` is the schedule with the least cost in theory (`sampling.best_counts`) for the Gaussian fitted to the real digits. The judges are the run folder's. A row is kept as soon as it is known; the same command goes on.

    python bench/reveal.py                                                              # all: student some 10 minutes of one core, teacher some 2 hours
    python bench/reveal.py --models student --K 8 --schedules cosine --seeds 12         # more seeds of one cell: how much FD scatters
    python bench/reveal.py --models teacher --chain-steps 25                            # the teacher at a quarter of the time
    python bench/reveal.py --timing                                                     # processor time of one image against K, instead
    python bench/reveal.py --run /tmp/smoke --out /tmp/try.json --n 60 --K 2 4 --seeds 1   # a trial, on a run of scale smoke
"""
import argparse
import fcntl
import os
import statistics
import sys
import time
from pathlib import Path

import torch

from marval.config import BadInput
from marval.data import load_digits_data, to_images
from marval.diffusion import Schedule
from marval.evaluate import accuracy, coverage, diversity, features, frechet, run_provenance
from marval.fast import FastSampler
from marval.files import read_json, sha256, write_json
from marval.mar import load_weights, patchify, read_meta, unpatchify
from marval.rewards import load_judges
from marval.sampling import OneStep, TeacherChain, best_counts, entropy_curve, random_orders, reveal_counts
from marval.train import step_seed

ROOT = Path(__file__).parent.parent
SCHEDULES = ("cosine", "linear", "square", "cubic", "arccos", "root", "best")


def digits_curve(m) -> torch.Tensor:
    "H(a) of the Gaussian with the real digits' covariance within a class. A pixel is known to one of 17 levels, which adds the variance of rounding, step^2 / 12."
    images, labels = load_digits_data()
    x = patchify(2 * images.double() - 1, m.patch_size)
    x = x.flatten(1) - torch.stack([x[labels == c].mean(0) for c in range(10)])[labels].flatten(1)
    cov = x.T @ x / (len(x) - 10) + (2 / 16) ** 2 / 12 * torch.eye(x.shape[1], dtype=x.dtype)
    return entropy_curve(cov, m.seq_len, random_orders(200, m.seq_len, torch.Generator().manual_seed(0)))


class Model:
    "Teacher or student of a run folder, with its way of drawing a token."
    def __init__(self, run: Path, name: str, chain: int | None):
        self.path = run/f"{name}.safetensors"
        self.net, meta, sched = load_weights(self.path), read_meta(self.path), Schedule.cosine()
        chain = (chain or int(meta["chain_steps"])) if name == "teacher" else 0
        self.draw = TeacherChain(sched, chain, float(meta["temperature"]), float(meta["clip"])) if chain else OneStep(sched, float(meta["entry_abar"]))
        self.cfg, self.cfg_schedule, self.about = float(meta["cfg"]), meta["cfg_schedule"], dict(sha256=sha256(self.path), chain_steps=chain, cfg=float(meta["cfg"]))

    def sampler(self, counts): return FastSampler(self.net, self.draw, len(counts), self.cfg, self.cfg_schedule, reveal=counts)

    def images(self, counts: list[int], n: int, seed: int, batch: int = 100):
        "n images, classes in turn, and the processor's seconds per image that drawing took. Orders and noise depend on seed and place alone."
        m, fast, labels, images, seconds = self.net.cfg, self.sampler(counts), torch.arange(n) % self.net.cfg.class_num, [], 0.
        for i, y in enumerate(labels.split(batch)):
            g = torch.Generator().manual_seed(step_seed(seed, "reveal", i))
            orders = random_orders(len(y), m.seq_len, g)
            z = torch.randn(self.draw.rounds, len(y), m.seq_len, m.token_dim, generator=g).split(counts, dim=2)
            start = time.process_time()
            tokens = fast.sample(y, orders, [part.flatten(1, 2) for part in z])
            seconds += time.process_time() - start
            images.append(to_images(unpatchify(tokens, m.patch_size)))
        return torch.cat(images), labels, seconds / n


def update(path: Path, change) -> None:
    "Read, change, write, so that several processes may add to one file."
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        found = read_json(path) if path.exists() else {}
        change(found)
        write_json(path, found)
    finally: os.close(folder)


def begin(args, models: dict, H, counts: dict) -> None:
    "The file's head. Raises `BadInput` where the file holds rows of other weights, judges or n."
    head = dict(n=args.n, judge=sha256(args.run/"judges"/"heldout.safetensors"), entropy_curve=H.tolist())
    def change(found):
        for k, v in head.items():
            if found.setdefault(k, v) != v: raise BadInput(f"{args.out} holds rows with another {k}; expected the same, or another --out")
        for name, model in models.items():
            if found.setdefault("models", {}).setdefault(name, model.about) != model.about: raise BadInput(f"{args.out} holds rows of another {name}; expected the same weights, or another --out")
        for schedule, by in counts.items(): found.setdefault("counts", {}).setdefault(schedule, {}).update({str(len(c)): c for c in by})
        found["provenance"] = run_provenance() | {"threads": torch.get_num_threads(), "dtype": "float32"}
        found.setdefault("rows", [])
    update(args.out, change)


def study(args, models: dict, counts: dict) -> None:
    "All cells that are not there yet, seed by seed."
    real, real_labels = load_digits_data()
    net, commit = load_judges(args.run/"judges").heldout_net, run_provenance()["commit"]
    real_features = features(net, real)
    cells = {tuple(c) for by in counts.values() for c in by}
    for seed in range(args.seeds):
        for name, model in models.items():
            for c in sorted(cells, key=lambda c: (len(c), c)):
                there = lambda found: any((r["model"], tuple(r["counts"]), r["seed"]) == (name, c, seed) for r in found["rows"])
                if there(read_json(args.out)): continue
                images, labels, seconds = model.images(list(c), args.n, seed)
                row = dict(model=name, counts=list(c), seed=seed, fd=frechet(images, real, net), diversity=diversity(images, labels, real, real_labels), accuracy=accuracy(images, labels, net),
                           coverage=coverage(features(net, images), real_features), seconds=seconds, commit=commit)
                update(args.out, lambda found: there(found) or found["rows"].append(row))
                print(f"{name:10} seed {seed}  {str(list(c)):50} FD {row['fd']:6.3f}  diversity {row['diversity']:.3f}  accuracy {row['accuracy']:.3f}  coverage {row['coverage']:.3f}  {1e3 * seconds:.2f} ms", flush=True)


def timing(args, models: dict, counts: dict, rounds: int = 7) -> None:
    "Median processor seconds of one image, MAR's counts, all in turn in every round. (Time per image of a batch stands in every row.)"
    runs, y = {(name, len(c)): model.sampler(c) for name, model in models.items() for c in counts["cosine"]}, torch.tensor([3])
    taken = {k: [] for k in runs}
    for i in range(rounds):
        for k, fast in runs.items():
            start = time.process_time()
            fast.sample(y, generator=torch.Generator().manual_seed(0))
            if i: taken[k].append(time.process_time() - start)                        # the first round warms up
    def change(found):
        for (name, K), s in taken.items(): found.setdefault("timing", {}).setdefault(name, {})[str(K)] = statistics.median(s)
    update(args.out, change)
    for (name, K), s in taken.items(): print(f"{name:10} K {K:2}  {1e3 * statistics.median(s):8.3f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=ROOT/"reference"/"digits", metavar="DIR", help="run folder with teacher, student and judges (default: reference/digits)")
    parser.add_argument("--out", type=Path, default=ROOT/"bench"/"results"/"reveal.json", metavar="FILE", help="(default: bench/results/reveal.json)")
    parser.add_argument("--models", nargs="+", choices=("student", "teacher"), default=["student", "teacher"])
    parser.add_argument("--K", nargs="+", type=int, default=[1, 2, 3, 4, 6, 8, 12, 16], help="autoregressive steps, at most the number of tokens")
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    parser.add_argument("--seeds", type=int, default=3, help="sampling seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--n", type=int, default=2000, help="images a cell (default: 2000)")
    parser.add_argument("--chain-steps", type=int, metavar="N", help="the teacher with a chain of N inner steps, kept beside as teacher-N (default: as saved)")
    parser.add_argument("--timing", action="store_true", help="time the samplers instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        models = {f"{name}-{args.chain_steps}" if name == "teacher" and args.chain_steps else name: Model(args.run, name, args.chain_steps) for name in args.models}
        m = next(iter(models.values())).net.cfg
        H = digits_curve(m)
        counts = {s: [best_counts(H, K) if s == "best" else reveal_counts(m.seq_len, K, s) for K in args.K] for s in (("cosine",) if args.timing else args.schedules)}
        begin(args, models, H, counts)
        (timing if args.timing else study)(args, models, counts)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__": sys.exit(main())
