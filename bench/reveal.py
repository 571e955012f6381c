"""Fewer autoregressive steps on digits: quality against K, reveal schedules compared, for the teacher's
chain and the one-step student of a run folder. What nbs/23_fewer_steps reads.

Every cell is a list of counts (how many tokens each step reveals) and a sampling seed. All cells of a
seed share orders and noise, token by token, so that their difference is the schedule's. Schedules that
come to the same counts are drawn once. `best` is the schedule with the least cost in theory
(`sampling.best_counts`) for the Gaussian fitted to the real digits. The judges are the run folder's. A
row is kept as soon as it is known; the same command goes on.

examples:
    python bench/reveal.py             # all: the student takes 10 minutes of one core, the teacher 2 hours
    python bench/reveal.py --models student --K 8 --schedules cosine --seeds 12   # how much FD scatters
    python bench/reveal.py --models teacher --chain-steps 25                # a quarter of the time
    python bench/reveal.py --timing    # processor time of one image against K, instead
    python bench/reveal.py --run /tmp/smoke --out /tmp/try.json --n 60 --K 2 4 --seeds 1   # a trial
"""
import fcntl
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from common import (RESULTS, ROOT, BadInput, commit, entry_point, facts, folder, keep, out_file, parser,
                    stored, whole)

from marval.data import load_digits_data, to_images
from marval.diffusion import Schedule
from marval.evaluate import accuracy, coverage, diversity, features, frechet
from marval.fast import FastSampler
from marval.files import sha256
from marval.mar import load_weights, patchify, read_meta, unpatchify
from marval.rewards import load_judges
from marval.sampling import OneStep, TeacherChain, best_counts, entropy_curve, random_orders, reveal_counts
from marval.train import step_seed

SCHEDULES = ("cosine", "linear", "square", "cubic", "arccos", "root", "best")


def digits_curve(m) -> torch.Tensor:
    """H(a) of the Gaussian with the real digits' covariance within a class. A pixel is known to one of 17
    levels, which adds the variance of rounding, step^2 / 12."""
    images, labels = load_digits_data()
    x = patchify(2 * images.double() - 1, m.patch_size)
    x = x.flatten(1) - torch.stack([x[labels == c].mean(0) for c in range(10)])[labels].flatten(1)
    cov = x.T @ x / (len(x) - 10) + (2 / 16) ** 2 / 12 * torch.eye(x.shape[1], dtype=x.dtype)
    return entropy_curve(cov, m.seq_len, random_orders(200, m.seq_len, torch.Generator().manual_seed(0)))


class Model:
    "Teacher or student of a run folder, with its way of drawing a token."
    def __init__(self, run: Path, name: str, chain: int | None):
        path = run/f"{name}.safetensors"
        self.net, meta, sched = load_weights(path), read_meta(path), Schedule.cosine()
        try:
            chain = (chain or int(meta["chain_steps"])) if name == "teacher" else 0
            temperature, clip, entry = (float(meta[k]) for k in ("temperature", "clip", "entry_abar"))
            self.cfg, self.cfg_schedule = float(meta["cfg"]), meta["cfg_schedule"]
        except (KeyError, ValueError) as e:
            raise BadInput(f"{path} does not say how to draw ({e}); expected a run's weights") from None
        self.draw = TeacherChain(sched, chain, temperature, clip) if chain else OneStep(sched, entry)
        self.about = dict(sha256=sha256(path), chain_steps=chain, cfg=self.cfg)

    def sampler(self, counts):
        return FastSampler(self.net, self.draw, len(counts), self.cfg, self.cfg_schedule, reveal=counts)

    def images(self, counts: list[int], n: int, seed: int, batch: int = 100):
        """n images, classes in turn, and the processor's seconds per image that drawing took. Orders and
        noise depend on seed and place alone."""
        m, fast, labels = self.net.cfg, self.sampler(counts), torch.arange(n) % self.net.cfg.class_num
        images, seconds = [], 0.
        for i, y in enumerate(labels.split(batch)):
            g = torch.Generator().manual_seed(step_seed(seed, "reveal", i))
            orders = random_orders(len(y), m.seq_len, g)
            z = torch.randn(self.draw.rounds, len(y), m.seq_len, m.token_dim, generator=g)
            noise = [part.flatten(1, 2) for part in z.split(counts, dim=2)]
            start = time.process_time()
            tokens = fast.sample(y, orders, noise)
            seconds += time.process_time() - start
            images.append(to_images(unpatchify(tokens, m.patch_size)))
        return torch.cat(images), labels, seconds / n


def read(path: Path) -> dict:
    "An earlier result, {} where there is none. `BadInput` where it is none of this script."
    found = stored(path, rows=list, counts=dict, models=dict)
    wanted = {"model", "counts", "seed"}
    if all(isinstance(r, dict) and wanted <= set(r) for r in found.get("rows", [])): return found
    raise BadInput(f"{path}: rows without {', '.join(sorted(wanted))}; expected results of this script")


def update(path: Path, change) -> None:
    "Read, change, write, so that several processes may add to one file."
    where = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(where, fcntl.LOCK_EX)
        found = read(path)
        change(found)
        keep(path, found)
    finally: os.close(where)


