"""Reveal schedules: every stage follows the configuration's; bench/reveal.py at the smallest size measures
every cell once, adds what is missing and nothing else, and refuses other settings."""
import json
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from conftest import ROOT, environment

from marval.config import override, preset
from marval.data import load_digits_data
from marval.diffusion import Schedule
from marval.distill import DistillStage
from marval.mar import MAR, save_weights
from marval.rewards import train_judges
from marval.rl import RLStage
from marval.sampling import OneStep
from marval.outcome import Plain, draw_images
from marval.train import Resident


def awake(cfg):
    "A network with random weights."
    torch.manual_seed(0)
    net = MAR(cfg.model)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    return net


def test_stages():
    """Distillation learns at the schedule's counts of known tokens; RL and evaluation roll out by it, and
    differently from the cosine's."""
    g, cosine = torch.Generator().manual_seed(0), preset("smoke")
    cfg = override(cosine, ["sampling.reveal=root"])
    data, y = Resident(torch.randn(64, 16, 4, generator=g),
                       torch.zeros(64, dtype=torch.long)), torch.arange(5)
    assert DistillStage(cfg, awake(cfg), data, None).known == [0, 8, 12, 14]
    assert DistillStage(cosine, awake(cfg), data, None).known == [0, 2, 5, 10]
    ink = lambda images, labels: images.mean((1, 2, 3))
    stages = [RLStage(c, awake(c), ink, lambda z: (z + 1) / 2) for c in (cfg, cosine)]
    losses = [s.step(0, torch.Generator().manual_seed(1)) for s in stages]
    # the policy is still the frozen student: same counts, same tokens
    assert losses[0]["loss"].isfinite() and losses[0]["loss"] != losses[1]["loss"]
    assert losses[0]["anchor"] < 1e-8
    assert not torch.equal(*(s.images(5, 0)[0] for s in stages))
    net, draw = awake(cfg).eval(), OneStep(Schedule.cosine(), cfg.sampling.entry_abar)
    fast, other = draw_images(cfg, net, draw, y), draw_images(cosine, net, draw, y)
    plain = draw_images(cfg, net, draw, y, sampler=Plain(cfg, net, draw))
    assert torch.allclose(fast, plain, atol=1e-3) and not torch.allclose(fast, other, atol=1e-2)


@pytest.mark.slow
def test_study(tmp_path):
    cfg, run = preset("smoke"), tmp_path / "run"
    net = awake(cfg)
    run.mkdir()
    for stage in ("teacher", "student"):
        save_weights(net, run / f"{stage}.safetensors", stage=stage, **asdict(cfg.sampling))
    train_judges(*load_digits_data(), run / "judges", iterations=5, clip_iterations=0)

    def study(*more, status=0):
        done = subprocess.run([sys.executable, str(ROOT / "bench" / "reveal.py"), "--run", str(run), "--out",
                               str(tmp_path / "r.json"), *more], capture_output=True, text=True,
                              env=environment())
        assert done.returncode == status, done.stderr
        return done.stderr if status else json.loads((tmp_path / "r.json").read_text())

    small = ("--n", "60", "--seeds", "1", "--schedules", "cosine", "linear", "best")
    first = study(*small, "--K", "1", "4")
    cells = {(r["model"], tuple(r["counts"])) for r in first["rows"]}
    assert len(cells) == len(first["rows"])
    assert {c for _, c in cells} == {tuple(c) for by in first["counts"].values() for c in by.values()}
    assert {(m, (16,)) for m in ("teacher", "student")} < cells and all(sum(c) == 16 for _, c in cells)
    for r in first["rows"]: assert r["fd"] > 0 and 0 <= r["coverage"] <= 1 and r["seconds"] > 0
    again = study(*small, "--K", "4", "2", "--models", "student")
    assert again["rows"][:len(first["rows"])] == first["rows"]
    assert {len(r["counts"]) for r in again["rows"][len(first["rows"]):]} == {2}
    assert "another n" in study("--n", "50", "--K", "4", status=2)
    assert "K=17" in study(*small, "--K", "17", status=2)
    timed = study(*small, "--K", "1", "4", "--timing")
    assert timed["rows"] == again["rows"]
    assert set(timed["timing"]["student"]) == set(timed["timing"]["teacher"]) == {"1", "4"}
