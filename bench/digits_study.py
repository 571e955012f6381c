"""The digits experiments behind nbs/20_digits.ipynb: every figure there that one run cannot give.

For each seed: the teacher at four guidance scales and with shorter chains, students at four guidance
scales, the paper's L1 + L2 beside the SIM term alone and SiD's alpha, guidance at all noise levels beside
guidance below `t_guide`, RL with and without the regulariser and with a text reward. All settings are the
digits preset's but for what a name says. Every training is a run folder of the pipeline, so that the
study can be stopped and started again; `results.json` of a seed grows as figures come in, each with the
commit that it was made with.

examples:
    python bench/digits_study.py --seed 0 --out runs/study --chains --try   # all of one seed, an hour
    python bench/digits_study.py --seed 1 --out runs/study --jobs 2   # the students of the main table alone
    python bench/digits_study.py --out /tmp/try --set teacher.iterations=20 --set evaluate.n=200   # a trial
    python bench/digits_study.py --merge --out runs/study       # -> bench/results/digits_study.json
    python bench/digits_study.py --timing --out runs/study      # seconds per image, on a quiet machine
"""
import statistics
import sys
from pathlib import Path

import torch
from common import (RESULTS, BadInput, adapted, bring, commit, entry_point, facts, keep, out_file, out_folder,
                    parser, read_json, stages, stored, whole)
from safetensors.torch import load_file, save_file

from marval.config import preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import frechet, measure, seconds_per_image
from marval.files import atomic_write
from marval.journal import read_log
from marval.mar import load_weights
from marval.outcome import Plain, draw_images
from marval.rewards import load_judges, make_reward
from marval.sampling import OneStep, TeacherChain

CHAINS = (5, 10, 25, 50, 100)
JOBS = [(1.2, "sid"), (2.0, "sid"), (1.2, "gsim"), (1.2, "sim"), (2.0, "gsim"), (2.0, "sim"), (1.0, "sid"),
        (4.0, "sid")]           # cfg, loss
TRIES = (1000, 300, 600, 150)   # t_guide at cfg 2; 1000 = guided at all noise levels, the paper
RL = {                          # classifier reward, with the regulariser and without
    "anchored": {}, "free": {"rl.anchor": 0.},
    "clip": {"rl.reward": "clip", "rl.anchor": 1000.}}  # a text reward, in larger units


def recipe(cfg: float, loss: str) -> dict:
    "The preset's, for every guidance scale and every loss."
    return {"sampling.cfg": cfg, "distill.loss": loss}


class Study:
    "One seed's folder of runs, and its results so far."
    def __init__(self, seed: int, out: Path, settings: list[str]):
        self.seed, self.out, self.settings = seed, out_folder(out/f"seed{seed}"), settings
        self.path = self.out/"results.json"
        self.results = stored(self.path)
        self.images, self.labels = load_digits_data()
        self.config({})                                 # bad settings are refused before anything is trained

    def config(self, extra: dict):
        "The digits preset with some changes, and with the study's settings."
        return adapted(adapted(preset("digits", self.seed), {}, self.settings), extra)

    def train(self, name: str, names: tuple, inputs: dict, extra: dict = {}) -> Path:
        "A run folder with these stages done, starting from products of other folders. Returns the folder."
        here = out_folder(self.out/name)
        for product, source in inputs.items(): bring(source, here, product)
        stages(self.config(extra), names, here)
        return here

    def note(self, key: str, weights: Path, draw, cfg: float = 1.0):
        """Measure a model, unless that was done. A one-step model is also held against the images that the
        teacher's chain drew at `cfg`: `fd_teacher`."""
        if key in self.results: return
        c, kept = self.config({"sampling.cfg": cfg}), self.out/f"teacher-cfg{cfg:g}.safetensors"
        labels, judges = torch.arange(c.evaluate.n) % c.model.class_num, load_judges(self.out/"base"/"judges")
        images = draw_images(c, load_weights(weights), draw, labels)
        result = measure(images, labels, judges, self.images, self.labels)
        if key == f"teacher cfg {cfg:g}": atomic_write(kept, lambda tmp: save_file({"images": images}, tmp))
        elif kept.exists():
            result["fd_teacher"] = frechet(images, load_file(kept)["images"], judges.heldout_net)
        self.results[key] = result | {"commit": commit()}
        keep(self.path, self.results)
        told = "  ".join(f"{k} {v:.3f}" for k, v in result.items() if isinstance(v, float))
        print(f"seed {self.seed}  {key:32s} {told}", flush=True)

    def clip_scores(self, models: dict[str, Path], draw):
        "Mean CLIP score of one-step models, the text reward's own yardstick."
        if "clip scores" in self.results: return
        c, judges = self.config({"rl.reward": "clip"}), load_judges(self.out/"base"/"judges")
        labels, score = torch.arange(c.evaluate.n) % 10, make_reward("clip", judges, c)
        def mean(path):
            images = draw_images(c, load_weights(path), draw, labels)
            with torch.no_grad(): return score(images, labels).mean().item()
        self.results["clip scores"] = {name: mean(path) for name, path in models.items()}
        keep(self.path, self.results)

    def curve(self, key: str, folder: Path):
        "The Frechet distances that a stage logged as it went."
        self.results[key] = [[row["step"], row["fd"]] for row in read_log(folder) if "fd" in row]
        keep(self.path, self.results)

    def student(self, name: str, extra: dict) -> Path:
        "The weights of a student distilled from the seed's teacher."
        base = self.out/"base"
        here = self.train(name, ("distill",), {"teacher.safetensors": base, "judges": base}, extra)
        return here/"student.safetensors"


