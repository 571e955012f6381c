"""What a GPU would refuse or wait for, seen without one: whole steps and draws with tensors that have no numbers, but a device. A tensor left on the CPU beside one on the GPU, or a
number that the host has to know, is an error there; only kernels and gradients are not run."""
import json
import types
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from marval.config import override, preset
from marval.diffusion import Schedule
from marval.distill import DistillStage
from marval.fast import FastSampler
from marval.mar import MAR
from marval.parallel import autocast
from marval.rl import RLStage
from marval.sampling import OneStep, TeacherChain, draw_noise, random_orders, sample
from marval.teacher import TeacherStage
from marval.train import Resident, _permutation, step_generator

GPU = torch.device("cuda", 0)


class Elsewhere(torch.Generator):
    "Stands for a generator on the GPU: nobody draws from it."
    device = GPU


class Moved:
    "Puts objects on the GPU, in place: each tensor that they hold, however deep, becomes one without numbers."
    def __init__(self, mode): self.mode, self.done = mode, {}

    def __call__(self, x):
        if id(x) not in self.done: self.done[id(x)] = x, self.new(x)              # the first keeps its id from being used again
        return self.done[id(x)][1]

    def new(self, x):
        if isinstance(x, torch.Tensor):
            y = FakeTensor(self.mode, x.detach().to("meta"), GPU)
            return nn.Parameter(y, x.requires_grad) if isinstance(x, nn.Parameter) else y
        if isinstance(x, tuple): return type(x)(*map(self, x)) if hasattr(x, "_fields") else tuple(map(self, x))
        self.done[id(x)] = x, x                                                    # it may hold itself
        if isinstance(x, list): x[:] = map(self, x)
        elif isinstance(x, dict): x.update({k: self(v) for k, v in x.items()})
        elif isinstance(x, types.FunctionType):
            for name, cell in zip(x.__code__.co_freevars, x.__closure__ or ()): cell.cell_contents = self.named(name, cell.cell_contents)
        elif isinstance(x, types.MethodType): self(x.__self__)
        elif isinstance(x, (nn.Module, torch.optim.Optimizer)) or type(x).__module__.split(".")[0] == "marval" and not isinstance(x, type):
            for k, v in vars(x).items(): vars(x)[k] = self.named(k, v)
            if isinstance(x, torch.optim.Optimizer): x.state = defaultdict(dict, {self(p): self(s) for p, s in x.state.items()})
        return x

    def named(self, name, x): return "cuda:0" if name == "device" and isinstance(x, str) else self(x)


@pytest.fixture
def gpu(monkeypatch):
    "Moves objects to the GPU; in the mode that it carries, work there is only gone through."
    for name in ("rand", "randn", "randint"):
        plain = getattr(torch, name)
        def draw(*args, plain=plain, generator=None, **kwargs):
            if generator is not None: assert torch.device(kwargs.get("device", "cpu")).type == generator.device.type, "numbers drawn away from their generator"
            return plain(*args, **kwargs)
        monkeypatch.setattr(torch, name, draw)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)        # or autocast would switch itself off
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    _permutation.cache_clear()                                                                         # which keeps the order of an epoch
    yield Moved(FakeTensorMode())
    _permutation.cache_clear()


def backward(loss, gradient=None):
    "A gradient for each parameter that the loss depends on: autograd itself has no engine for a GPU that isn't there."
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen: continue
        seen.add(node)
        if hasattr(node, "variable"): node.variable.grad = torch.empty_like(node.variable)
        nodes += [f for f, _ in node.next_functions]


def stage(name, settings):
    "A stage on the CPU, after one real step: what is made once is there."
    cfg = override(preset("smoke"), ["distill.phi_first=0", *settings])
    m = cfg.model
    data, net = Resident(torch.randn(32, m.seq_len, m.token_dim), torch.arange(32) % m.class_num), MAR(m).eval()
    if name == "teacher": s = TeacherStage(cfg, data)
    elif name == "distill": s = DistillStage(cfg, net, data, lambda z: z)
    else: s = RLStage(cfg, net, lambda images, labels: images.flatten(1).mean(1) * labels, lambda z: z.clamp(0, 1))
    s.step(1, step_generator(0, name, 1))
    return s


