"`marval-sample`, on weights that the package has saved."
import json
import os
import shutil
import stat
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import contents, environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from marval.cli import export_cli, load, sample_cli
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
    "negative label": (["--weights", "student.safetensors", "--label", "-1"], "--labels: -1"),
    "label no number": (["--weights", "student.safetensors", "--label", "three"], "--labels: three"),
    "K > tokens": (["--weights", "student.safetensors", "--K", "17"], "K=17"),
    "K < 1": (["--weights", "student.safetensors", "--K", "0"], "--K: 0"),
    "unknown schedule": (["--weights", "student.safetensors", "--reveal", "sine"], "--reveal: sine"),
    "cfg NaN": (["--weights", "teacher.safetensors", "--cfg", "nan"], "--cfg: nan"),
    "cfg < 0": (["--weights", "teacher.safetensors", "--cfg", "-1"], "--cfg: -1"),
    "cfg of a student": (["--weights", "student.safetensors", "--cfg", "2"], "cfg=2"),
    "chain too long": (["--weights", "teacher.safetensors", "--teacher-chain", "1001"], "1001"),
    "chain of one": (["--weights", "teacher.safetensors", "--teacher-chain", "1"], "--teacher-chain: 1"),
    "no images": (["--weights", "student.safetensors", "--n", "0"], "--n: 0"),
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


def one_line(capsys, status):
    "Nothing on stdout, one printable line on stderr, or the other way round."
    out, err = capsys.readouterr()
    line, nothing = (out, err) if status == 0 else (err, out)
    assert nothing == "" and line.endswith("\n") and line[:-1].isprintable(), (status, out, err)
    return line


WORDS = st.one_of(
    st.sampled_from([
        "--weights", "--out", "--label", "--labels", "--n", "--K", "--cfg", "--seed", "--reveal", "--best-of", "--vae", "--device",
        "--teacher-chain", "--reward", "--debug=1", "--", "-", "student.safetensors", "teacher.safetensors", "cut.safetensors",
        "text.safetensors", "pipe", "folder", "grid.png", "link.png", "nowhere/grid.png", "out.pth", "/dev/null", "/dev/zero", "", ".",
        "a" * 300, "x\0y", "\udcff", "a\nb", "0", "1", "3", "9", "-1", "1.5", "nan", "inf", "1e9", "999999999999", "9" * 5000, "cosine",
        "linear", "cpu", "cuda", "auto", "[1]", "None", "True"]),
    st.text(max_size=8), st.integers(-3, 12).map(str))


@pytest.fixture(scope="module")
def odd(folder):
    "The folder of weights, with a pipe, a folder and a link that stay what they are."
    os.mkfifo(folder / "pipe")
    (folder / "folder").mkdir()
    (folder / "link.png").symlink_to(folder / "text.safetensors")
    return folder


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(WORDS, max_size=8), whole=st.booleans(), cli=st.sampled_from([sample_cli, export_cli]))
def test_any_arguments(odd, monkeypatch, capsys, words, whole, cli):
    "A result or one line, whatever the arguments are."
    monkeypatch.chdir(odd)
    names = ("grid.png", "student.safetensors") if cli is sample_cli else ("out.pth", "teacher.safetensors")
    if whole: words = ["--weights", names[1], "--out", names[0], *(["--label", "3", "--n", "2"] if cli is sample_cli else []), *words]
    if any(word in ("-h", "--help", "--debug") for word in words): return
    status = cli(words)
    assert status in (0, 2), (status, capsys.readouterr())
    one_line(capsys, status)
    assert (odd / "pipe").is_fifo() and (odd / "folder").is_dir() and (odd / "link.png").is_symlink()
    assert (odd / "text.safetensors").read_text() == "weights, honestly" and not [p for p in odd.iterdir() if p.name.startswith(".marval")]


@pytest.mark.parametrize("extra, clue", [
    (["--n", "999999999999"], "--n: 999999999999"), (["--n", "1000000"], "GiB are free"), (["--n", "1000000", "--labels", "1", "2"], "1000000 images at most"),
    (["--seed", "-1"], "--seed: -1"), (["--best-of", "1e9"], "--best-of: 1e9"), (["--labels", "1.7"], "1.7"), (["--labels", "\u0663\x1b"], "\\x1b")])
def test_what_a_machine_cannot_hold(odd, tmp_path, monkeypatch, capsys, extra, clue):
    monkeypatch.setattr("marval.cli._free_memory", lambda device: 2**31)
    assert sample_cli(["--weights", str(odd / "student.safetensors"), "--label", "3", "--out", str(tmp_path / "grid.png"), *extra]) == 2
    assert clue in one_line(capsys, 2) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "device", "in no folder", "in a file"])