def begin(args, models: dict, H, counts: dict) -> None:
    "The file's head. Raises `BadInput` where the file holds rows of other weights, judges or n."
    judge = sha256(args.run/"judges"/"heldout.safetensors")
    head = dict(n=args.n, judge=judge, entropy_curve=H.tolist())
    def change(found):
        for k, v in head.items():
            if found.setdefault(k, v) != v: raise BadInput(f"{args.out} holds rows with another {k}; {OTHER}")
        for name, model in models.items():
            if found.setdefault("models", {}).setdefault(name, model.about) != model.about:
                raise BadInput(f"{args.out} holds rows of another {name}; {OTHER}")
        for schedule, by in counts.items():
            known = found.setdefault("counts", {}).setdefault(schedule, {})
            known.update({str(len(c)): c for c in by})
        found["provenance"] = facts() | {"dtype": "float32"}
        found.setdefault("rows", [])
    update(args.out, change)


OTHER = "expected the same, or another --out"


class Figures:
    "What is measured of the images of a cell."
    def __init__(self, run):
        self.net, (self.real, self.real_labels) = load_judges(run/"judges").heldout_net, load_digits_data()
        self.real_features = features(self.net, self.real)

    def __call__(self, images, labels) -> dict:
        return dict(fd=frechet(images, self.real, self.net),
                    diversity=diversity(images, labels, self.real, self.real_labels),
                    accuracy=accuracy(images, labels, self.net),
                    coverage=coverage(features(self.net, images), self.real_features))


def study(args, models: dict, counts: dict) -> None:
    "All cells that are not there yet, seed by seed."
    figures, here = Figures(args.run), commit()
    cells = sorted({tuple(c) for by in counts.values() for c in by}, key=lambda c: (len(c), c))
    for seed, name, c in ((s, n, c) for s in range(args.seeds) for n in models for c in cells):
        def there(found):
            return any((r["model"], tuple(r["counts"]), r["seed"]) == (name, c, seed) for r in found["rows"])
        if there(read(args.out)): continue
        images, labels, seconds = models[name].images(list(c), args.n, seed)
        row = dict(model=name, counts=list(c), seed=seed) | figures(images, labels)
        row |= dict(seconds=seconds, commit=here)
        update(args.out, lambda found: there(found) or found["rows"].append(row))
        told = "  ".join(f"{k} {row[k]:6.3f}" for k in ("fd", "diversity", "accuracy", "coverage"))
        print(f"{name:10} seed {seed}  {str(list(c)):50} {told}  {1e3 * seconds:.2f} ms", flush=True)


def timing(args, models: dict, counts: dict, rounds: int = 7) -> None:
    """Median processor seconds of one image, MAR's counts, all in turn in every round. (Time per image of a
    batch stands in every row.)"""
    runs = {(name, len(c)): model.sampler(c) for name, model in models.items() for c in counts["cosine"]}
    y, taken = torch.tensor([3]), {k: [] for k in runs}
    for i in range(rounds):
        for k, fast in runs.items():
            start = time.process_time()
            fast.sample(y, generator=torch.Generator().manual_seed(0))
            if i: taken[k].append(time.process_time() - start)                      # the first round warms up
    def change(found):
        for (name, K), s in taken.items():
            found.setdefault("timing", {}).setdefault(name, {})[str(K)] = statistics.median(s)
    update(args.out, change)
    for (name, K), s in taken.items(): print(f"{name:10} K {K:2}  {1e3 * statistics.median(s):8.3f} ms")


def arguments(argv):
    p = parser(__doc__)
    p.add_argument("--run", type=folder, default=ROOT/"reference"/"digits", metavar="DIR",
                   help="run folder with teacher, student and judges (default: reference/digits)")
    p.add_argument("--out", type=Path, default=RESULTS/"reveal.json", metavar="FILE",
                   help="(default: bench/results/reveal.json)")
    p.add_argument("--models", nargs="+", choices=("student", "teacher"), default=["student", "teacher"])
    p.add_argument("--K", nargs="+", type=whole(1, 256), default=[1, 2, 3, 4, 6, 8, 12, 16],
                   help="autoregressive steps, at most the number of tokens")
    p.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=SCHEDULES)
    p.add_argument("--seeds", type=whole(1, 10_000), default=3, help="sampling seeds 0 to N - 1 (default: 3)")
    p.add_argument("--n", type=whole(20), default=2000, help="images a cell (default: 2000)")
    p.add_argument("--chain-steps", type=whole(2, 1000), metavar="N",
                   help="the teacher with N inner steps, kept beside as teacher-N (default: as saved)")
    p.add_argument("--timing", action="store_true", help="time the samplers instead")
    return p.parse_args(argv)


@entry_point
def main(argv) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    read(out_file(args.out))
    def key(name): return f"{name}-{args.chain_steps}" if name == "teacher" and args.chain_steps else name
    models = {key(name): Model(args.run, name, args.chain_steps) for name in args.models}
    m = next(iter(models.values())).net.cfg
    H = digits_curve(m)
    def counts_of(s, K): return best_counts(H, K) if s == "best" else reveal_counts(m.seq_len, K, s)
    schedules = ("cosine",) if args.timing else args.schedules
    counts = {s: [counts_of(s, K) for K in args.K] for s in schedules}
    begin(args, models, H, counts)
    (timing if args.timing else study)(args, models, counts)
    return 0


if __name__ == "__main__": sys.exit(main())
