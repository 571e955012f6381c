"""Does the student suffer when phi's and theta's updates share their contexts? Digits' distillation,
`distill.share` none against contexts, from one teacher, several seeds, all else as in the preset.

examples:
    python bench/share.py --seeds 0 1 2 --out runs/share   # six distillations
    python bench/share.py --seeds 0 --out /tmp/share --results /tmp/share.json --set distill.iterations=20
"""
import sys
import time
from pathlib import Path

import torch
from common import (RESULTS, ROOT, adapted, bring, commit, entry_point, facts, folder, keep, out_file,
                    out_folder, parser, stages, stored, whole)

from marval.config import preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.evaluate import measure
from marval.journal import read_log
from marval.mar import load_weights
from marval.outcome import draw_images
from marval.rewards import load_judges
from marval.sampling import OneStep

TEACHER = ROOT/"reference"/"digits"     # of `slurm/launch.py --scale digits`


def student(seed: int, share: str, teacher: Path, out: Path, settings: list[str]) -> dict:
    "Distil one student, unless that was done; its figures, its curve, the processor time of the training."
    cfg = adapted(adapted(preset("digits", seed), {}, settings), {"distill.share": share})
    here, real = out/f"{share}-{seed}", load_digits_data()
    bring(teacher, here, "judges", "teacher.safetensors")
    start = time.process_time()
    stages(cfg, ("distill",), here)
    spent = time.process_time() - start
    labels = torch.arange(cfg.evaluate.n) % cfg.model.class_num
    one = OneStep(Schedule.cosine(), cfg.sampling.entry_abar)
    images = draw_images(cfg, load_weights(here/"student.safetensors"), one, labels)
    figures = measure(images, labels, load_judges(here/"judges"), *real)
    curve = [[row["step"], row["fd"]] for row in read_log(here/"state"/"distill") if "fd" in row]
    figures = {k: v for k, v in figures.items() if isinstance(v, float)}
    return figures | {"curve": curve, "cpu_seconds": spent, "commit": commit()}


def arguments(argv):
    p = parser(__doc__)
    p.add_argument("--seeds", nargs="+", type=whole(0, 2**32 - 1), default=(0, 1, 2))
    p.add_argument("--teacher", type=folder, default=TEACHER, metavar="RUN",
                   help="run folder with a digits teacher and its judges (default: reference/digits)")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the runs go")
    p.add_argument("--results", type=Path, default=RESULTS/"share_digits.json", metavar="FILE")
    p.add_argument("--set", action="append", default=[], metavar="field=value")
    return p.parse_args(argv)


@entry_point
def main(argv) -> int:
    args = arguments(argv)
    torch.set_num_threads(1)
    adapted(preset("digits"), {}, args.set)                         # refused before anything is trained
    out_folder(args.out)
    done = stored(out_file(args.results), students=dict).get("students", {})
    for seed in args.seeds:
        for share in ("none", "contexts"):
            row = {"share": share, "seed": seed} | student(seed, share, args.teacher, args.out, args.set)
            done[f"{share} {seed}"] = row
            keep(args.results, {"provenance": facts() | {"settings": args.set}, "students": done})
            told = "  ".join(f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float))
            print(f"{share:9} seed {seed}  {told}", flush=True)
    return 0


if __name__ == "__main__": sys.exit(main())