def test_out_is_refused_before_anything_is_drawn(odd, tmp_path, monkeypatch, capsys, kind):
    def unwanted(*args): raise AssertionError("weights were read")
    monkeypatch.setattr("marval.cli.load", unwanted)
    monkeypatch.setattr("marval.cli.load_weights", unwanted)
    for cli, name in ((sample_cli, "grid.png"), (export_cli, "out.pth")):
        path = tmp_path / name
        if kind == "folder": path.mkdir()
        elif kind == "link": path.symlink_to(tmp_path / "elsewhere")
        elif kind == "pipe": os.mkfifo(path)
        elif kind == "in no folder": path = tmp_path / "nowhere" / name
        elif kind == "in a file": path = odd / "text.safetensors" / name
        else:
            try: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError: pytest.skip("making a device needs root")
        before = os.lstat(path).st_mode if os.path.lexists(path) else None
        argv = ["--weights", str(odd / "student.safetensors"), "--out", str(path)]
        assert cli([*argv, "--label", "3"] if cli is sample_cli else argv) == 2
        assert "cannot write" in one_line(capsys, 2)
        assert (os.lstat(path).st_mode if os.path.lexists(path) else None) == before


@pytest.mark.parametrize("content", [
    "", "[]", "null", "{}", "[" * 10**5, '{"data": 3}', '{"scale": null, "seed": "x"}', "\x00\xff", '{"seed": NaN}', "12" * 3000])
def test_best_of_with_a_broken_configuration(folder, tmp_path, capsys, content):
    shutil.copy(folder / "student.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(content)
    argv = ["--weights", str(tmp_path / "student.safetensors"), "--label", "3", "--out", str(tmp_path / "grid.png"), "--best-of", "2"]
    assert sample_cli(argv) == 2
    one_line(capsys, 2)
    (tmp_path / "config.json").write_text(json.dumps(preset("smoke").dict()))
    assert sample_cli(argv) == 2 and "judge" in one_line(capsys, 2)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    assert sample_cli(argv) == 2 and "regular" in one_line(capsys, 2)


PLAIN = """
import os, sys
from marval.cli import sample_cli
for name in sys.argv[2:]: print(sample_cli(["--weights", sys.argv[1], "--label", "3", "--n", "1", "--out", name]))
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
sys.exit(sample_cli(["--weights", sys.argv[1], "--label", "3", "--n", "1", "--out", "grid.png"]))
"""


def test_names_in_a_plain_locale_and_a_full_disk(folder, tmp_path):
    "LANG=C and ascii streams: every name is printed, escaped where it must be. A stdout that is full is an error."
    names = ["d\u00e9j\u00e0.png", "\u6570\u5b57.png", "a\nb\x1b.png", os.fsdecode(b"\xff.png")]
    done = subprocess.run([sys.executable, "-c", PLAIN, str(folder / "student.safetensors"), *names], cwd=tmp_path,
                          capture_output=True, env=environment(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii"), timeout=500)
    said, errors = done.stdout.decode("ascii"), done.stderr.decode("ascii")
    assert "Traceback" not in errors and "\x1b" not in said + errors
    assert said.count("\n") + errors.count("\n") == 2 * len(names) + 1
    assert done.returncode == 2 and "No space" in errors
    assert (tmp_path / names[0]).exists() and (tmp_path / names[2]).exists()


def test_ctrl_c_and_our_own_mistakes(folder, tmp_path, monkeypatch, capsys):
    argv = ["--weights", str(folder / "student.safetensors"), "--label", "3", "--out", str(tmp_path / "grid.png")]
    def fails(error):
        def load(*args): raise error
        return load
    monkeypatch.setattr("marval.cli.load", fails(KeyboardInterrupt()))
    assert sample_cli(argv) == 130 and "interrupted" in one_line(capsys, 130)
    monkeypatch.setattr("marval.cli.load", fails(ZeroDivisionError("a mistake\nof ours")))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sample_cli(argv) == 1
    kept = one_line(capsys, 1).split("the traceback is in ")[1].split(",")[0]
    assert "ZeroDivisionError" in Path(kept).read_text()
    with pytest.raises(ZeroDivisionError): sample_cli([*argv, "--debug"])


@pytest.mark.parametrize("weights", ["pipe", "folder", "/dev/zero", "pipe.pth", "", ".", "a" * 300, "x\0y", "\udcff", "a\x1b[31m", "nan.safetensors"])
@pytest.mark.parametrize("cli", [sample_cli, export_cli])
def test_what_is_no_file_of_weights(odd, tmp_path, monkeypatch, capsys, cli, weights):
    monkeypatch.chdir(odd)
    if weights == "pipe.pth" and not (odd / weights).exists(): os.mkfifo(odd / weights)
    if weights == "nan.safetensors":
        net = MAR(preset("smoke").model)
        net.mask_token.data[0, 0, 3] = float("nan")
        save_weights(net, odd / weights)
    argv = ["--weights", weights, "--out", str(tmp_path / "out.pth"), *(["--label", "3"] if cli is sample_cli else [])]
    assert cli(argv) == 2
    line = one_line(capsys, 2)
    assert "mask_token holds NaN" in line or weights != "nan.safetensors"
    assert not [*tmp_path.iterdir()]
