"""Grids of recipe x training seed on digits: one script for every comparison of losses, distances, lags
and times.

A study is a list of recipes, each a few changed settings, distilled with several training seeds. The
teacher of a training seed is trained once, and so are the judges; both lie in the runs folder, which git
ignores. Each student is drawn from with several sampling seeds, which all cells share, and measured:
Frechet distance to the data and to samples of the teacher's chain of 25 steps at the same guidance,
precision, recall, diversity, and more. The teacher's own samples are measured beside it. A figure is
marked as within noise where it differs from the teacher's by less than two standard errors over sampling
seeds; --table compares recipes over training seeds.

A cell's result is one file, written when it ends. What is stored with the same settings is skipped, so
that the command can be stopped and started again, or started twice. Each process uses one thread.

examples:
    python bench/grid.py --list --study losses
    nohup nice python bench/grid.py --study losses --processes 2 > grid.log 2>&1 &
    python bench/grid.py --study losses --table
    python bench/grid.py --study weight --scale smoke --seeds 0 --runs /tmp/runs --out /tmp/grid   # a trial
"""
import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from common import (RESULTS, ROOT, BadInput, adapted, bring, entry_point, facts, keep, one_line, out_folder,
                    parser, read_json, stages, whole)
from safetensors.torch import load_file, save_file

from marval.config import Config, preset, validated
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import frechet, measure
from marval.files import atomic_write, sha256
from marval.journal import read_log
from marval.mar import load_weights
from marval.outcome import draw_images
from marval.pipeline import settings
from marval.rewards import load_judges
from marval.sampling import OneStep, TeacherChain

KIND, VERSION = "marval-grid", 1
CHAIN = 25                                    # inner steps of the teacher's samples
FIRST_SAMPLING, REFERENCE = 10**6, 2 * 10**6  # seeds of orders and noise, apart from those of training
TABLE = ("fd", "fd_teacher", "precision", "recall", "diversity")


# ---- the studies

def kappa(k: float, **more) -> dict:
    "The recipe of L1 + kappa L2: by its name where it has one, else as the configuration writes it."
    loss = {0.: {"distill.loss": "sim"}, 1.: {"distill.loss": "gsim"}}.get(k)
    return (loss or {"distill.loss": "sid", "distill.alpha": round(1 - k / 2, 12)}) | more


def readings(config: Config) -> dict:
    """kappa of L1 + kappa L2, and SiD's alpha: SiD adds (1 - alpha) d'(y).y to L1. That is 2 (1 - alpha) d(y)
    for the square, and tends to (1 - alpha) d(y) for Pseudo-Huber."""
    d = config.distill
    k = {"sim": 0., "gsim": 1.}.get(d.loss, 2 * (1 - d.alpha))
    alphas = {"huber": round(1 - k, 12), "squared": round(1 - k / 2, 12)}
    return {"kappa": round(k, 12), "alpha": alphas[d.distance], "distance": d.distance,
            "alpha_huber": alphas["huber"], "alpha_squared": alphas["squared"]}


def losses():
    """kappa from the paper's 1 to far below 0, with the preset's -0.8. alpha = .5, 1, 1.2 and 1.8 are among
    them, read as the configuration's and as SiD's under Pseudo-Huber."""
    for guidance in (1.2, 2.):
        for t in (450, 1000):
            for k in (1., 0.5, 0., -0.2, -0.4, -0.8, -1.6):
                yield kappa(k, **{"sampling.cfg": guidance, "distill.t_guide": t})


def distances():
    "Equal kappa, and -1.6 of the square, which is SiD's alpha of the preset."
    for distance in ("huber", "squared"):
        for k in (1., 0., -0.8) + (-1.6,) * (distance == "squared"):
            yield kappa(k, **{"distill.distance": distance})


def lags():
    for n in (1, 2, 5):
        for k in (-0.8, 1.): yield kappa(k, **{"distill.phi_updates": n})