@pytest.mark.parametrize("name, settings", [
    ("teacher", []), ("teacher", ["compute.precision=bf16", "compute.recompute=blocks"]), ("teacher", ["compute.accumulate=2"]),
    ("distill", []), ("distill", ["compute.precision=bf16", "compute.recompute=blocks"]), ("distill", ["compute.precision=bf16", "distill.share=contexts", "distill.phi_updates=2", "compute.accumulate=2"]),
    ("rl", []), ("rl", ["compute.precision=bf16", "rl.recompute=steps", "rl.grad_steps=2"]), ("rl", ["compute.precision=bf16", "rl.recompute=none", "compute.accumulate=2"])])
def test_step(gpu, name, settings):
    "A whole step of training stays there."
    s = gpu(stage(name, settings))
    with gpu.mode:
        for i in (2, 3): values = s.step(i, Elsewhere())
    assert values and all(v.device == GPU and v.ndim == 0 for v in values.values())


def test_photographs(gpu, tmp_path):
    "RL's step through tokenizer and text reward, as on ImageNet, both small."
    from marval.stages import Photographs
    from marval.text_rewards import TextScore, architecture, build_towers
    from marval.vae import KL16
    (tmp_path/"towers.json").write_text(json.dumps(dict(embed_dim=32, vision_cfg=dict(image_size=48, patch_size=16, layers=2, width=64, head_width=32), text_cfg=dict(context_length=40, width=48, heads=3, layers=1))))
    cfg = override(preset("tiny"), ["compute.precision=bf16", "rl.recompute=steps"])
    road, arch, said = Photographs(cfg, tmp_path), architecture(str(tmp_path/"towers.json")), torch.randn(cfg.model.class_num, 32)
    road.vae = KL16(ch=32, ch_mult=(1, 1, 1, 1, 2), blocks=1).eval().requires_grad_(False)
    tower = TextScore(arch, build_towers(arch, "cpu").visual.bfloat16(), 100., checkpoint=True)
    s = RLStage(cfg, MAR(cfg.model).eval(), lambda images, labels: tower.score(images, said[labels]), road.decode)
    s.step(1, step_generator(0, "rl", 1))
    s = gpu(s)
    with gpu.mode: values = s.step(2, Elsewhere())
    assert all(v.device == GPU and v.ndim == 0 for v in values.values())


DRAWS = {"one step": (OneStep, {}, 1.), "guided chain": (TeacherChain, dict(n_steps=5), 2.9), "clipped chain": (TeacherChain, dict(n_steps=5, clip=1.), 1.)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", DRAWS)
def test_draw(gpu, case, dtype):
    "Both samplers; the prepared one's loop is what a CUDA graph captures."
    kind, settings, cfg = DRAWS[case]
    m, draw = preset("smoke").model, kind(Schedule.cosine(), **settings)
    net, draw = gpu(MAR(m).eval().requires_grad_(False)), gpu(draw)
    with gpu.mode, torch.no_grad():
        labels, orders = torch.arange(3, device=GPU), random_orders(3, m.seq_len, Elsewhere(), GPU)
        noise = draw_noise(3, m.seq_len, 4, m.token_dim, draw.rounds, Elsewhere(), GPU)
        fast = FastSampler(net, draw, 4, cfg, dtype=dtype, graph=False)
        tokens = fast._loop(labels, orders, noise)
        plain = sample(net, labels, draw, 4, cfg, orders=orders, noise=noise, check=False)
        assert tokens.shape == plain.shape == (3, m.seq_len, m.token_dim) and tokens.device == plain.device == GPU
        with pytest.raises(DataDependentOutputException): sample(net, labels, draw, 4, cfg, orders=orders, noise=noise)      # asks whether labels are in range


def test_it_can_fail(gpu):
    "A tensor that was left behind, and a number that is read; and autocast is at work."
    there, w = gpu(torch.ones(3, 3)), gpu(nn.Linear(3, 3))
    here = FakeTensor(gpu.mode, there.to("meta"), torch.device("cpu"))
    with gpu.mode:
        with pytest.raises(RuntimeError, match="device"): there + here
        with pytest.raises(DataDependentOutputException): there.sum().item()
        with autocast("bf16", "cuda"): assert w(there).dtype == torch.bfloat16
