"Training steps ask the device for no number, and the benches of their cost run."
import json
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, environment
from marval.config import override, preset
from marval.distill import DistillStage
from marval.mar import MAR
from marval.teacher import TeacherStage
from marval.train import Resident, step_generator

WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "is_nonzero", "equal"}      # operations whose result, or its shape, the host has to know


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        assert f.overloadpacket.__name__ not in WAITS, f
        return f(*args, **(kwargs or {}))


@pytest.mark.parametrize("changes", [("teacher",), ("distill",), ("distill", "distill.share=contexts"), ("distill", "distill.share=contexts", "distill.phi_updates=2", "compute.accumulate=2")])
def test_no_waiting(changes):
    "And a step with shared contexts moves both networks, whatever the number of parts."
    stage, *settings = changes
    cfg = override(preset("smoke"), ["distill.phi_first=0", *settings])
    m = cfg.model
    data = Resident(torch.randn(32, m.seq_len, m.token_dim), torch.arange(32) % m.class_num)
    torch.manual_seed(0)
    net = MAR(m).eval()
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    s = TeacherStage(cfg, data) if stage == "teacher" else DistillStage(cfg, net, data, lambda z: z)
    before = {k: [p.clone() for p in module.parameters()] for k, module in s.modules().items()}
    with NoWaiting(): values = s.step(1, step_generator(0, stage, 1))
    assert all(v.ndim == 0 and v.isfinite() for v in values.values())
    for k, module in s.modules().items(): assert any((p != q).any() for p, q in zip(module.parameters(), before[k])), k
    with pytest.raises(AssertionError), NoWaiting(): values["loss"].item()


def test_benches(tmp_path):
    "Both scripts at the smallest size: what they store is what the notebook reads, a trace is written, and the plan's operations are those counted."
    def run(script, *more):
        done = subprocess.run([sys.executable, str(ROOT/"bench"/script), "--device", "cpu", "--size", "smoke", "--batch", "4", "--out", str(tmp_path/f"{script}.json"), *more], capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        cell, = json.loads((tmp_path/f"{script}.json").read_text())["cells"].values()
        return cell
    cell = run("distill.py", "--rounds", "1", "--phi-mul", "2", "--profile", str(tmp_path/"trace.json"))
    assert {"device", "torch", "commit", "precision", "batch"} <= set(cell) and cell["instrument"] == 1 and json.loads((tmp_path/"trace.json").read_text())["traceEvents"]
    assert set(cell["runs"]) == {"MAR", "GSIM, share none, phi_mul 2", "GSIM, share contexts, phi_mul 2"}
    for r in cell["runs"].values(): assert r["seconds"] > 0 and abs(r["counted_over_predicted"] - 1) < 1e-6 and abs(sum(r["shares"].values()) - 1) < 1e-6 and r["peak_bytes"] > 0
    assert cell["runs"]["GSIM, share contexts, phi_mul 2"]["flops"] < cell["runs"]["GSIM, share none, phi_mul 2"]["flops"]
    runs = {(r["recompute"], r["K"]): r for r in run("rl.py", "--K", "2", "8")["runs"]}
    assert set(runs) == {(way, K) for way in ("steps", "none") for K in (2, 8)}
    assert runs["none", 8]["peak_bytes"] > 2 * runs["none", 2]["peak_bytes"] and runs["steps", 8]["peak_bytes"] < 1.5 * runs["steps", 2]["peak_bytes"]
    for r in runs.values(): assert 0.8 < r["peak_bytes"] / r["predicted_bytes"] < 1.8
