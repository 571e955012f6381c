"The sampler that prepares everything once draws what the plain one draws: on a processor in fp32 and bf16, on a GPU through a captured graph; and the benchmark runs."
import json
import math
import subprocess
import sys

import pytest
import torch

from conftest import ROOT, environment
from marval.config import BadInput, preset
from marval.diffusion import Schedule
from marval.fast import FastSampler
from marval.mar import MAR
from marval.sampling import OneStep, TeacherChain, draw_noise, random_orders, sample

SCHED = Schedule.cosine()
CASES = {"one step": (OneStep(SCHED), 1., "constant"), "chain": (TeacherChain(SCHED, 20, 0.9), 1., "constant"), "guided chain": (TeacherChain(SCHED, 20), 2.9, "linear"),
         "clipped chain": (TeacherChain(SCHED, 20, clip=1.), 1.2, "constant")}


def random_mar(cfg, scale=None):
    "A MAR whose output depends on all of its weights."
    torch.manual_seed(0)
    model = MAR(cfg).eval().requires_grad_(False)
    with torch.no_grad():
        for p in model.parameters():
            if scale is None: p.normal_(0, p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3)
            elif not p.any(): p.normal_(0, scale)
    return model


@pytest.fixture(scope="module")
def net(): return random_mar(preset("smoke").model)


def given(m, B, K, draw, device="cpu"):
    g = torch.Generator().manual_seed(B)
    labels, orders, noise = torch.arange(B) * 3 % (m.class_num + 1), random_orders(B, m.seq_len, g), draw_noise(B, m.seq_len, K, m.token_dim, draw.rounds, g)
    return labels.to(device), orders.to(device), [z.to(device) for z in noise]


def distance(a, b): return ((a - b).double().norm() / b.double().norm()).item()


def plain(net, labels, draw, K, cfg, schedule, orders, noise):
    with torch.no_grad(): return sample(net, labels, draw, K, cfg, schedule, orders, noise)


@pytest.mark.parametrize("case", CASES)
def test_equal(net, case):
    "Several batch sizes from one sampler, in turn; every K from one token a step to all at once."
    draw, cfg, schedule = CASES[case]
    for K in (1, 5, 16):
        fast = FastSampler(net, draw, K, cfg, schedule)
        for B in (1, 4, 2, 1):
            labels, orders, noise = given(net.cfg, B, K, draw)
            got = fast.sample(labels, orders, noise)
            assert distance(got, plain(net, labels, draw, K, cfg, schedule, orders, noise)) < 1e-5, (K, B)
            assert got.dtype == torch.float32 and not got.is_inference()


@pytest.mark.parametrize("case", CASES)
def test_bf16(net, case):
    "As near to fp32 as the plain path is in bf16, and not nearer than bf16 can be."
    draw, cfg, schedule = CASES[case]
    labels, orders, noise = given(net.cfg, 4, 5, draw)
    want = plain(net, labels, draw, 5, cfg, schedule, orders, noise)
    got = FastSampler(net, draw, 5, cfg, schedule, dtype=torch.bfloat16).sample(labels, orders, noise)
    low = random_mar(net.cfg).bfloat16()
    rough = distance(plain(low, labels, draw, 5, cfg, schedule, orders, [z.bfloat16() for z in noise]).float(), want)
    assert got.dtype == torch.float32 and 1e-4 < distance(got, want) < max(1.5 * rough, 0.01) < 0.2


@pytest.mark.slow
def test_base():
    "The real size: 64 buffer positions, 256 tokens, 12 + 12 blocks, through which rounding adds up to about 1e-6 in either path."
    net = random_mar(preset("base").model, 0.02)
    for draw, cfg in ((OneStep(SCHED), 1.), (TeacherChain(SCHED, 2), 2.9)):
        labels, orders, noise = given(net.cfg, 1, 2, draw)
        want = plain(net, labels, draw, 2, cfg, "constant", orders, noise)
        assert distance(FastSampler(net, draw, 2, cfg).sample(labels, orders, noise), want) < 3e-6
    draw = OneStep(SCHED)
    labels, orders, noise = given(net.cfg, 1, 1, draw)
    low = FastSampler(net, draw, 1, dtype=torch.bfloat16).sample(labels, orders, noise)
    assert 1e-5 < distance(low, plain(net, labels, draw, 1, 1., "constant", orders, noise)) < 0.02


