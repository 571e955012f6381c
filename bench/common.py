"What the benchmarks share: their command line, their result files, who measured what, the clock."
import argparse
import math
import os
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout, whether it is installed or not

import torch  # noqa: E402

from marval.border import BadInput, Parser, entry_point, given, one_line  # noqa: E402
from marval.config import Config, override  # noqa: E402
from marval.evaluate import run_provenance  # noqa: E402
from marval.files import ensure_folder, read_json, write_json  # noqa: E402

__all__ = ["BadInput", "Config", "entry_point", "override", "read_json"]
RESULTS = ROOT/"bench"/"results"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
SCALES = ("smoke", "digits", "tiny", "base", "large", "huge")


# ---- the command line

def parser(doc: str) -> Parser:
    "Of a script with this docstring; it refuses in one line."
    return Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def whole(least: int = 1, most: int = 10**6):
    "A type for argparse: whole numbers in a range."
    def read(text):
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,18}", text) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{given(text)}: expected a whole number from {least} to {most}")
        return value
    return read


def number(above: float = 0, most: float = 1e6):
    "A type for argparse: finite numbers above one, up to another."
    def read(text):
        try: value = float(text)
        except ValueError: value = math.nan
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"{given(text)}: expected a number in ({above:g}, {most:g}]")
        return value
    return read


def folder(text: str) -> Path:
    "A type for argparse: a folder that is there."
    try:
        if Path(text).is_dir(): return Path(text)
    except (OSError, ValueError): pass
    raise argparse.ArgumentTypeError(f"{given(text)}: no such folder")


def device_arguments(p: Parser) -> None:
    "--device, --threads and --out, for `settle`."
    gpu = torch.cuda.is_available()
    p.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    p.add_argument("--threads", type=whole(1, 1024), default=None, help="processor threads of torch")
    p.add_argument("--out", type=Path, default=None, metavar="FILE",
                   help="where results are kept (default: bench/results/NAME_DEVICE.json)")


def short_name(device: str) -> str:
    "Of a device, as in the names of result files: cpu, h100."
    if device == "cpu": return "cpu"
    words = torch.cuda.get_device_name().replace("NVIDIA", "").lower().split()
    return re.sub(r"[^a-z0-9]", "", words[0]) if words else "gpu"


def settle(args, name: str) -> bool:
    "Is a GPU measured? Sets threads and the file for results. `BadInput` where one of them can't be had."
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available(): raise BadInput("--device cuda: no GPU here; expected cpu")
    if args.threads: torch.set_num_threads(args.threads)
    args.out = out_file(args.out or RESULTS/f"{name}_{short_name(args.device)}.json")
    return gpu


def adapted(config: Config, values: dict, settings=()) -> Config:
    """A configuration with other values, by dotted name: the script's own first, which need no check, then
    those of --set. `BadInput` on a bad one of these."""
    for name, value in values.items():
        part, _, leaf = name.partition(".")
        config = replace(config, **{part: replace(getattr(config, part), **{leaf: value})})
    return override(config, list(settings)) if settings else config


# ---- result files

def out_file(path: Path) -> Path:
    "A file that can be written: its folder is made. `BadInput` where that, or the name, is no good."
    path = Path(path)
    try:
        if "\0" in str(path): raise BadInput(f"--out {one_line(path)}: not a name of a file")
        if path.name in ("", "..") or path.is_dir(): raise BadInput(f"--out {path}: a folder, not a file")
        if path.exists() and not path.is_file(): raise BadInput(f"--out {path}: no regular file")
        out_folder(path.parent)
    except BadInput: raise
    except (OSError, ValueError) as e: raise BadInput(f"--out {path}: {one_line(e)}") from None
    return path


def out_folder(path: Path) -> Path:
    "A folder that takes files; made where it is missing. `BadInput` otherwise."
    try: return ensure_folder(path)
    except BadInput: raise
    except (OSError, ValueError) as e: raise BadInput(f"--out {path}: {one_line(e)}") from None


def stored(path: Path, **shape: type) -> dict:
    "What an earlier run left, nothing where there is no file. `BadInput` where it lacks keys of these types."
    if not path.exists(): return {}
    found = read_json(path)
    if all(isinstance(found.get(k), kind) for k, kind in shape.items()): return found
    wanted = ", ".join(f"{k} ({kind.__name__})" for k, kind in shape.items())
    raise BadInput(f"{path}: no result of this benchmark; expected an object with {wanted}, or another --out")


def plain(x):
    "As JSON can hold it: numbers that are not finite become their names."
    if isinstance(x, dict): return {str(k): plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [plain(v) for v in x]
    if isinstance(x, float) and not math.isfinite(x): return str(x)
    return x if isinstance(x, (str, int, float, bool, type(None))) else str(x)


def keep(path: Path, result: dict) -> None:
    "Write a result, atomically."
    write_json(path, plain(result))


def bring(source: Path, folder: Path, *products: str) -> None:
    "Copy products of a run folder into another, each whole or not at all. `BadInput` where one is missing."
    out_folder(folder)
    for name in products:
        if (folder/name).exists(): continue
        if not (source/name).exists(): raise BadInput(f"{source} has no {name}; expected a run of the digits")
        temp = folder/f".{name}.tmp"
        if temp.is_dir(): shutil.rmtree(temp)
        (shutil.copytree if (source/name).is_dir() else shutil.copy)(source/name, temp)
        os.replace(temp, folder/name)


def stages(config: Config, names: tuple[str, ...], folder: Path) -> None:
    "Stages of a run, as `pipeline.run` does them. `KeyboardInterrupt` where a signal ended one."
    from marval.pipeline import run
    from marval.train import Interrupted
    try: run(config, names, folder)
    except Interrupted as e: raise KeyboardInterrupt from e


# ---- who measured what

def commit() -> str:
    "Of this checkout; from git, or from its folder or a file COMMIT where there is no git; or `unknown`."
    found = run_provenance()["commit"]
    return found if found != "unknown" else _commit_without_git(ROOT)


def _commit_without_git(root: Path) -> str:
    def text(path):
        try: return path.read_text(encoding="ascii", errors="replace")
        except (OSError, ValueError): return ""
    head = text(root/".git"/"HEAD").strip()
    ref = head.removeprefix("ref: ")
    packed = [line for line in text(root/".git"/"packed-refs").splitlines() if line.endswith(" " + ref)]
    loose = text(root/".git"/ref) if ref else ""
    for found in (text(root/"COMMIT"), head, loose, *packed):
        first = found.split()[0] if found.split() else ""
        if re.fullmatch(r"[0-9a-f]{7,64}", first): return first[:12]
    return "unknown"


def facts() -> dict:
    "Device, torch, commit, threads: what every result carries."
    return run_provenance() | {"commit": commit(), "threads": torch.get_num_threads()}


# ---- the clock

def wait(device: str) -> None:
    if device == "cuda": torch.cuda.synchronize()


def clock(device: str, f) -> dict:
    "Seconds of one call: on the wall, and of the processor."
    wait(device)
    wall, cpu = time.perf_counter(), time.process_time()
    f()
    wait(device)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
