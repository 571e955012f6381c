"`import marval` takes torch and einops (and numpy) alone; all else is imported where it is used."
import configparser
import re
import subprocess
import sys

from conftest import ROOT, environment

SCRIPT = """
import importlib, importlib.abc, pkgutil, sys
blocked = set(sys.argv[1:])
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked: raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Block())
import torch
import marval
names = [m.name for m in pkgutil.iter_modules(marval.__path__) if not m.name.startswith("_")]
for name in names: importlib.import_module(f"marval.{name}")
print(*names)
"""
MODULE_NAMES = {"scikit-learn": "sklearn", "torch-fidelity": "torch_fidelity", "open_clip_torch": "open_clip"}


def test_heavy_parts_are_optional():
    ini = configparser.ConfigParser()
    ini.read(ROOT / "settings.ini")
    wanted = [re.split(r"[<>=]", r)[0] for r in (ini["DEFAULT"]["requirements"] + " " + ini["DEFAULT"]["dev_requirements"]).split()]
    blocked = {MODULE_NAMES.get(r, r) for r in wanted} - {"torch", "einops", "numpy"} | {"PIL", "scipy", "IPython", "timm"}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *sorted(blocked)], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert {"config", "mar", "train", "rewards", "evaluate", "pipeline", "cli"} <= set(done.stdout.split())


def test_asking_about_a_folder_needs_no_torch():
    "The launcher answers at once, because pipeline imports torch only where a stage is run."
    script = "import sys, marval.pipeline as p; from marval.config import preset; p.check(preset('smoke'), p.select('all', preset('smoke')), 'no/such/folder'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.strip() == "False"