def test_same_numbers(net):
    "A generator gives the same images on either path, and twice."
    draw, cfg, _ = CASES["guided chain"]
    new, labels = lambda: torch.Generator().manual_seed(3), torch.tensor([1, 10])
    fast = FastSampler(net, draw, 4, cfg)
    first = fast.sample(labels, generator=new())
    with torch.no_grad(): assert distance(first, sample(net, labels, draw, 4, cfg, generator=new())) < 1e-5
    assert distance(fast.sample(labels, generator=new()), first) < 1e-5


@pytest.mark.parametrize("bad, says", [
    (dict(labels=torch.tensor([0, 11])), "label 11: expected 0 to 9"), (dict(labels=torch.tensor([-1, 0])), "label -1"), (dict(labels=torch.tensor([0., 1.])), "expected a non-empty list of integers"),
    (dict(labels=torch.tensor([], dtype=torch.long)), "non-empty"), (dict(orders=torch.arange(16)[None]), "orders of shape"), (dict(orders=torch.zeros(2, 16, dtype=torch.long)), "permutation"),
    (dict(noise=draw_noise(2, 16, 4, 4, 2)), "noise of shapes"), (dict(noise=draw_noise(2, 16, 3, 4, 1)), "noise of shapes")])
def test_bad_input(net, bad, says):
    fast = FastSampler(net, OneStep(SCHED), 4)
    with pytest.raises(BadInput) as e: fast.sample(**{"labels": torch.tensor([0, 1]), **bad})
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("args, says", [((OneStep(SCHED), 0), "K=0: expected 1 to 16"), ((OneStep(SCHED), 17), "K=17"), ((TeacherChain(SCHED, 5), 4, float("nan")), "cfg=nan"),
                                        ((TeacherChain(SCHED, 5), 4, 2., "cosine"), "cfg_schedule"), ((None, 4), "expected OneStep or TeacherChain"), ((OneStep(SCHED), 4, 1., "constant", torch.float16), "float16: expected")])
def test_bad_setting(net, args, says):
    with pytest.raises(BadInput) as e: FastSampler(net, *args)
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_graph(net, case):
    "A captured graph, replayed with other labels, orders and noise, and beside another batch size, draws what the plain path draws there."
    draw, cfg, schedule = CASES[case]
    sched = Schedule.cosine(device="cuda")
    draw = OneStep(sched) if isinstance(draw, OneStep) else TeacherChain(sched, 20, draw.temperature, draw.clip)
    there = random_mar(net.cfg).cuda()
    fast, low = FastSampler(there, draw, 5, cfg, schedule, graph=True), FastSampler(there, draw, 5, cfg, schedule, dtype=torch.bfloat16, graph=True)
    for B in (3, 1, 3, 2, 3):
        labels, orders, noise = given(net.cfg, B, 5, draw, "cuda")
        noise = [z + 0.1 * B for z in noise]
        want = plain(there, labels, draw, 5, cfg, schedule, orders, noise)
        assert distance(fast.sample(labels, orders, noise), want) < 1e-5 and distance(low.sample(labels, orders, noise), want) < 0.1
        assert distance(fast.sample(labels.cpu(), orders.cpu(), [z.cpu() for z in noise]), want) < 1e-5


def test_benchmark(tmp_path):
    "The script at the smallest size: every contestant measured, and the file is what the notebook reads; a second run keeps what it does not measure again."
    def run(*more):
        done = subprocess.run([sys.executable, str(ROOT/"bench"/"sampling.py"), "--device", "cpu", "--size", "smoke", "--chain-steps", "3", "--rounds", "1", "--out", str(tmp_path/"s.json"), *more],
                              capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path/"s.json").read_text())
    found = run("--K", "4", "--batch", "1", "2", "--dtype", "fp32", "bf16")
    assert set(found["cells"]) == {"smoke K=4 batch=1", "smoke K=4 batch=2"} and {"device", "torch", "commit", "threads"} <= set(found["provenance"])
    for cell in found["cells"].values():
        assert set(cell["runs"]) == {f"{kind}, {path}" for kind in ("one step", "chain") for path in ("fast, fp32", "fast, bf16", "plain, fp32")}
        for name, r in cell["runs"].items():
            assert 0 < r["roofline_seconds"] < r["seconds"] and math.isclose(r["images_per_second"], cell["batch"] / r["seconds"]) and r["rounds"] == 1
            if "plain" not in name: assert r["distance"] < (1e-5 if "fp32" in name else 0.1) and set(r["shares"]) == {"backbone", "head", "decode"}
    assert set(run("--K", "2", "--batch", "1", "--no-parts")["cells"]) == {"smoke K=4 batch=1", "smoke K=4 batch=2", "smoke K=2 batch=1"}
