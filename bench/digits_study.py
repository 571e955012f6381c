"""The digits experiments behind nbs/20_digits.ipynb: every figure there that one run cannot give.

For each seed: the teacher at four guidance scales and with shorter chains, students at four guidance scales, the paper's L1 + L2 beside the SIM term alone and SiD's alpha, guidance at all noise
levels beside guidance below `t_guide`, RL with and without the regulariser and with a text reward. All settings are the digits preset's but for what a name says. Every training is a run folder of the pipeline, so that the
study can be stopped and started again; `results.json` of a seed grows as figures come in, each with the commit that it was made with.

    python bench/digits_study.py --seed 0 --out runs/study --chains --try # everything for one seed, about an hour on one core; seeds can run side by side
    python bench/digits_study.py --seed 1 --out runs/study --jobs 2 # the two students of the main table alone
    python bench/digits_study.py --seed 0 --out /tmp/try --set teacher.iterations=20 --set distill.iterations=20 --set evaluate.n=200   # a trial
    python bench/digits_study.py --merge --out runs/study           # -> bench/results/digits_study.json
    python bench/digits_study.py --timing --out runs/study          # seconds per image, on an otherwise idle machine
"""
import argparse
import json
import shutil
import statistics
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from marval.config import override, preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import frechet, measure, run_provenance, seconds_per_image
from marval.files import write_json
from marval.mar import load_weights
from marval.pipeline import run
from marval.outcome import Plain, draw_images
from marval.rewards import load_judges, make_reward
from marval.sampling import OneStep, TeacherChain

CHAINS = (5, 10, 25, 50, 100)
JOBS = [(1.2, "sid"), (2.0, "sid"), (1.2, "gsim"), (1.2, "sim"), (2.0, "gsim"), (2.0, "sim"), (1.0, "sid"), (4.0, "sid")]      # cfg, loss
TRIES = (1000, 300, 600, 150)   # t_guide at cfg 2; 1000 = guided at all noise levels, the paper
RL = {"anchored": (), "free": ("rl.anchor=0",), "clip": ("rl.reward=clip", "rl.anchor=1000")}    # classifier reward; the same without the regulariser; a text reward, whose units are larger, regularised accordingly
RESULTS = Path(__file__).parent/"results"/"digits_study.json"


def student_settings(cfg: float, loss: str) -> list[str]:
    "One recipe, the preset's, for every guidance scale and every loss."
    return [f"sampling.cfg={cfg}", f"distill.loss={loss}"]


class Study:
    "One seed's folder of runs, and its results so far."
    def __init__(self, seed: int, out: Path, settings: list[str]):
        self.seed, self.out, self.settings = seed, out/f"seed{seed}", settings
        self.path = self.out/"results.json"
        self.results = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.images, self.labels = load_digits_data()

    def config(self, *extra: str):
        "The digits preset, trained longer, with the study's settings and some more."
        return override(preset("digits", self.seed), [*self.settings, *extra])

    def train(self, name: str, stages: tuple, inputs: dict, *extra: str) -> Path:
        "A run folder with these stages done, starting from products of other folders. Returns the folder."
        folder = self.out/name
        folder.mkdir(parents=True, exist_ok=True)
        for product, source in inputs.items():
            if not (folder/product).exists(): (shutil.copytree if source.is_dir() else shutil.copy)(source, folder/product)
        run(self.config(*extra), stages, folder)
        return folder

    def note(self, key: str, weights: Path, draw, cfg: float = 1.0):
        "Measure a model, unless that was done. A one-step model is also held against the images that the teacher's chain drew at `cfg`: `fd_teacher`."
        if key in self.results: return
        c, kept = self.config(f"sampling.cfg={cfg}"), self.out/f"teacher-cfg{cfg:g}.safetensors"
        labels, judges = torch.arange(c.evaluate.n) % c.model.class_num, load_judges(self.out/"base"/"judges")
        images = draw_images(c, load_weights(weights), draw, labels)
        result = measure(images, labels, judges, self.images, self.labels)
        if key == f"teacher cfg {cfg:g}": save_file({"images": images}, kept)
        elif kept.exists(): result["fd_teacher"] = frechet(images, load_file(kept)["images"], judges.heldout_net)
        self.results[key] = result | {"commit": run_provenance()["commit"]}
        write_json(self.path, self.results)
        print(f"seed {self.seed}  {key:32s} " + "  ".join(f"{k} {v:.3f}" for k, v in self.results[key].items() if isinstance(v, float)), flush=True)

    def clip_scores(self, models: dict[str, Path], draw):
        "Mean CLIP score of one-step models, the text reward's own yardstick."
        if "clip scores" in self.results: return
        c, labels = self.config("rl.reward=clip"), torch.arange(self.config().evaluate.n) % 10
        score = make_reward("clip", load_judges(self.out/"base"/"judges"), c)
        with torch.no_grad(): self.results["clip scores"] = {name: score(draw_images(c, load_weights(path), draw, labels), labels).mean().item() for name, path in models.items()}
        write_json(self.path, self.results)

    def curve(self, key: str, folder: Path):
        "The Frechet distances that a stage logged as it went."
        from marval.journal import read_log
        self.results[key] = [[row["step"], row["fd"]] for row in read_log(folder) if "fd" in row]
        write_json(self.path, self.results)


