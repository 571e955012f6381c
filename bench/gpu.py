"""Everything that wants to be measured on a GPU, in one command, in order of value, until its minutes are
over.

Each item runs in a process of its own: one that fails, or takes the GPU's context with it, is recorded in
a line with the reason, and the next goes on. What it measured is stored as it comes:
DIR/gpu_DEVICE/ITEM.json, with device, dtype, batch, K, versions, commit, a digest of the code, and
threads; figures that the notebooks read go into DIR/sampling_DEVICE.json and its kin as well. The same
command goes on: what is stored for the same device and code is left as it is, what failed is tried again
at the end.

Weights are random: neither time nor memory depends on them. torch, timm, einops, safetensors and numpy
are enough. Items that need more (diffusers for ADM and DiT) say so.

examples:
    python bench/gpu.py                                   # 9 minutes on a GPU -> bench/results
    python bench/gpu.py --list
    python bench/gpu.py --only graph parity --redo parity --out /tmp/gpu
    python bench/gpu.py --device cpu --tiny --minutes 2 --out /tmp/gpu     # a trial with small networks
"""
import hashlib
import importlib.util
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (RESULTS, ROOT, BadInput, entry_point, facts, keep, number, one_line, out_folder, parser,
                    read_json, short_name, whole)

KIND = "marval-gpu"
USED = ("common", "gpu", "sampling", "distill", "rl", "memory", "baselines")
PACKAGES = ("torch", "numpy", "timm", "einops", "safetensors", "triton", "diffusers", "open_clip_torch")


class NotRun(Exception):
    "Why an item can't run here."


@dataclass(frozen=True)
class Run:
    "What an item has to know."
    device: str     # cpu | cuda
    tiny: bool      # small networks
    threads: int    # of the processor; 0 = as torch has it
    out: Path       # folder of the results
    short: str      # the device in names of files
    until: float    # time.time() at which it must have ended

    def minutes(self): return str(max(0.1, (self.until - time.time()) / 60))

    def argv(self, name, *more):
        "A script's command line, which keeps its results beside the others."
        return ["--device", self.device, "--out", str(self.out/f"{name}_{self.short}.json"), *map(str, more)]


def has(package: str) -> bool:
    "Can it be imported?"
    try: return importlib.util.find_spec(package) is not None
    except ImportError: return False


# ---- the items

class Anything:
    "Stands in for pytest where that is missing, to import a file of tests: its decorators do nothing."
    def __getattr__(self, name): return self

    def __call__(self, *args, **kwargs):
        only = args[0] if len(args) == 1 and not kwargs else None
        return only if isinstance(only, types.FunctionType) else self


def fast_tests():
    "tests/test_fast.py as a module, with pytest or without."
    if not has("pytest"): sys.modules["pytest"] = Anything()
    sys.path.insert(0, str(ROOT/"tests"))
    import test_fast
    return test_fast


class Outcomes:
    "A plugin of pytest that keeps what came of each test."
    def __init__(self): self.found = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.split("::")[-1]
        if report.when == "call" or report.outcome != "passed":
            self.found[name] = report.outcome if report.passed else f"{report.outcome}: {_last(report)}"


def _last(report): return one_line(str(report.longrepr).strip().splitlines()[-1], 300)


def graph(run):
    "The tests of CUDA graphs in tests/test_fast.py: replays against the plain loop, fp32 and bf16."
    if run.device != "cuda": raise NotRun("needs a GPU")
    about = dict(dtype=["fp32", "bf16"], batch=[3, 1, 2], K=5, size="smoke")
    if has("pytest"):
        import pytest
        outcomes = Outcomes()
        command = ["-q", "-m", "", "-k", "graph", "-p", "no:cacheprovider", str(ROOT/"tests"/"test_fast.py")]
        status = int(pytest.main(command, plugins=[outcomes]))
        passed = status == 0 and "passed" in outcomes.found.values()
        return about | dict(by="pytest", status=status, tests=outcomes.found, passed=passed)
    tests, found = fast_tests(), {}
    for case in tests.CASES:
        try:
            tests.test_graph(tests.net(), case)
            found[case] = "passed"
        except AssertionError as e: found[case] = f"failed: {one_line(e, 300)}"
    return about | dict(by="direct calls", tests=found, passed=set(found.values()) == {"passed"})


PATHS = [(path, dtype) for dtype in ("fp32", "bf16") for path in ("plain", "fast no graph", "fast")]


