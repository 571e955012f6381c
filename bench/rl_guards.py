"""RL on digits under a guard, and picking the best of N beside it: the curves and the table of nbs/10b_guards.ipynb.

Starts from the student and the judges of a finished run of the digits. Three stages of RL, all settings the preset's but for what a name says: with the anchor, without it, and without it under a guard. All are measured every
five steps, with the held-out judge watching. Then the student draws N candidates for each of 500 labels, and the best are measured as the others are. Each RL is a run folder of the pipeline: the script can be stopped and started again.

    python bench/rl_guards.py --from reference/digits --out runs/guards      # some minutes on one core -> bench/results/rl_guards.json
"""
import argparse
import shutil
from pathlib import Path

import torch

from marval.config import override, preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import measure, run_provenance
from marval.fast import FastSampler
from marval.files import read_json, write_json
from marval.guards import best_of_kl, best_of_n, expected_best, samples_for
from marval.mar import load_weights
from marval.pipeline import run
from marval.rewards import load_judges, make_reward
from marval.sampling import OneStep
from marval.outcome import draw_images
from marval.journal import read_log

RUNS = {"anchor (default)": [], "no anchor": ["rl.anchor=0"], "no anchor, guarded": ["rl.anchor=0", "rl.guard=diversity 0.1"]}
COMMON = ["rl.metric_every=5", "rl.watch=heldout"]
BEST_OF = (1, 2, 4, 8, 16)
RESULTS = Path(__file__).parent/"results"/"rl_guards.json"


def train(name: str, source: Path, out: Path, seed: int) -> tuple[Path, dict]:
    "A run folder with RL done, and what its log and its end say."
    folder = out/name.replace(" ", "-").replace(",", "").replace("(", "").replace(")", "")
    if not folder.exists():
        folder.mkdir(parents=True)
        shutil.copy(source/"student.safetensors", folder)
        shutil.copytree(source/"judges", folder/"judges")
    cfg = override(preset("digits", seed), [*COMMON, *RUNS[name]])
    run(cfg, ("rl",), folder)
    curves = [{k: v for k, v in r.items() if k != "seconds"} for r in read_log(folder/"state"/"rl") if "score" in r]
    stopped = read_json(folder/"state"/"rl"/"done.json").get("stopped", "")
    kept = int(stopped.rpartition("step ")[2]) if stopped else curves[-1]["step"]
    return folder, dict(settings=[*COMMON, *RUNS[name]], curves=curves, stopped=stopped, kept=kept)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--from", dest="source", type=Path, required=True, help="run folder of the digits, with student.safetensors and judges")
    p.add_argument("--out", type=Path, required=True, help="where the runs go")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--labels", type=int, default=500, help="labels of the best of N")
    args = p.parse_args()
    torch.set_num_threads(1)
    cfg, (real, real_labels), judges = preset("digits", args.seed), load_digits_data(), load_judges(args.source/"judges")
    draw, reward = OneStep(Schedule.cosine(), cfg.sampling.entry_abar), make_reward(cfg.rl.reward, judges, cfg)
    figures = lambda x, y: measure(x, y, judges, real, real_labels)
    labels, few, runs, picked = torch.arange(cfg.evaluate.n) % 10, torch.arange(args.labels) % 10, {}, {}
    for name in RUNS:
        folder, runs[name] = train(name, args.source, args.out, args.seed)
        images = draw_images(cfg, load_weights(folder/"student_rl.safetensors"), draw, labels)
        runs[name] |= dict(final=figures(images, labels), few=figures(images[:args.labels], few))
        print(name, runs[name]["stopped"], {k: round(v, 3) for k, v in runs[name]["final"].items()}, flush=True)
    student = load_weights(args.source/"student.safetensors")
    sampler = FastSampler(student, draw, cfg.sampling.K)
    candidates = [draw_images(override(cfg, [f"seed={args.seed + 1000 * j}"]), student, draw, few, sampler=sampler) for j in range(max(BEST_OF))]
    for n in BEST_OF:
        best, scores = best_of_n(lambda _, j: candidates[j], reward, few, n)
        picked[n] = figures(best, few) | dict(kl=best_of_kl(n))
        print(f"best of {n}", {k: round(v, 3) for k, v in picked[n].items()}, flush=True)
    for name in RUNS: runs[name]["samples"] = samples_for(scores, runs[name]["few"]["reward"])
    write_json(RESULTS, run_provenance() | dict(seed=args.seed, n=len(labels), labels=len(few), runs=runs, best_of=picked, expected=[expected_best(scores, m).mean().item() for m in range(1, len(scores) + 1)]))


if __name__ == "__main__": main()