def times():
    yield {}
    for abar in (0.02, 0.05, 0.4): yield {"sampling.entry_abar": abar}
    for least, most in ((0, 1000), (20, 1000), (20, 500), (200, 700)):
        yield {"distill.t_min": least, "distill.t_max": most}


def weights():
    for unit in ("eps", "score", "x0"): yield {"distill.weight": unit}


def paper():
    "The paper's own recipe, and the preset's, both with RL."
    yield {}
    yield kappa(1., **{"distill.distance": "huber", "distill.r": 1e-5, "distill.t_guide": 1000,
                       "rl.anchor": 0., "sampling.cfg": 1.2})


STUDIES = {"losses": losses, "distance": distances, "lag": lags, "times": times, "weight": weights,
           "paper": paper}
WITH_RL = {"paper"}


# ---- cells

@dataclass(frozen=True)
class Cell:
    "One recipe, one training seed."
    scale: str
    seed: int
    recipe: dict = field(hash=False)
    rl: bool          # is the student refined as well?
    samplings: int    # sampling seeds

    @property
    def config(self) -> Config:
        "Only what comes after the teacher differs from the preset."
        wrong = [k for k in self.recipe if k.split(".")[0] not in ("distill", "sampling", "rl")]
        if wrong: raise BadInput(f"recipe with {wrong[0]}: expected fields of distill, sampling and rl")
        return validated(adapted(preset(self.scale, self.seed), self.recipe))

    @property
    def recipe_name(self) -> str:
        "What differs from the preset; cells of several studies that are the same have one name."
        own, base = self.config, preset(self.scale, self.seed)
        def value(c, name): return getattr(getattr(c, name.split(".")[0]), name.split(".")[1])
        differs = [k for k in sorted(self.recipe) if value(own, k) != value(base, k)]
        told = [f"{k.split('.')[1]}={value(own, k)}" for k in differs]
        return ",".join(told + ["rl"] * self.rl) or "preset"

    @property
    def name(self) -> str: return f"{self.recipe_name},seed={self.seed}"

    @property
    def digest(self) -> str:
        "Of all settings that decide the result."
        return digest(dict(config=self.config.dict(), rl=self.rl, samplings=self.samplings, chain=CHAIN,
                           version=VERSION))


def digest(settings: dict) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def cells(args) -> list[Cell]:
    "Of a study, all recipes of a training seed before the next seed; none twice."
    recipes, rl = list(STUDIES[args.study]()), args.study in WITH_RL
    every = [Cell(args.scale, seed, r, rl, args.samplings) for seed in args.seeds for r in recipes]
    return list({c.name: c for c in every}.values())


def stored(path: Path, cell: Cell) -> dict:
    "The cell's result; nothing where there is none with these settings."
    try: found = read_json(path) if path.exists() else {}
    except BadInput: return {}
    return found if found.get("kind") == KIND and found.get("digest") == cell.digest else {}


def summary(values: list[float]) -> dict:
    "Values of the sampling seeds, their mean and standard deviation."
    return {"values": values, "mean": statistics.mean(values), "sd": statistics.stdev(values)}


def within_noise(a: dict, b: dict) -> bool:
    "Is the difference of two means less than twice its standard error?"
    n, m = len(a["values"]), len(b["values"])
    return abs(a["mean"] - b["mean"]) <= 2 * math.sqrt(a["sd"]**2 / n + b["sd"]**2 / m)


# ---- work

@contextlib.contextmanager
def lock(path: Path, wait: bool):
    "Whether a lock was had, which ends with the process."
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as f:
        try: fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError: yield False
        else: yield True