def parity(kind):
    def item(run):
        import sampling
        size, K, B = ("smoke", 4, 2) if run.tiny else ("base", 16, 4)
        args = sampling.arguments(["--device", run.device, "--no-decode", "--out", str(run.out/"parity"),
                                   "--kinds", kind, "--chain-steps", "3" if run.tiny else "100"])
        model = sampling.random_weights(sampling.preset(size).model, run.device)
        rows = compared(sampling, sampling.Cell(args, size, model, K, B), kind)
        wrong = [name for name, r in rows.items() if r.get("limit") and not r["distance"] < r["limit"]]
        return dict(dtype=["fp32", "bf16"], batch=B, K=K, size=size, passed=not wrong, beyond_limit=wrong,
                    rows=rows)
    item.__doc__ = f"Tokens of the {kind}: every path against plain fp32, the graph against none."
    return item


def compared(sampling, cell, kind) -> dict:
    "Distances of all paths. The chain in bf16 has no limit: what rounding does in 100 steps is to be seen."
    found = {p: sampling.Contestant(cell, kind, *p) for p in PATHS}
    for c in found.values(): c.remember()
    rows = {name: {"distance": d} for name, d in sampling.distances(list(found.values())).items()}
    for (path, dtype), c in found.items():
        if c.name in rows and (dtype == "fp32" or kind == "one step"):
            rows[c.name]["limit"] = 1e-4 if dtype == "fp32" else 0.1
        if path != "fast": continue
        eager = found["fast no graph", dtype].images
        rows[c.name]["equal_to_no_graph"] = torch.equal(c.images, eager)
        rows[c.name]["distance_to_no_graph"] = sampling.distance(c.images, eager)
    return rows


def drawn(run, size, batch, trial, *more) -> dict:
    "Cells of bench/sampling.py. `NotRun` where none of the contestants had a chance."
    import sampling
    K, scale = (4, trial) if run.tiny else (64, size)
    if run.tiny: more = ["--tiny", "--no-parts", *more, "--rounds", 1]
    found = sampling.work(run.argv("sampling", "--size", scale, "--K", K, "--batch", *batch, "--decode",
                                   "--minutes", run.minutes(), *more))
    rows = [r for cell in found["cells"].values() for r in cell["runs"].values()]
    if not any("seconds" in r for r in rows): raise NotRun(rows[0]["skipped"] if rows else "no time left")
    return dict(dtype=["fp32", "bf16"], batch=list(batch), K=K, size=scale, **found)


def one_step(size, trial="smoke"):
    def item(run):
        more = ["--kinds", "one step", "--dtype", "bf16", "fp32", "--rounds", 10]
        if not run.tiny: more.append("--no-graph")
        return drawn(run, size, [1] if run.tiny else [1, 64], trial, *more)
    item.__doc__ = f"One-step sampling at size {size}, decoded: K = 64, batch 1 and 64, every path."
    return item


def chain(size, batch=1, *more):
    def item(run):
        B = min(batch, 2) if run.tiny else batch
        return drawn(run, size, [B], "smoke", "--no-parts", *more or ["--rounds", 1])
    item.__doc__ = f"MAR's chain of 100 steps beside one step at size {size}: K = 64, batch {batch}, decoded."
    return item


def distill(size, batch, *more):
    def item(run):
        import distill as script
        argv = ["--size", size, "--batch", batch, *more]
        if run.tiny: argv = ["--size", "smoke", "--batch", 4, "--rounds", 1, "--phi-mul", 2, *more]
        found = script.work(run.argv("distill", *argv))
        return dict(dtype="bf16" if run.device == "cuda" else "fp32", batch=batch, K=64, size=size, **found)
    item.__doc__ = f"A distillation step beside a step of MAR's training: size {size}, {batch} images."
    return item


def rl(size, Ks, *more):
    def item(run):
        import rl as script
        images = "all" if has("open_clip") else "decoder"
        argv = ["--size", size, "--batch", 8, "--K", *Ks, "--images", images, *more]
        if run.tiny: argv = ["--size", "smoke", "--batch", 2, "--K", 2, 4, "--images", "none", *more]
        found = script.work(run.argv("rl", *argv))
        rows = [r for cell in found["cells"].values() for r in cell["runs"]]
        if all("skipped" in r for r in rows): raise NotRun(rows[0]["skipped"])
        return dict(dtype="bf16" if run.device == "cuda" else "fp32", batch=8, K=list(Ks), size=size,
                    reward="mean of squares" if run.tiny or images == "decoder" else "image tower", **found)
    item.__doc__ = f"Peak memory of a step of RL: size {size}, K {', '.join(map(str, Ks))}, 8 images."
    return item