def study(seed: int, out: Path, settings: list[str], jobs: list[tuple[float, str]], chains: bool, tries: tuple[int, ...]):
    "All figures of one seed for the given (cfg, loss), in their order."
    s, sched = Study(seed, out, settings), Schedule.cosine()
    chain, one = (lambda n=100: TeacherChain(sched, n, clip=preset("digits").sampling.clip)), OneStep(sched, preset("digits").sampling.entry_abar)
    base = s.train("base", ("teacher", "judges"), {})
    teacher, judges = base/"teacher.safetensors", base/"judges"
    s.note("one_step_init", teacher, one)
    students = {}
    for cfg, loss in jobs:
        s.note(f"teacher cfg {cfg:g}", teacher, chain(), cfg)
        folder = s.train(f"{loss}-cfg{cfg:g}", ("distill",), {"teacher.safetensors": teacher, "judges": judges}, *student_settings(cfg, loss))
        students[loss, cfg] = folder/"student.safetensors"
        s.note(f"{loss} cfg {cfg:g}", students[loss, cfg], one, cfg)
        s.curve(f"curve {loss} cfg {cfg:g}", folder/"state"/"distill")
        if (cfg, loss) != (1.2, "sid"): continue
        policies = {"sid cfg 1.2": students["sid", 1.2]}
        for name, setting in RL.items():
            policy = s.train(f"rl-{name}", ("rl",), {"student.safetensors": students["sid", 1.2], "judges": judges}, *setting)
            policies[f"rl {name}"] = policy/"student_rl.safetensors"
            s.note(f"rl {name}", policies[f"rl {name}"], one, cfg)
        s.clip_scores(policies, one)
    for t in tries:
        folder = s.train(f"t_guide-{t}", ("distill",), {"teacher.safetensors": teacher, "judges": judges}, *student_settings(2.0, "sid"), f"distill.t_guide={t}")
        s.note(f"sid cfg 2 t_guide {t}", folder/"student.safetensors", one, 2.0)
    for n in CHAINS[:-1] if chains else (): s.note(f"teacher cfg 1.2 chain {n}", teacher, chain(n), 1.2)


def timing(out: Path, rounds: int = 7):
    "Seconds per image of the teacher's chains and of one step, equal K, one thread, the plain loop. Medians over rounds, each of which times all of them, so that a machine that changes its speed changes it for all."
    c, sched, weights = preset("digits"), Schedule.cosine(), load_weights(out/"seed0"/"base"/"teacher.safetensors")
    draws = {**{f"chain {n}": TeacherChain(sched, n, clip=c.sampling.clip) for n in CHAINS}, "one step": OneStep(sched, c.sampling.entry_abar)}
    plain, taken = {name: Plain(c, weights, draw) for name, draw in draws.items()}, {name: {"1": [], "64": []} for name in draws}
    for i in range(rounds):
        for name, draw in draws.items():
            seconds = seconds_per_image(lambda n: draw_images(c, weights, draw, torch.arange(n) % 10, sampler=plain[name]), (1, 64), 1 if draw.rounds > 30 else 5)
            for batch, value in seconds.items(): taken[name][batch].append(value)
        print(f"round {i + 1} of {rounds}: " + ", ".join(f"batch {b} {taken['chain 100'][b][-1] / taken['one step'][b][-1]:.1f}x" for b in ("1", "64")), flush=True)
    provenance = run_provenance() | {"threads": torch.get_num_threads(), "K": c.sampling.K, "cfg": c.sampling.cfg, "dtype": "float32", "rounds": rounds}
    ratios = {b: [x / y for x, y in zip(taken["chain 100"][b], taken["one step"][b])] for b in ("1", "64")}
    medians = {name: {b: statistics.median(v) for b, v in by.items()} for name, by in taken.items()}
    write_json(out/"timing.json", {"provenance": provenance, **medians, "speedup by round": ratios})


def merge(out: Path):
    "All seeds and the timing in one file."
    seeds = {p.parent.name.removeprefix("seed"): json.loads(p.read_text()) for p in sorted(out.glob("seed*/results.json"))}
    RESULTS.parent.mkdir(exist_ok=True)
    write_json(RESULTS, {"provenance": run_provenance(), "n": preset("digits").evaluate.n, "t_guide": preset("digits").distill.t_guide, "seeds": seeds, "timing": json.loads((out/"timing.json").read_text())})
    print(RESULTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="field=value")
    parser.add_argument("--jobs", type=int, default=len(JOBS), metavar="N", help="only the first N of the (cfg, loss) pairs")
    parser.add_argument("--chains", action="store_true", help="also the teacher with shorter chains")
    parser.add_argument("--try", dest="tries", action="store_true", help="also other values of t_guide at cfg 2")
    parser.add_argument("--timing", action="store_true")
    parser.add_argument("--merge", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.merge: merge(args.out)
    elif args.timing: timing(args.out)
    else: study(args.seed, args.out, args.set, JOBS[:args.jobs], args.chains, TRIES if args.tries else ())
