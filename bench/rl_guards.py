"""RL on digits under a guard, and picking the best of N beside it: the curves and the table of
nbs/10b_guards.ipynb.

Starts from the student and the judges of a finished run of the digits. Three stages of RL, all settings
the preset's but for what a name says: with the anchor, without it, and without it under a guard. All are
measured every five steps, with the held-out judge watching. Then the student draws N candidates for each
of 500 labels, and the best are measured as the others are. Each RL is a run folder of the pipeline: the
script can be stopped and started again.

examples:
    python bench/rl_guards.py --from reference/digits --out runs/guards   # some minutes on one core
    python bench/rl_guards.py --from RUN --out /tmp/g --results /tmp/g.json --scale smoke --labels 40
"""
import sys
from pathlib import Path

import torch
from common import (RESULTS, BadInput, adapted, bring, entry_point, facts, folder, keep, out_file,
                    out_folder, parser, stages, stored, whole)

from marval.config import preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import measure
from marval.fast import FastSampler
from marval.files import read_json
from marval.guards import best_of_kl, best_of_n, expected_best, samples_for
from marval.journal import read_log
from marval.mar import load_weights
from marval.outcome import draw_images
from marval.rewards import load_judges, make_reward
from marval.sampling import OneStep

RUNS = {"anchor (default)": {}, "no anchor": {"rl.anchor": 0.},
        "no anchor, guarded": {"rl.anchor": 0., "rl.guard": "diversity 0.1"}}
COMMON = {"rl.metric_every": 5, "rl.watch": "heldout"}
BEST_OF = (1, 2, 4, 8, 16)


def train(name: str, cfg, source: Path, out: Path) -> tuple[Path, dict]:
    "A run folder with RL done, and what its log and its end say."
    here = out/name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
    bring(source, here, "student.safetensors", "judges")
    own = COMMON | RUNS[name]
    stages(adapted(cfg, own), ("rl",), here)
    rows = [r for r in read_log(here/"state"/"rl") if "score" in r]
    curves = [{k: v for k, v in r.items() if k != "seconds"} for r in rows]
    stopped = read_json(here/"state"/"rl"/"done.json").get("stopped", "")
    kept = int(stopped.rpartition("step ")[2]) if stopped else curves[-1]["step"]
    settings = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in own.items()]
    return here, dict(settings=settings, curves=curves, stopped=stopped, kept=kept)


class Study:
    "What all parts share: student, judges, the way to draw and to measure."
    def __init__(self, args):
        self.args, self.cfg = args, preset(args.scale, args.seed)
        self.source, self.judges = args.source, load_judges(args.source/"judges")
        self.real = load_digits_data()
        self.draw = OneStep(Schedule.cosine(), self.cfg.sampling.entry_abar)
        self.reward = make_reward(self.cfg.rl.reward, self.judges, self.cfg)
        self.labels, self.few = torch.arange(self.cfg.evaluate.n) % 10, torch.arange(args.labels) % 10

    def figures(self, images, labels): return measure(images, labels, self.judges, *self.real)

    def trained(self) -> dict:
        "The three stages of RL, and how each ends."
        runs = {}
        for name in RUNS:
            here, found = train(name, self.cfg, self.source, self.args.out)
            policy = load_weights(here/"student_rl.safetensors")
            images = draw_images(self.cfg, policy, self.draw, self.labels)
            final, few = self.figures(images, self.labels), self.figures(images[:len(self.few)], self.few)
            runs[name] = found | dict(final=final, few=few)
            print(name, found["stopped"], {k: round(v, 3) for k, v in final.items()}, flush=True)
        return runs

    def picked(self):
        "The best of N, for every N, and the scores of all candidates."
        student = load_weights(self.source/"student.safetensors")
        sampler, candidates, picked = FastSampler(student, self.draw, self.cfg.sampling.K), [], {}
        for j in range(max(BEST_OF)):
            other = preset(self.args.scale, self.args.seed + 1000 * j)
            candidates.append(draw_images(other, student, self.draw, self.few, sampler=sampler))
        for n in BEST_OF:
            best, scores = best_of_n(lambda _, j: candidates[j], self.reward, self.few, n)
            picked[n] = self.figures(best, self.few) | dict(kl=best_of_kl(n))
            print(f"best of {n}", {k: round(v, 3) for k, v in picked[n].items()}, flush=True)
        return picked, scores


def arguments(argv):
    p = parser(__doc__)
    p.add_argument("--from", dest="source", type=folder, required=True, metavar="RUN",
                   help="run folder of the digits, with student.safetensors and judges")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs go")
    p.add_argument("--results", type=Path, default=RESULTS/"rl_guards.json", metavar="FILE")
    p.add_argument("--scale", choices=("digits", "smoke"), default="digits", help="of the run given")
    p.add_argument("--seed", type=whole(0, 2**31), default=0)
    p.add_argument("--labels", type=whole(20, 100_000), default=500, help="labels of the best of N")
    return p.parse_args(argv)


@entry_point
def main(argv) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    n = preset(args.scale).evaluate.n
    if args.labels > n: raise BadInput(f"--labels {args.labels}: expected at most {n}, as are measured")
    out_folder(args.out)
    stored(out_file(args.results), runs=dict, best_of=dict)         # nothing else is replaced
    study = Study(args)
    runs = study.trained()
    picked, scores = study.picked()
    for name in RUNS: runs[name]["samples"] = samples_for(scores, runs[name]["few"]["reward"])
    expected = [expected_best(scores, m).mean().item() for m in range(1, len(scores) + 1)]
    keep(args.results, facts() | dict(seed=args.seed, n=len(study.labels), labels=len(study.few), runs=runs,
                                      best_of=picked, expected=expected))
    return 0


if __name__ == "__main__": sys.exit(main())
