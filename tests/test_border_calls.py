"Calls from Python with values that a stranger might try: a result, or one line."
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from marval.border import BadInput, one_line
from marval.border import given as shown
from marval.cli import Sampler, load
from marval.config import ModelConfig, preset
from marval.diffusion import Chain, Schedule, respaced, t_of_abar
from marval.fast import FastSampler
from marval.mar import MAR, load_into, load_weights, patchify, read_meta, save_weights, unpatchify, weights_meta
from marval.official import infer_config, load_official, read_foreign, save_official
from marval.sampling import (
    OneStep, TeacherChain, best_counts, cfg_at, draw_noise, entropy_curve, random_orders, reveal_counts, reveal_kl, sample)

CONFIG = preset("smoke")
SCHED = Schedule.cosine()


class Nasty:
    "Something that cannot even be shown."
    def __repr__(self): raise RuntimeError("no")

    def __len__(self): raise RuntimeError("no")


ODD = [
    None, True, False, 0, 1, -1, 2, 1.7, 0.5, -0.0, math.nan, math.inf, -math.inf, 10**12, 10**400, -10**400, 2**63, 1e308, 1j, "", "3", "abc",
    "cosine", "a\nb", "\udcff", "x" * 5000, b"x", [], [1], [1.7], [True], [None], ["3"], [[1]], [10**400], [-1], (1, 2), {}, {"a": 1}, {1}, set(),
    object(), Nasty(), int, len, range(3), range(10**20), iter([1]), np.int64(3), np.float32(2), np.nan, np.array([1, 2]), np.array([1.5]),
    np.array(["a"]), np.array(3), np.array([[1]]), torch.tensor(3), torch.tensor([1, 2]), torch.tensor([1.5]), torch.tensor([True]),
    torch.tensor([[1]]), torch.zeros(0), torch.zeros(2, 3), torch.zeros(2, 4, 8, 8), torch.full((4, 4), math.nan),
    torch.zeros(3, device="meta"), torch.zeros(2, 2).to_sparse(), torch.float32, torch.float16, torch.int64, torch.Generator(), SCHED,
    OneStep(SCHED), CONFIG, CONFIG.model, ModelConfig(width=-1), torch.nn.Linear(2, 2)]
odd = st.sampled_from(range(len(ODD))).map(ODD.__getitem__)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return MAR(CONFIG.model).eval()


@pytest.fixture(scope="module")
def calls(net, tmp_path_factory):
    "For each public function: a way to call it, and arguments that it takes."
    folder = tmp_path_factory.mktemp("calls")
    good, pth, out = folder / "good.safetensors", folder / "good.pth", folder / "out.safetensors"
    save_weights(net, good, stage="teacher", K=4, chain_steps=5)
    save_official(net, pth)
    m, one = net.cfg, OneStep(SCHED)
    labels, cov, curve = torch.tensor([1, 2]), torch.eye(8, dtype=torch.float64), torch.linspace(3, 1, 4)
    sampler, latents = load(good), torch.zeros(1, 1, 8, 8)
    noise = draw_noise(2, m.seq_len, 4, m.token_dim, 1)
    return {
        "Sampler": (Sampler, dict(model=net, meta={}, vae=None)),
        "Sampler.sample": (sampler.sample, dict(labels=[3], K=2, cfg=1.5, chain=3, seed=0, reveal="cosine")),
        "Sampler.decode": (sampler.decode, dict(latents=latents)),
        "load": (load, dict(path=good, device="cpu", vae=None)),
        "MAR": (MAR, dict(cfg=m)),
        "patchify": (patchify, dict(latents=latents, patch=2)),
        "unpatchify": (unpatchify, dict(tokens=torch.zeros(1, 16, 4), patch=2)),
        "save_weights": (save_weights, dict(model=net, path=out, K="3", stage="teacher")),
        "load_weights": (load_weights, dict(path=good, device="cpu")),
        "load_into": (load_into, dict(model=net, path=good)),
        "read_meta": (read_meta, dict(path=good)),
        "weights_meta": (weights_meta, dict(meta={"K": "3"}, model=m)),
        "infer_config": (infer_config, dict(state=net.state_dict(), heads=2, img_size=8, vae_stride=1, patch_size=2, dropout=0.1)),
        "read_foreign": (read_foreign, dict(path=pth)),
        "load_official": (load_official, dict(path=pth, which="model", device="cpu", heads=2)),
        "save_official": (save_official, dict(model=net, path=folder / "out.pth", model_ema=None, args=None, epoch=0, optimizer=None, scaler=None)),
        "random_orders": (random_orders, dict(B=2, L=16, generator=None)),
        "reveal_counts": (reveal_counts, dict(L=16, K=2, schedule="cosine")),
        "entropy_curve": (entropy_curve, dict(cov=cov, L=4, orders=random_orders(2, 4))),
        "reveal_kl": (reveal_kl, dict(H=curve, counts=[1, 3])),
        "best_counts": (best_counts, dict(H=curve, K=2)),
        "cfg_at": (cfg_at, dict(cfg=2.0, schedule="linear", L=16, n_known_after=3)),
        "draw_noise": (draw_noise, dict(B=2, L=16, K=4, D=4, rounds=1, generator=None, dtype=torch.float32, reveal="cosine")),
        "TeacherChain": (TeacherChain, dict(sched=SCHED, n_steps=5, temperature=1.0, clip=0.0)),
        "OneStep": (OneStep, dict(sched=SCHED, entry_abar=0.15)),
        "sample": (sample, dict(model=net, labels=labels, draw=one, K=4, cfg=1.0, cfg_schedule="constant", orders=None, noise=noise,
                                generator=None, grad_steps=0, reveal="cosine")),
        "FastSampler": (FastSampler, dict(model=net, draw=one, K=4, cfg=1.0, cfg_schedule="constant", dtype=torch.float32, decode=None,
                                          reveal="cosine")),
        "FastSampler.sample": (FastSampler(net, one, 4).sample, dict(labels=labels, orders=None, noise=noise, generator=None)),
        "Schedule.cosine": (Schedule.cosine, dict(T=10)),
        "t_of_abar": (t_of_abar, dict(sched=SCHED, abar=0.15)),
        "respaced": (respaced, dict(T=1000, n=10)),
        "Chain.make": (Chain.make, dict(sched=SCHED, n=10)),
    }