def baseline(models, rounds):
    def item(run):
        import baselines
        more = ["--tiny", "--rounds", 1, "--paths", "fast"] if run.tiny else ["--rounds", rounds]
        found = baselines.work(run.argv("baselines", "--models", *models[:1 if run.tiny else None], *more))
        return dict(dtype=["fp32", "bf16"], batch=1, K=64 if models[0].startswith("MAR") else None, **found)
    item.__doc__ = f"Seconds an image of {', '.join(models)}, decoded, batch 1."
    return item


@dataclass(frozen=True)
class Item:
    name: str
    run: object     # Run -> what was measured
    seconds: float  # that it takes on an H100, guessed: it is not begun with less time left


MARVAL = ("MARVAL-B", "MARVAL-L", "MARVAL-H")
ITEMS = {i.name: i for i in (                                              # in order of value
    Item("graph", graph, 40), Item("parity", parity("one step"), 30),
    Item("sampling-base", one_step("base", "tiny"), 40), Item("sampling-large", one_step("large"), 50),
    Item("sampling-huge", one_step("huge"), 60),
    Item("chain-base", chain("base", 1, "--rounds", 2, "--no-graph"), 90),
    Item("parity-chain", parity("chain"), 50), Item("distill-base", distill("base", 32), 60),
    Item("rl-base", rl("base", (8, 16, 32, 64)), 60), Item("baselines-MARVAL", baseline(MARVAL, 3), 50),
    Item("chain-large", chain("large"), 80), Item("chain-huge", chain("huge"), 110),
    Item("rl-huge", rl("huge", (64,), "--recompute", "steps"), 60),
    Item("distill-huge", distill("huge", 8, "--recompute", "blocks"), 90),
    Item("baselines-DiT", baseline(("DiT-XL/2",), 3), 60), Item("baselines-ADM", baseline(("ADM",), 2), 90),
    Item("chain-base-256", chain("base", 256), 120))}


# ---- what is kept

def code_digest() -> str:
    "Of the package and of the scripts at work here: what decides a result, whether it is committed or not."
    files = [*sorted((ROOT/"marval").rglob("*.py")), *(ROOT/"bench"/f"{name}.py" for name in USED)]
    digest = hashlib.sha256()
    for path in files: digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version
    found = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try: found[name] = version(name)
        except PackageNotFoundError: found[name] = None
    return found


def card(device) -> dict:
    "Of the GPU: memory, capability, driver."
    if device != "cuda": return {}
    p = torch.cuda.get_device_properties(0)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try: driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired): driver = ""
    return {"memory_bytes": p.total_memory, "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count, "driver": driver or "unknown",
            "cudnn": torch.backends.cudnn.version()}


def same(old: dict, run: Run, about: dict) -> bool:
    "Was this measured on this device, by this code?"
    def who(d): return str(d.get("device", "")).split(", ")[0], d.get("code"), d.get("tiny")
    return old.get("kind") == KIND and who(old) == who(about | {"tiny": run.tiny})


def earlier(path: Path) -> dict:
    "What is stored of an item; nothing where that is missing or damaged."
    try: return read_json(path) if path.exists() else {}
    except BadInput: return {}


def perform(name: str, run: Run, path: Path, about: dict) -> None:
    "In a process of its own: run an item and store what comes of it."
    if run.threads: torch.set_num_threads(run.threads)
    record = about | {"threads": torch.get_num_threads()}
    start = time.monotonic()
    try:
        result = ITEMS[name].run(run)
        record |= {"state": "done"} | {k: result.pop(k, None) for k in ("dtype", "batch", "K")}
        record["result"] = result
    except KeyboardInterrupt: return
    except (NotRun, ModuleNotFoundError) as e: record |= {"state": "not run", "reason": one_line(e, 300)}
    except Exception as e: record |= {"state": "failed", "reason": f"{type(e).__name__}: {one_line(e, 300)}"}
    keep(path, record | {"seconds": round(time.monotonic() - start, 1)})


# ---- the command

