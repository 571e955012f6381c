"What the benchmarks share: their command line, their result files, who measured what, the clock."
import argparse
import json
import math
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the package of this checkout, whether it is installed or not

import torch  # noqa: E402

from marval.config import BadInput  # noqa: E402
from marval.evaluate import run_provenance  # noqa: E402
from marval.files import ensure_folder, read_json, write_json  # noqa: E402

RESULTS = ROOT/"bench"/"results"
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
SCALES = ("smoke", "digits", "tiny", "base", "large", "huge")


# ---- the command line

class Parser(argparse.ArgumentParser):
    "Refuses in one line, with exit status 2."
    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        self.exit(2, f"error: {one_line(message)} (--help says what is accepted)\n")


def one_line(text) -> str:
    "Without line breaks and control characters."
    return re.sub(r"[\x00-\x1f\x7f]+", " ", str(text)).strip()


def whole(least: int = 1, most: int = 10**6):
    "A type for argparse: whole numbers in a range."
    def read(text):
        value = int(text) if re.fullmatch(r"[+-]?\d{1,18}", text.strip()) else None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} to {most}")
        return value
    return read


def number(above: float = 0, most: float = 1e6):
    "A type for argparse: finite numbers above one, up to another."
    def read(text):
        try: value = float(text)
        except ValueError: value = math.nan
        if not above < value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number above {above:g}, at most {most:g}")
        return value
    return read


def folder(text: str) -> Path:
    "A type for argparse: a folder that is there."
    path = Path(text)
    try: there = path.is_dir()
    except (OSError, ValueError): there = False
    if not there: raise argparse.ArgumentTypeError(f"{text!r}: no such folder; expected one that exists")
    return path


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


def end(main) -> None:
    "Run a program and exit: 0, or one line and 2 for a refusal, 1 for lack of memory, 130 for Ctrl-C."
    sys.stdout.reconfigure(errors="backslashreplace")
    status, said = 2, ""
    try:
        main()
        status = 0
    except BadInput as e: said = f"error: {e}"
    except OSError as e: said = f"error: {e.filename or 'the system'}: {e.strerror or e}"
    except (MemoryError, torch.OutOfMemoryError) as e: status, said = 1, f"error: out of memory: {e}"
    except KeyboardInterrupt: status, said = 130, "interrupted; the same command goes on from what is stored"
    if said: print(one_line(said), file=sys.stderr)
    sys.exit(status)


# ---- result files

def out_file(path: Path) -> Path:
    "A file that can be written: its folder is made. `BadInput` where that, or the name, is no good."
    path = Path(path)
    try:
        if path.name in ("", "..") or path.is_dir(): raise BadInput(f"--out {path}: a folder, not a file")
        if path.exists() and not path.is_file(): raise BadInput(f"--out {path}: no regular file")
        ensure_folder(path.parent)
    except BadInput: raise
    except (OSError, ValueError) as e: raise BadInput(f"--out {path}: {_reason(e)}") from None
    return path


def _reason(e): return getattr(e, "strerror", None) or str(e)


def out_folder(path: Path) -> Path:
    "A folder that takes files; made where it is missing. `BadInput` otherwise."
    try: return ensure_folder(path)
    except BadInput: raise
    except (OSError, ValueError) as e: raise BadInput(f"--out {path}: {_reason(e)}") from None


def stored(path: Path, **shape: type) -> dict:
    "What an earlier run left, nothing where there is no file. `BadInput` where it lacks keys of these types."
    if not path.exists(): return {}
    try: found = read_json(path)
    except RecursionError: found = None
    if isinstance(found, dict) and all(isinstance(found.get(k), kind) for k, kind in shape.items()):
        return found
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
    json.dumps(result := plain(result), allow_nan=False)
    write_json(path, result)


# ---- who measured what

def commit() -> str:
    "Of this checkout; from git, or from its folder or a file COMMIT where there is no git; or `unknown`."
    found = run_provenance()["commit"]
    return found if found != "unknown" else _commit_without_git(ROOT)


def _commit_without_git(root: Path) -> str:
    def text(path):
        try: return path.read_text(encoding="ascii", errors="replace")
        except OSError: return ""
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