NAMES = """Sampler Sampler.sample Sampler.decode load MAR patchify unpatchify save_weights load_weights load_into read_meta weights_meta
infer_config read_foreign load_official save_official random_orders reveal_counts entropy_curve reveal_kl best_counts cfg_at draw_noise
TeacherChain OneStep sample FastSampler FastSampler.sample Schedule.cosine t_of_abar respaced Chain.make""".split()


@pytest.mark.parametrize("name", NAMES)
def test_one_odd_argument(calls, monkeypatch, tmp_path, name):
    "Every argument of every function in turn, with every odd value."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("marval.cli._free_memory", lambda device: 2**30)
    f, good = calls[name]
    assert set(calls) == set(NAMES) and not isinstance(outcome(f, **good), BadInput)
    bad = []
    for argument, value in itertools.product(good, ODD):
        try: outcome(f, **{**good, argument: value})
        except Exception as e: bad.append(one_line(f"{argument}={shown(value)}: {type(e).__name__}: {e}", 300))
    assert not bad, "\n".join(bad)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(labels=odd | st.lists(st.integers(-2, 12), max_size=4), K=odd | st.integers(0, 17), cfg=odd | st.floats(), chain=odd | st.integers(0, 6),
       seed=odd | st.integers(), reveal=odd)
def test_any_request(calls, labels, K, cfg, chain, seed, reveal):
    f, _ = calls["Sampler.sample"]
    found = outcome(f, labels=labels, K=K, cfg=cfg, chain=chain, seed=seed, reveal=reveal)
    assert isinstance(found, BadInput) or found.isfinite().all() and 0 <= found.min() and found.max() <= 1


@pytest.mark.parametrize("labels", [[1.7], [True], "3", ["3"], [[1, 2]], [math.nan], [], 3, None, [-1], [11], torch.tensor([1.0]),
                                    torch.tensor([True]), np.array([1.5]), range(10**12), {1, 2}, (x for x in [1])], ids=str)
def test_what_is_no_list_of_classes(calls, labels):
    assert isinstance(outcome(calls["Sampler.sample"][0], labels=labels), BadInput)


@pytest.mark.parametrize("labels", [[1, 2], (1, 2), range(1, 3), np.array([1, 2]), np.array([1, 2], dtype=np.uint8), [np.int64(1), 2],
                                    torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32)], ids=str)
def test_ways_to_say_one_and_two(calls, labels):
    sample, _ = calls["Sampler.sample"]
    torch.testing.assert_close(sample(labels, K=np.int64(4)), sample([1, 2], K=4))