class Grid:
    "The folders, and what is done in them. Those of teachers and judges are named after their settings."
    def __init__(self, scale: str, runs: Path, out: Path):
        self.scale, self.runs, self.out = scale, runs/scale, out
        self.judges = self.runs/f"judges-{self._settings(0, 'judges')}"

    def _settings(self, seed, stage): return digest(settings(preset(self.scale, seed), stage, self.runs))[:8]

    def path(self, cell): return self.out/f"{cell.name}.json"

    def teacher(self, seed): return self.runs/f"teacher-{seed}-{self._settings(seed, 'teacher')}"

    def student(self, cell): return self.runs/f"{cell.name}-{cell.digest[:8]}"

    def lock(self, name, wait=False): return lock(self.runs/"locks"/f"{name}.lock", wait)

    def ready(self, seed) -> bool: return (self.teacher(seed)/"state"/"teacher"/"done.json").exists()

    def train(self, seed):
        "The teacher of a seed. Skipped, or resumed, by the pipeline itself."
        stages(preset(self.scale, seed), ("teacher",), self.teacher(seed))

    def judged(self):
        "The judges: the same for all seeds."
        with self.lock("judges", wait=True): stages(preset(self.scale), ("judges",), self.judges)
        return load_judges(self.judges/"judges")

    def figures(self, config, net, draw, judges, reference=None) -> tuple[dict, torch.Tensor]:
        "All measures of one set of images, with the distance to `reference`, and the images."
        labels = torch.arange(config.evaluate.n) % config.model.class_num
        images = draw_images(config, net, draw, labels)
        found = {} if reference is None else {"fd_teacher": frechet(images, reference, judges.heldout_net)}
        return found | measure(images, labels, judges, *load_digits_data()), images

    def repeated(self, cell, net, draw, judges, reference) -> dict:
        "Measures over sampling seeds."
        sets = [self.figures(replace(cell.config, seed=FIRST_SAMPLING + s), net, draw, judges, reference)[0]
                for s in range(cell.samplings)]
        return {k: summary([float(s[k]) for s in sets]) for k in sets[0]}

    def chain(self, cell, judges):
        "The teacher's samples at the cell's guidance, once: figures, and a set to compare students with."
        c, s = cell.config, cell.config.sampling
        about = {k: getattr(s, k) for k in ("K", "reveal", "cfg", "cfg_schedule", "temperature", "clip")}
        about |= dict(n=c.evaluate.n, samplings=cell.samplings, chain=CHAIN, version=VERSION,
                      judges=self.judges.name)
        name = f"chain-{digest(about)}"
        base = self.teacher(cell.seed)/name
        with self.lock(f"{cell.seed}-{name}", wait=True):
            if not base.with_suffix(".json").exists(): self._draw_chain(cell, judges, base, about)
        images = load_file(base.with_suffix(".safetensors"))["images"]
        return read_json(base.with_suffix(".json"))["figures"], images

    def _draw_chain(self, cell, judges, base, about):
        s, net = cell.config.sampling, load_weights(self.teacher(cell.seed)/"teacher.safetensors")
        draw = TeacherChain(Schedule.cosine(), CHAIN, s.temperature, s.clip)
        _, images = self.figures(replace(cell.config, seed=REFERENCE), net, draw, judges)
        atomic_write(base.with_suffix(".safetensors"), lambda tmp: save_file({"images": images}, tmp))
        found = self.repeated(cell, net, draw, judges, images)
        keep(base.with_suffix(".json"), about | {"figures": found})

    def perform(self, cell) -> dict:
        "Distil, refine where asked, measure."
        here, config, judges = self.student(cell), cell.config, self.judged()
        bring(self.teacher(cell.seed), here, "teacher.safetensors")
        bring(self.judges, here, "judges")
        start = time.process_time()
        stages(config, ("distill", "rl") if cell.rl else ("distill",), here)
        result = {"cpu_seconds": time.process_time() - start}
        rows = read_log(here/"state"/"distill")
        result["curve"] = [[row["step"], row["fd"]] for row in rows if "fd" in row]
        teacher, reference = self.chain(cell, judges)
        draw = OneStep(Schedule.cosine(), config.sampling.entry_abar)
        for prefix, product in [("", "student")] + [("rl_", "student_rl")] * cell.rl:
            net = load_weights(here/f"{product}.safetensors")
            found = self.repeated(cell, net, draw, judges, reference)
            result[f"{prefix}figures"] = found
            marks = {k: within_noise(v, teacher[k]) for k, v in found.items()}
            result[f"{prefix}within_noise_of_teacher"] = marks
        files = ("teacher.safetensors", "student.safetensors", "judges/heldout.safetensors")
        return result | {"teacher_figures": teacher, "sha256": {f: sha256(here/f) for f in files}}

    def record(self, cell) -> dict:
        "What a cell gave, or why it gave nothing; kept. What its stages print goes to a file."
        here = self.student(cell)
        about = {"kind": KIND, "digest": cell.digest, "scale": cell.scale, "recipe": cell.recipe,
                 "recipe_name": cell.recipe_name, "seed": cell.seed, "loss": readings(cell.config),
                 "samplings": cell.samplings, "n": cell.config.evaluate.n, "teacher_chain": CHAIN, **facts()}
        with quiet(here):
            try: result = {"state": "done"} | self.perform(cell)
            except Exception as e:
                traceback.print_exc()
                result = {"state": "failed", "reason": f"{type(e).__name__}: {one_line(e, 300)}"}
        keep(self.path(cell), about | result)
        shutil.rmtree(here/"state", ignore_errors=True)         # checkpoints go, students stay
        return about | result

    def attempt(self, cell) -> dict | None:
        "A cell that nobody works on, with its teacher. None where it, or its teacher, is in other hands."
        with self.lock(cell.name) as own:
            if not own or stored(self.path(cell), cell): return None
            if not self.ready(cell.seed):
                with self.lock(f"teacher-{cell.seed}") as free:
                    if not free: return None
                    print(f"teacher of seed {cell.seed}: begun", flush=True)
                    with quiet(self.teacher(cell.seed)): self.train(cell.seed)
            return self.record(cell)


