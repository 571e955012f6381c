"bench/reveal.py at the smallest size: every cell measured once, a second run adds what is missing and nothing else, other settings are refused."
import json
import subprocess
import sys
from dataclasses import asdict

import torch
from conftest import ROOT, environment

from marval.config import preset
from marval.data import load_digits_data
from marval.mar import MAR, save_weights
from marval.rewards import train_judges


def test_study(tmp_path):
    cfg, run = preset("smoke"), tmp_path / "run"
    torch.manual_seed(0)
    net = MAR(cfg.model)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    run.mkdir()
    for stage in ("teacher", "student"): save_weights(net, run / f"{stage}.safetensors", stage=stage, **asdict(cfg.sampling))
    train_judges(*load_digits_data(), run / "judges", iterations=5, clip_iterations=0)

    def study(*more, status=0):
        done = subprocess.run([sys.executable, str(ROOT / "bench" / "reveal.py"), "--run", str(run), "--out", str(tmp_path / "r.json"), *more], capture_output=True, text=True, env=environment())
        assert done.returncode == status, done.stderr
        return done.stderr if status else json.loads((tmp_path / "r.json").read_text())

    small = ("--n", "60", "--seeds", "1", "--schedules", "cosine", "linear", "best")
    first = study(*small, "--K", "1", "4")
    cells = {(r["model"], tuple(r["counts"])) for r in first["rows"]}
    assert len(cells) == len(first["rows"]) and {c for _, c in cells} == {tuple(c) for by in first["counts"].values() for c in by.values()}
    assert {(m, (16,)) for m in ("teacher", "student")} < cells and all(sum(c) == 16 for _, c in cells)
    for r in first["rows"]: assert r["fd"] > 0 and 0 <= r["coverage"] <= 1 and r["seconds"] > 0
    again = study(*small, "--K", "4", "2", "--models", "student")
    assert again["rows"][:len(first["rows"])] == first["rows"] and {len(r["counts"]) for r in again["rows"][len(first["rows"]):]} == {2}
    assert "another n" in study("--n", "50", "--K", "4", status=2) and "K=17" in study(*small, "--K", "17", status=2)
    timed = study(*small, "--K", "1", "4", "--timing")
    assert timed["rows"] == again["rows"] and set(timed["timing"]["student"]) == {"1", "64"} and set(timed["timing"]["teacher"]["1"]) == {"1", "4"}