def attempt(context, item: Item, run: Run, path: Path, about: dict) -> dict:
    "An item in a process of its own, which is killed when its time is up. Returns the record."
    about = about | {"kind": KIND, "item": item.name, "what": item.run.__doc__, "tiny": run.tiny}
    path.unlink(missing_ok=True)
    process = context.Process(target=perform, args=(item.name, run, path, about), daemon=True)
    start = time.monotonic()
    process.start()
    process.join(max(1., run.until - time.time()))
    if process.is_alive():
        process.kill()
        process.join()
        reason = "its time was up"
    else:
        code = process.exitcode
        reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    record = earlier(path)
    if not record:
        record = about | {"state": "failed", "reason": reason, "seconds": round(time.monotonic() - start, 1)}
        keep(path, record)
    return record


def servers():
    "Processes are forked from one that has imported what all of them need, and has not touched the GPU."
    paths = [str(ROOT/"bench"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sampling", "distill", "rl", "baselines"])
    return context


def arguments(argv):
    p = parser(__doc__)
    gpu = torch.cuda.is_available()
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--minutes", type=number(0, 1440), default=9, help="end within so many (default: 9)")
    p.add_argument("--only", nargs="+", choices=ITEMS, metavar="ITEM", help="these alone")
    p.add_argument("--redo", nargs="+", choices=ITEMS, default=[], metavar="ITEM", help="measure again")
    p.add_argument("--list", action="store_true", help="the items, and what is stored of them")
    p.add_argument("--tiny", action="store_true", help="small networks: a trial, whose times mean nothing")
    p.add_argument("--threads", type=whole(1, 1024), default=0, help="processor threads of torch")
    p.add_argument("--out", type=Path, default=None, metavar="DIR", help="(default: bench/results)")
    args = p.parse_args(argv)
    if args.tiny and not args.out: raise BadInput("--tiny: expected --out, to replace no real result")
    if args.device == "cuda" and not gpu: raise BadInput("--device cuda: no GPU here; expected cpu")
    if args.device == "cpu" and not args.tiny and not args.list:
        raise BadInput("--device cpu: the items are made for a GPU; expected --tiny")
    return args


def listed(run: Run, folder: Path, about: dict) -> None:
    for name, item in ITEMS.items():
        old = earlier(folder/f"{name}.json")
        state = old.get("state", "to do") if same(old, run, about) else "to do"
        print(f"{name:18} {state:8} about {item.seconds:4.0f} s  {item.run.__doc__}")


def told(record: dict) -> str:
    "A record in one line."
    if record.get("state") != "done": return f"{record.get('state')}: {record.get('reason')}"
    passed = record.get("result", {}).get("passed")
    verdict = {None: "", True: ", passed", False: ", NOT PASSED"}[passed]
    return f"done in {record.get('seconds')} s{verdict}"


def order(args, run: Run, folder: Path, about: dict):
    "Items to do: those never tried first, those that failed after them; and those that are done."
    fresh, again, done = [], [], []
    for name in args.only or ITEMS:
        old = earlier(folder/f"{name}.json")
        known = same(old, run, about) and name not in args.redo
        state = old.get("state") if known else None
        (done if state == "done" else again if state else fresh).append(name)
    return fresh + again, done


def work(argv=None) -> dict:
    "Run what is left to run; returns the records of this call."
    args = arguments(argv)
    end = time.time() + 60 * args.minutes
    about = facts() | card(args.device) | {"code": code_digest(), "versions": versions()}
    short = short_name(args.device)
    run = Run(args.device, args.tiny, args.threads, Path(args.out or RESULTS).absolute(), short, end - 2)
    folder = run.out/f"gpu_{short}"
    if args.list:
        listed(run, folder, about)
        return {}
    out_folder(folder)
    todo, done = order(args, run, folder, about)
    for name in done: print(f"{name}: stored already", flush=True)
    context, records = servers(), {}
    for name in todo:
        item, left = ITEMS[name], run.until - time.time()
        if left < (3 if args.tiny else item.seconds):
            reason = f"about {item.seconds:.0f} s needed, {left:.0f} s left"
            records[name] = {"state": "left out", "reason": reason}
        else:
            print(f"== {name}: {item.run.__doc__}", flush=True)
            records[name] = attempt(context, item, run, folder/f"{name}.json", about)
        print(f"{name}: {told(records[name])}", flush=True)
    print(f"\n{about['device']}, torch {about['torch']}, commit {about['commit']}, code {about['code']}")
    for name in args.only or ITEMS:
        print(f"{name:18} {told(records[name]) if name in records else 'stored already'}")
    print(folder)
    return records


@entry_point
def main(argv) -> int:
    work(argv)
    return 0


if __name__ == "__main__": sys.exit(main())
