"How much memory a call needs, on a GPU or a CPU."
import gc

import torch
from torch.profiler import ProfilerActivity, profile


def peak(device: str, f) -> int:
    """Bytes alive at the worst moment of f(), beyond those alive before it. A GPU's allocator says so; a
    CPU's reports every allocation and release to the profiler, and the largest running sum is the peak.
    What libraries allocate behind torch's back is not seen."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    events = (e for e in p.profiler.kineto_results.events() if e.name() == "[memory]")
    alive = most = 0
    for e in sorted(events, key=lambda e: e.start_ns()):
        alive += e.nbytes()
        most = max(most, alive)
    return most


def stored_bytes(*owners) -> int:
    "Of the distinct tensors in modules and optimisers."
    def tensors(owner):
        if isinstance(owner, torch.nn.Module): return [*owner.parameters(), *owner.buffers()]
        return [v for s in owner.state.values() for v in s.values() if torch.is_tensor(v)]
    return sum({x.data_ptr(): x.nbytes for o in owners for x in tensors(o)}.values())


def known_answer(device: str) -> float:
    """Measured over true peak of a case that can be worked out: three tensors of 4 MB alive at once, then
    two. 1 where the instrument is right."""
    def f():
        a = torch.empty(2**20, device=device)
        b = torch.empty(2**20, device=device)
        c = torch.empty(2**20, device=device)
        del a, b
        return torch.empty(2**20, device=device), c
    return peak(device, f) / (3 * 4 * 2**20)