@contextlib.contextmanager
def quiet(here: Path):
    "What is printed goes to log.txt in a folder."
    with open(out_folder(here)/"log.txt", "a", encoding="utf-8", errors="backslashreplace") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log): yield


def told(record) -> str:
    "A record in one line."
    if record["state"] != "done": return f"{record['state']}: {record['reason']}"
    def mark(k): return "~" if record["within_noise_of_teacher"][k] else " "
    found = record["figures"]
    shown = (f"{k} {found[k]['mean']:.3f}±{found[k]['sd']:.3f}{mark(k)}" for k in TABLE)
    return f"{'  '.join(shown)}  {record['cpu_seconds']:.0f} s"


def loop(args, parent: int | None = None) -> None:
    "Take what is left, cell by cell, until nothing is, or the process that started this one is gone."
    torch.set_num_threads(1)
    grid, every = Grid(args.scale, args.runs, args.out), cells(args)
    while parent in (None, os.getppid()):
        left = [c for c in every if not stored(grid.path(c), c)]
        if not left: return
        for cell in left:
            record = grid.attempt(cell)
            if record is None: continue
            print(f"[{len(every) - len(left) + 1}/{len(every)}] {cell.name}: {told(record)}", flush=True)
            break
        else: time.sleep(1)


# ---- tables

def differences(results: dict, name: str, base: str, key: str):
    "Of a recipe from another, over the training seeds that both have: mean, and whether it is within noise."
    both = [(results[name][s][key], results[base][s][key]) for s in results[name] if s in results[base]]
    if not both: return None
    d = [a["mean"] - b["mean"] for a, b in both]
    sampling = statistics.mean(a["sd"]**2 / len(a["values"]) + b["sd"]**2 / len(b["values"]) for a, b in both)
    spread = statistics.variance(d) if len(d) > 1 else 0.
    error = math.sqrt(max(spread, sampling) / len(d))
    return statistics.mean(d), abs(statistics.mean(d)) <= 2 * error


