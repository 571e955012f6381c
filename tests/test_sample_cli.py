"`marval-sample`, on weights that the package has saved."
import subprocess
import sys
from dataclasses import asdict

import pytest
from conftest import contents, environment

from marval.cli import load, sample_cli
from marval.config import preset
from marval.mar import MAR, save_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A teacher and a student with random weights, and files that are no weights."
    import torch
    folder, cfg = tmp_path_factory.mktemp("weights"), preset("smoke")
    torch.manual_seed(0)
    net = MAR(cfg.model)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    for stage in ("teacher", "student"): save_weights(net, folder / f"{stage}.safetensors", stage=stage, **asdict(cfg.sampling))
    whole = (folder / "student.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:len(whole) // 2])
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.safetensors").write_text("weights, honestly")
    torch.save(net.state_dict(), folder / "pickle.safetensors")
    return folder


@pytest.mark.parametrize("extra, size", [([], (4, 4)), (["--K", "16"], (4, 4)), (["--reveal", "linear"], (4, 4)), (["--teacher-chain", "3", "--cfg", "2"], (4, 4)), (["--labels", "0", "1", "2"], (16, 3))])
def test_grid(folder, tmp_path, extra, size):
    from PIL import Image
    argv = ["--weights", str(folder / "student.safetensors"), "--label", "3", "--n", "16", "--out", str(tmp_path / "grid.png"), *extra]
    assert sample_cli(argv) == 0
    side = 34                                           # a digit enlarged to 32 pixels, and a gap of two
    assert Image.open(tmp_path / "grid.png").size == (size[0] * side - 2, size[1] * side - 2)
    first = (tmp_path / "grid.png").read_bytes()
    assert sample_cli(argv) == 0 and (tmp_path / "grid.png").read_bytes() == first
    assert sample_cli([*argv, "--seed", "1"]) == 0 and (tmp_path / "grid.png").read_bytes() != first


def test_as_a_process(folder, tmp_path):
    "The entry point's function, in a fresh process; and what the README promises of `load`."
    call = "import sys; from marval.cli import sample_cli; sys.exit(sample_cli())"
    done = subprocess.run([sys.executable, "-c", call, "--weights", str(folder / "student.safetensors"), "--label", "3", "--out", "grid.png"],
                          cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "8 images in grid.png\n", "")
    images = load(folder / "student.safetensors").sample([3, 3], K=8)
    assert images.shape == (2, 1, 8, 8) and 0 <= images.min() <= images.max() <= 1


BAD = {
    "no weights": ([], "--weights"),
    "no such file": (["--weights", "none.safetensors"], "none.safetensors"),
    "truncated": (["--weights", "cut.safetensors"], "cut.safetensors"),
    "empty": (["--weights", "empty.safetensors"], "empty.safetensors"),
    "text": (["--weights", "text.safetensors"], "text.safetensors"),
    "pickle": (["--weights", "pickle.safetensors"], "pickle.safetensors"),
    "label too large": (["--weights", "student.safetensors", "--label", "3", "11"], "label 11"),
    "negative label": (["--weights", "student.safetensors", "--label", "-1"], "label -1"),
    "label no number": (["--weights", "student.safetensors", "--label", "three"], "'three'"),
    "K > tokens": (["--weights", "student.safetensors", "--K", "17"], "K=17"),
    "K < 1": (["--weights", "student.safetensors", "--K", "0"], "K=0"),
    "unknown schedule": (["--weights", "student.safetensors", "--reveal", "sine"], "reveal='sine'"),
    "cfg NaN": (["--weights", "teacher.safetensors", "--cfg", "nan"], "cfg=nan"),
    "cfg < 0": (["--weights", "teacher.safetensors", "--cfg", "-1"], "cfg=-1"),
    "cfg of a student": (["--weights", "student.safetensors", "--cfg", "2"], "cfg=2"),
    "chain too long": (["--weights", "teacher.safetensors", "--teacher-chain", "1001"], "1001"),
    "chain of one": (["--weights", "teacher.safetensors", "--teacher-chain", "1"], "--teacher-chain 1"),
    "no images": (["--weights", "student.safetensors", "--n", "0"], "--n 0"),
    "unwritable": (["--weights", "student.safetensors", "--out", "student.safetensors/grid.png"], "student.safetensors/grid.png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, monkeypatch, capsys):
    argv, clue = BAD[case]
    monkeypatch.chdir(folder)
    before = contents(folder)
    for option, value in (("--label", "3"), ("--out", "grid.png")): argv = argv if option in argv else [*argv, option, value]
    assert sample_cli(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and clue in err and contents(folder) == before
