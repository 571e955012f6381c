"""Does the student suffer when phi's and theta's updates share their contexts? Digits' distillation, `distill.share` none against contexts, from one teacher, several seeds, all else as in the preset.

    python bench/share.py --seeds 0 1 2 --out runs/share        # six distillations, a few minutes each on one core -> bench/results/share_digits.json
    python bench/share.py --seeds 0 --out /tmp/share --results /tmp/share.json --set distill.iterations=20 --set evaluate.n=200   # a trial
"""
import argparse
import json
import shutil
import time
from pathlib import Path

import torch

from marval.config import override, preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import measure, run_provenance
from marval.files import write_json
from marval.mar import load_weights
from marval.pipeline import run
from marval.rewards import load_judges
from marval.sampling import OneStep
from marval.outcome import draw_images
from marval.journal import read_log

TEACHER = Path(__file__).parent.parent/"reference"/"digits"     # of `slurm/launch.py --scale digits`
RESULTS = Path(__file__).parent/"results"/"share_digits.json"


def student(seed: int, share: str, teacher: Path, out: Path, settings: list[str]) -> dict:
    "Distil one student, unless that was done; its figures, its curve, and the processor time that the training took."
    cfg, folder, real = override(preset("digits", seed), [*settings, f"distill.share={share}"]), out/f"{share}-{seed}", load_digits_data()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder/"judges").exists(): shutil.copytree(teacher/"judges", folder/"judges")
    if not (folder/"teacher.safetensors").exists(): shutil.copy(teacher/"teacher.safetensors", folder)
    start = time.process_time()
    run(cfg, ("distill",), folder)
    spent, labels = time.process_time() - start, torch.arange(cfg.evaluate.n) % cfg.model.class_num
    images = draw_images(cfg, load_weights(folder/"student.safetensors"), OneStep(Schedule.cosine(), cfg.sampling.entry_abar), labels)
    figures = measure(images, labels, load_judges(folder/"judges"), *real)
    curve = [[row["step"], row["fd"]] for row in read_log(folder/"state"/"distill") if "fd" in row]
    return {k: v for k, v in figures.items() if isinstance(v, float)} | {"curve": curve, "cpu_seconds": spent, "commit": run_provenance()["commit"]}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    p.add_argument("--teacher", type=Path, default=TEACHER, metavar="RUN", help="run folder with a digits teacher and its judges (default: reference/digits)")
    p.add_argument("--out", type=Path, required=True, help="where the runs go")
    p.add_argument("--results", type=Path, default=RESULTS)
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    done = json.loads(args.results.read_text())["students"] if args.results.exists() else {}
    for seed in args.seeds:
        for share in ("none", "contexts"):
            done[f"{share} {seed}"] = r = {"share": share, "seed": seed} | student(seed, share, args.teacher, args.out, args.set)
            write_json(args.results, {"provenance": run_provenance() | {"settings": args.set}, "students": done})
            print(f"{share:9} seed {seed}  " + "  ".join(f"{k} {v:.3f}" for k, v in r.items() if isinstance(v, float)), flush=True)


if __name__ == "__main__": main()