def table(args) -> None:
    "Every recipe over its training seeds; `~` where it is within noise of one, which is named."
    grid, results = Grid(args.scale, args.runs, args.out), {}
    for cell in cells(args):
        found = stored(grid.path(cell), cell)
        if found.get("state") != "done": continue
        results.setdefault(cell.recipe_name, {})[cell.seed] = found["figures"]
    if not results: raise BadInput(f"--out {args.out}: no results of this study; expected a run of it first")
    base = args.base or ("preset" if "preset" in results else next(iter(results)))
    if base not in results: raise BadInput(f"--base {one_line(base)}: expected one of {', '.join(results)}")
    width = max(map(len, results))
    print(f"{'recipe':{width}}  seeds  " + "".join(f"{k:>16}" for k in TABLE))
    for name, by in results.items():
        line = ""
        for k in TABLE:
            mean = statistics.mean(r[k]["mean"] for r in by.values())
            found = differences(results, name, base, k)
            line += f"{mean:15.3f}{'~' if name != base and found and found[1] else ' '}"
        print(f"{name:{width}}  {len(by):5}  {line}")
    print(f"~ within two standard errors of {base}, paired over training seeds")


def listed(args) -> None:
    grid = Grid(args.scale, args.runs, args.out)
    for cell in cells(args):
        k = readings(cell.config)
        state = stored(grid.path(cell), cell).get("state", "to do")
        print(f"{state:7} {cell.name}  kappa {k['kappa']:g}, alpha {k['alpha']:g}")


# ---- the command

def arguments(argv):
    p = parser(__doc__)
    p.add_argument("--study", required=True, choices=STUDIES)
    p.add_argument("--processes", type=whole(1, 256), default=1, help="each with one thread")
    p.add_argument("--scale", choices=("digits", "smoke"), default="digits", help="smoke: a trial")
    p.add_argument("--seeds", nargs="+", type=whole(0, 2**31), default=(0, 1, 2), help="of training")
    p.add_argument("--samplings", type=whole(2, 1000), default=3, help="sampling seeds of each cell")
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"grid", metavar="DIR",
                   help="where teachers and students go (default: runs/grid)")
    p.add_argument("--out", type=Path, default=None, metavar="DIR", help="(default: bench/results/grid)")
    p.add_argument("--redo-failed", action="store_true", help="try cells again that failed")
    p.add_argument("--list", action="store_true", help="the cells, and what is stored of them")
    p.add_argument("--table", action="store_true", help="the recipes compared, from what is stored")
    p.add_argument("--base", metavar="RECIPE",
                   help="of --table: what others are compared with (default: preset)")
    args = p.parse_args(argv)
    if args.scale == "smoke" and not args.out:
        raise BadInput("--scale smoke: expected --out, to replace no real result")
    args.out = Path(args.out or RESULTS/"grid")
    return args


def ended(signum, frame): raise KeyboardInterrupt


def worker(args, parent):
    try: loop(args, parent)
    except KeyboardInterrupt: sys.exit(130)


def start(args) -> None:
    "The processes, and their end; SIGTERM ends them as Ctrl-C does."
    before = signal.signal(signal.SIGTERM, ended)
    try: work(args)
    finally: signal.signal(signal.SIGTERM, before)


def work(args) -> None:
    "All cells, in this process or in several."
    if args.processes == 1: return loop(args)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    new = dict(target=worker, args=(args, os.getpid()), daemon=True)
    workers = [context.Process(**new) for _ in range(args.processes)]
    for w in workers: w.start()
    for w in workers: w.join()
    crashed = [w.exitcode for w in workers if w.exitcode]
    if crashed:
        raise BadInput(f"{len(crashed)} of {len(workers)} processes ended early (status {crashed[0]}); "
                       "the same command goes on")


@entry_point
def main(argv) -> int:
    args = arguments(argv)
    every = cells(args)
    for cell in every: cell.config                                    # recipes are checked before any work
    if args.list or args.table:
        (listed if args.list else table)(args)
        return 0
    out_folder(args.runs)
    out_folder(args.out)
    grid = Grid(args.scale, args.runs, args.out)
    if args.redo_failed:
        for cell in every:
            if stored(grid.path(cell), cell).get("state") == "failed": grid.path(cell).unlink()
    start(args)
    states = [stored(grid.path(c), c).get("state", "to do") for c in every]
    counted = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    print(f"{args.study}: {counted} in {args.out}")
    return 0


if __name__ == "__main__": sys.exit(main())