def chain(n=100): return TeacherChain(Schedule.cosine(), n, clip=preset("digits").sampling.clip)


def one_step(): return OneStep(Schedule.cosine(), preset("digits").sampling.entry_abar)


def refined(s: Study, student: Path, cfg: float):
    "RL in its three ways, and CLIP's scores before and after."
    policies = {"sid cfg 1.2": student}
    for name, extra in RL.items():
        inputs = {"student.safetensors": student.parent, "judges": s.out/"base"}
        policies[f"rl {name}"] = s.train(f"rl-{name}", ("rl",), inputs, extra)/"student_rl.safetensors"
        s.note(f"rl {name}", policies[f"rl {name}"], one_step(), cfg)
    s.clip_scores(policies, one_step())


def study(args):
    "All figures of one seed for the first (cfg, loss), in their order."
    s = Study(args.seed, args.out, args.set)
    teacher = s.train("base", ("teacher", "judges"), {})/"teacher.safetensors"
    s.note("one_step_init", teacher, one_step())
    for cfg, loss in JOBS[:args.jobs]:
        s.note(f"teacher cfg {cfg:g}", teacher, chain(), cfg)
        student = s.student(f"{loss}-cfg{cfg:g}", recipe(cfg, loss))
        s.note(f"{loss} cfg {cfg:g}", student, one_step(), cfg)
        s.curve(f"curve {loss} cfg {cfg:g}", student.parent/"state"/"distill")
        if (cfg, loss) == (1.2, "sid"): refined(s, student, cfg)
    for t in TRIES if args.tries else ():
        student = s.student(f"t_guide-{t}", recipe(2.0, "sid") | {"distill.t_guide": t})
        s.note(f"sid cfg 2 t_guide {t}", student, one_step(), 2.0)
    for n in CHAINS[:-1] if args.chains else ():
        s.note(f"teacher cfg 1.2 chain {n}", teacher, chain(n), 1.2)


def timing(out: Path, rounds: int = 7):
    """Seconds per image of the teacher's chains and of one step, equal K, one thread, the plain loop.
    Medians over rounds, each of which times all of them: a machine that changes its speed does so for all."""
    c, weights = preset("digits"), load_weights(out/"seed0"/"base"/"teacher.safetensors")
    draws = {**{f"chain {n}": chain(n) for n in CHAINS}, "one step": one_step()}
    loops = {name: Plain(c, weights, d) for name, d in draws.items()}
    taken = {name: {"1": [], "64": []} for name in draws}
    for i in range(rounds):
        for name, draw in draws.items():
            def images(n): return draw_images(c, weights, draw, torch.arange(n) % 10, sampler=loops[name])
            seconds = seconds_per_image(images, (1, 64), 1 if draw.rounds > 30 else 5)
            for batch, value in seconds.items(): taken[name][batch].append(value)
        told = (f"batch {b} {taken['chain 100'][b][-1] / taken['one step'][b][-1]:.1f}x" for b in ("1", "64"))
        print(f"round {i + 1} of {rounds}: {', '.join(told)}", flush=True)
    about = facts() | {"K": c.sampling.K, "cfg": c.sampling.cfg, "dtype": "float32", "rounds": rounds}
    def ratio(b): return [x / y for x, y in zip(taken["chain 100"][b], taken["one step"][b])]
    ratios = {b: ratio(b) for b in ("1", "64")}
    medians = {name: {b: statistics.median(v) for b, v in by.items()} for name, by in taken.items()}
    keep(out/"timing.json", {"provenance": about, **medians, "speedup by round": ratios})


def merge(out: Path, results: Path):
    "All seeds and the timing in one file."
    found = {p.parent.name.removeprefix("seed"): read_json(p) for p in sorted(out.glob("seed*/results.json"))}
    if not found: raise BadInput(f"--out {out}: no seed*/results.json in it; expected a folder of this study")
    c = preset("digits")
    stored(results, seeds=dict, timing=dict)                            # nothing else is replaced
    keep(results, {"provenance": facts(), "n": c.evaluate.n, "t_guide": c.distill.t_guide, "seeds": found,
                   "timing": read_json(out/"timing.json")})
    print(results)


def arguments(argv):
    p = parser(__doc__)
    p.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs go")
    p.add_argument("--results", type=Path, default=RESULTS/"digits_study.json", metavar="FILE",
                   help="of --merge (default: bench/results/digits_study.json)")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    p.add_argument("--jobs", type=whole(1, len(JOBS)), default=len(JOBS), metavar="N",
                   help="only the first N of the (cfg, loss) pairs")
    p.add_argument("--chains", action="store_true", help="also the teacher with shorter chains")
    p.add_argument("--try", dest="tries", action="store_true", help="also other values of t_guide at cfg 2")
    p.add_argument("--timing", action="store_true", help="time the samplers instead")
    p.add_argument("--merge", action="store_true", help="put the results of all seeds together instead")
    return p.parse_args(argv)


@entry_point
def main(argv) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    out_folder(args.out)
    if args.merge: merge(args.out, out_file(args.results))
    elif args.timing: timing(args.out)
    else: study(args)
    return 0


if __name__ == "__main__": sys.exit(main())
