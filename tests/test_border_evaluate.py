"What marval-evaluate reads from others: whatever is given ends in a result or in one line."
import copy
import io
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

FUZZ = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

EVALUATION = dict(kind="marval-evaluate", device="NVIDIA A100", commit="0123456789ab", n=50000, fid=3.3,
                  is_mean=200.0, n_reference=None, extractor=dict(name="inception-v3-compat"),
                  network=dict(scale="base"), model=None,
                  images=dict(kind="network", path="runs/student.safetensors", stage="student", K=64, cfg=1.2,
                              cfg_schedule="constant", chain_steps=0, classes=1000),
                  reference=dict(path="adm_in256_stats.npz", statistics=True),
                  scores=dict(clip=dict(mean=29.0, standard_error=0.1, towers="ViT-L-14", prompt="a {}")),
                  time=dict(seconds=1.0, cpu_seconds=1.0, batch=1, dtype="float32", threads=1))
OF_MODEL = dict(fid=3.0, is_mean=200.0, n=9, extractor=dict(name="x"), seconds_per_image={"1": 0.5})
RUN = dict(device="CPU", commit="01", scale="base", chain_steps=100, cfg=1.2, K=64, cfg_schedule="linear",
           reference="r.npz", teacher=OF_MODEL, student=OF_MODEL, student_rl=OF_MODEL)
BASELINES = dict(kind="marval-baselines", runs=[dict(model="ADM", path="diffusers", sampler="chain",
                                                     seconds=9.0, cpu_seconds=9.0, measured="whole images",
                                                     steps=250, cfg=None, K=None, batch=1, dtype="fp32",
                                                     threads=1, decoded=True, device="CPU", commit="01",
                                                     weights="random", tiny=False)])
SAMPLING = dict(provenance=dict(device="CPU"), cells=dict(one=dict(
    size="base", K=64, cfg=2.9, chain_steps=100, decode=True, threads=1, commit="01", batch=1,
    runs={"chain, plain, fp32": dict(seconds=9.0, cpu_seconds=9.0)})))
RESULTS = dict(evaluation=EVALUATION, run=RUN, baselines=BASELINES, sampling=SAMPLING)


def paths(value, at=()):
    "Every place in a nested value."
    if at: yield at
    children = value.items() if isinstance(value,
                                           dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in children: yield from paths(v, (*at, k))


def replaced(value, at, new):
    "A copy with another value in one place."
    value = copy.deepcopy(value)
    inner = value
    for k in at[:-1]: inner = inner[k]
    inner[at[-1]] = new
    return value


def tables(capsys, *places):
    "Exit status, output and error of `--tables`; no traceback, at most one line of error."
    from marval.evaluate_cli import evaluate_cli
    status = evaluate_cli(["--tables", *map(str, places)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "error: unexpected" not in err and status in (0, 2)
    assert (err.count("\n"), out) == (1, "") if status else err == ""
    return status, out, err


def test_tables_of_true_results(tmp_path, capsys):
    "All four kinds are read, so that what follows damages something."
    from marval.tables import read_results
    for name, content in RESULTS.items(): (tmp_path / f"{name}.json").write_text(json.dumps(content))
    count = {name: sum(m.file.endswith(f"{name}.json") for m in read_results([tmp_path])) for name in RESULTS}
    assert count == dict(evaluation=4, run=9, baselines=1, sampling=1)
    assert tables(capsys, tmp_path)[0] == 0


NO_JSON = dict(binary=b"\x00\xff\xfe\x80", empty=b"", depth=b'{"a":' * 100_000, deep_list=b"[" * 100_000,
               cut=b'{"fid": 3', nan=b'{"fid": NaN, "n": Infinity}', list=b"[1, 2]", null=b"null",
               number=b"3", digits=b'{"n": ' + b"9" * 5000 + b"}")
OTHER = dict(empty={}, settings={"model.width": 64},
             benchmark=dict(provenance={}, cells={"a": {"seconds": "fast"}}),
             cells_null=dict(provenance=1, cells=None), cells_list=dict(provenance=1, cells=[[]]),
             runs=dict(kind=[], runs={}))


@pytest.mark.parametrize("name", NO_JSON)
def test_no_json(name, tmp_path, capsys):
    "In a folder it is passed over with a line, by its name it is refused."
    (tmp_path / "x.json").write_bytes(NO_JSON[name])
    status, out, _ = tables(capsys, tmp_path)
    assert status == 0 and out.count("passed over: ") == 1 and "x.json" in out and "0 of 41" in out
    status, _, err = tables(capsys, tmp_path / "x.json")
    assert status == 2 and "x.json" in err


@pytest.mark.parametrize("name", OTHER)
def test_other_json(name, tmp_path, capsys):
    (tmp_path / "x.json").write_text(json.dumps(OTHER[name]))
    for place in (tmp_path, tmp_path / "x.json"):
        status, out, _ = tables(capsys, place)
        assert status == 0 and "passed over" not in out


def test_no_regular_files(tmp_path, capsys):
    "A pipe, a device, a folder and a dangling link with the name of a result; names that are hardly names."
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "gone.json").symlink_to("nowhere")
    (tmp_path / os.fsdecode(b"\xff\x1b[2J.json")).write_text("{")
    status, out, _ = tables(capsys, tmp_path)
    assert status == 0 and out.count("passed over: ") == 5 and "\x1b" not in out and out.isascii()
    odd = ("", "a" * 300, tmp_path / "nowhere", tmp_path / "pipe.json", "/dev/zero", "\udcff", "a\0b")
    for place in odd: assert tables(capsys, place)[0] == 2


WRONG = dict(null=(("n",), None), text=(("n",), "5"), list=(("images",), []), inf=(("fid",), 1e400),
             nan=(("is_mean",), float("nan")), huge=(("n",), 10**30), control=(("device",), "CPU\x1b[2J"),
             lines=(("commit",), "a\nb"), long=(("commit",), "a" * 10**5),
             score=(("scores", "clip", "mean"), None), scores=(("scores",), 7),
             seconds=(("time", "seconds"), -1.0), flag=(("n",), True), surrogate=(("device",), "\ud800"),
             classes=(("images", "classes"), 0.5))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_field(case, tmp_path, capsys):
    "A result of ours with one wrong value is refused, in a folder too."
    (tmp_path / "x.json").write_text(json.dumps(replaced(EVALUATION, *WRONG[case])))
    status, out, err = tables(capsys, tmp_path)
    if case in ("inf", "nan"): assert status == 0 and "passed over" in out          # no JSON, by the standard
    else: assert status == 2 and "x.json" in err and "expected" in err and len(err) < 2500


def json_values():
    "Any JSON, with what Python's writer lets through."
    plain = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
                      st.sampled_from([10**400, -1, 1e308, "9" * 4300, "\ud800", "NaN", "../../x", "|",
                                       "<b>"]))
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@settings(max_examples=80, **FUZZ)
@given(st.data())
def test_fuzzed_results(tmp_path_factory, data):
    "One to three values of a true result replaced by anything: a table without NaN, or one line."
    from marval.border import BadInput
    from marval.tables import fill, left_out, read_results, render
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    content = RESULTS[data.draw(st.sampled_from(sorted(RESULTS)))]
    for _ in range(data.draw(st.integers(1, 3))):
        content = replaced(content, data.draw(st.sampled_from(sorted(paths(content), key=str))),
                           data.draw(json_values()))
    (folder / "x.json").write_text(json.dumps(content))
    told = []
    try: found = read_results([folder], told.append)
    except BadInput as e:
        assert str(e).isprintable()
        return
    assert all(line.isprintable() for line in told)
    assert all(abs(m.value) < float("inf") for m in found)
    filled = fill(found)
    for text in (render(filled), render(filled, markdown=True)): assert "traceback" not in text.lower()
    assert all(line.isprintable() for line in left_out(found))


# What is compared with, and what is looked at

def header(shape, descr="<f8"):
    "The beginning of an .npy file that claims a shape."
    f = io.BytesIO()
    np.lib.format.write_array_header_1_0(f, dict(descr=descr, fortran_order=False, shape=shape))
    return f.getvalue()


def archive(path, compression=zipfile.ZIP_STORED, **entries):
    "An .npz of raw entries."
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, content in entries.items(): z.writestr(f"{name}.npy", content)


def write_reference(path, case):
    "A file that is no reference, by name."
    eye, mu = np.eye(8), np.zeros(8)
    arrays = dict(shape=dict(mu=mu, sigma=np.eye(7)), crooked=dict(mu=mu, sigma=np.triu(np.ones((8, 8)))),
                  negative=dict(mu=mu, sigma=-eye), nan=dict(mu=mu + np.nan, sigma=eye),
                  inf=dict(mu=mu, sigma=eye + np.inf), huge=dict(mu=mu + 1e200, sigma=eye),
                  half=dict(mu=mu, sigma=eye.astype(np.float16)),
                  ints=dict(mu=mu.astype(int), sigma=eye.astype(int)), complex=dict(mu=mu * 1j, sigma=eye),
                  scalar=dict(mu=1.0, sigma=1.0), empty=dict(mu=np.zeros(0), sigma=np.zeros((0, 0))),
                  size=dict(mu=np.zeros(5), sigma=np.eye(5)), lonely=dict(mu=mu),
                  objects=dict(mu=np.array([Path("x")] * 8), sigma=eye),
                  text=dict(mu=np.array(["a"] * 8), sigma=eye),
                  structured=dict(mu=np.zeros(8, dtype=[("a", "f8")]), sigma=eye),
                  pixels=dict(arr_0=np.zeros((9, 8, 8, 3))), grey=dict(arr_0=np.zeros((9, 8, 8), np.uint8)),
                  no_pixels=dict(arr_0=np.zeros((9, 0, 8, 3), np.uint8)),
                  few=dict(arr_0=np.zeros((4, 8, 8, 3), np.uint8)), others=dict(labels=mu))
    bombs = dict(claims_much=dict(mu=header((10**12,)), sigma=header((10**6, 10**6))),
                 many=dict(arr_0=header((10**9, 256, 256, 3), "|u1")),
                 negative_shape=dict(mu=header((-8,)), sigma=header((-8, -8))),
                 no_header=dict(mu=b"\x93NUMPY"), cut=dict(mu=header((8,)) + bytes(9)),
                 code=dict(mu=b"\x93NUMPY\x01\x00\x2e\x00"
                           + b"__import__('os').system('touch pwned')".ljust(45) + b"\n"))
    if case in arrays: np.savez(path, **arrays[case])
    elif case in bombs: archive(path, **bombs[case])
    elif case == "deflated":                            # 40 MB in 40 kB, all of it there, but F is too large
        archive(path, zipfile.ZIP_DEFLATED, mu=header((5 * 10**6,)) + bytes(4 * 10**7), sigma=header((1, 1))
                + bytes(8))
    elif case == "pickle": path.write_bytes(pickle.dumps(dict(mu=1)))
    elif case == "fifo": os.mkfifo(path)
    elif case == "zero": path.symlink_to("/dev/zero")
    elif case == "folder": path.mkdir()
    elif case == "damaged":
        np.savez(path, mu=mu, sigma=eye)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)


REFERENCES = """shape crooked negative nan inf huge half ints complex scalar empty size lonely objects text
structured pixels grey no_pixels few others claims_much many negative_shape no_header cut code deflated pickle
fifo zero folder damaged""".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "Images and a reference of them, and a small extractor."
    from test_fidelity import register
    register()
    folder = tmp_path_factory.mktemp("border")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "images.npz", pixels)
    (folder / "png").mkdir()
    for i, x in enumerate(pixels): Image.fromarray(x).save(folder / "png" / f"{i}.png")
    return folder


def evaluated(capsys, *argv):
    "Exit status, output and error; a refusal is one line of the command's, no traceback."
    from marval.evaluate_cli import evaluate_cli
    status = evaluate_cli([*map(str, argv), "--extractor", "small", "--device", "cpu"])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "error:" in line]
    assert status in (0, 2) and "Traceback" not in err and len(said) == (status == 2)
    assert (status == 0 or not out)
    return status, out, said[0] if said else err


@pytest.mark.parametrize("case", REFERENCES)
def test_reference(case, place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_reference(tmp_path / "r.npz", case)
    status, _, said = evaluated(capsys, "--images", place / "images.npz", "--reference", tmp_path / "r.npz")
    assert status == 2 and "expected" in said and not (tmp_path / "pwned").exists()
    assert "r.npz" in said or case in ("size", "few", "grey", "pixels", "no_pixels")


def spoil(folder, case):
    "One thing among the pictures that is no picture of their size."
    path = folder / "5x.png"
    if case == "fifo": os.mkfifo(path)
    elif case == "zero": path.symlink_to("/dev/zero")
    elif case == "gone": path.symlink_to("nowhere")
    elif case == "folder": path.mkdir()
    elif case == "text": path.write_text("no picture")
    elif case == "cut": path.write_bytes((folder / "0.png").read_bytes()[:60])
    elif case == "size": Image.new("RGB", (8, 9)).save(path)
    elif case == "bomb": path.write_bytes(PNG_OF_MANY)
    elif case == "name": (folder / os.fsdecode(b"\xff\x1b.png")).write_text("no picture")


PNG_OF_MANY = (b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (10**5).to_bytes(4, "big") * 2
               + b"\x08\x02\x00\x00\x00" + zlib.crc32(b"IHDR" + (10**5).to_bytes(4, "big") * 2
                                                      + b"\x08\x02\x00\x00\x00").to_bytes(4, "big"))


@pytest.mark.parametrize("case", ("fifo", "zero", "gone", "folder", "text", "cut", "size", "bomb", "name"))
def test_folder(case, place, tmp_path, capsys):
    shutil.copytree(place / "png", tmp_path / "png")
    spoil(tmp_path / "png", case)
    status, _, said = evaluated(capsys, "--images", tmp_path / "png", "--reference", place / "images.npz")
    assert status == 2 and ("5x.png" in said or case == "name")


def test_folder_of_odd_names(place, tmp_path, capsys):
    "Names that are no UTF-8 are names."
    for i in range(6): shutil.copy(place / "png" / f"{i}.png", tmp_path / os.fsdecode(b"\xff%d.png" % i))
    assert evaluated(capsys, "--images", tmp_path, "--reference", place / "images.npz")[0] == 0


@pytest.mark.parametrize("n, score", ((4, None), (5, False), (9, False), (10, True)))
def test_few_images(n, score, place, tmp_path, capsys):
    "Five are enough for all but the Inception score, which takes ten; no figure is nan."
    np.savez(tmp_path / "few.npz", np.load(place / "images.npz")["arr_0"][:n])
    status, _, said = evaluated(capsys, "--images", tmp_path / "few.npz", "--reference", place / "images.npz",
                                "--out", tmp_path / "r.json")
    if score is None: assert status == 2 and "4 images; expected 5 to" in said
    else:
        result = json.loads((tmp_path / "r.json").read_text())
        assert status == 0 and (result["is_mean"] is not None) == score
        assert all(result[k] is not None for k in ("fid", "kid", "precision"))
        assert any("No Inception score of" in w for w in result["warnings"]) != score
        assert tables(capsys, tmp_path)[0] == 0


OUTS = {"/dev/null.json": "/dev", "folder.json": "folder", "link.json": "link", "pipe.json": "pipe",
        "/proc/x.json": "/proc", "x.txt": "json", "a" * 300 + ".json": "long",
        "images.npz/x.json": "Not a directory"}


@pytest.mark.parametrize("out", OUTS)
def test_out(out, place, tmp_path, capsys, monkeypatch):
    "What can't be written is refused before anything is measured."
    from marval import evaluate_cli
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "images.npz", tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe.json")
    monkeypatch.setattr(evaluate_cli, "fidelity", lambda *_: pytest.fail("measured"))
    if out == "/dev/null.json" and os.access("/dev", os.W_OK): out = "/proc/null.json"
    status, _, said = evaluated(capsys, "--images", "images.npz", "--reference", "images.npz", "--out", out)
    assert status == 2 and not (tmp_path / "elsewhere").exists()


def test_kept_features(place, tmp_path, capsys):
    "A flipped bit, a foreign file and one that is none among the kept features: named, and made again."
    argv = ("--images", place / "images.npz", "--reference", place / "png", "--batch", "5", "--out",
            tmp_path / "r.json")
    assert evaluated(capsys, *argv)[0] == 0
    first = json.loads((tmp_path / "r.json").read_text())
    kept = sorted((tmp_path / "features").rglob("*.safetensors"))
    content = bytearray(kept[0].read_bytes())
    content[-1] ^= 1
    kept[0].write_bytes(content)
    kept[1].write_bytes(kept[3].read_bytes())
    kept[2].write_bytes(b"{}")
    status, _, said = evaluated(capsys, *argv)
    again = json.loads((tmp_path / "r.json").read_text())
    assert status == 0 and said.count("made again") == 3 and all(path.name in said for path in kept[:3])
    assert again["fid"] == pytest.approx(first["fid"],
                                         rel=1e-4) and again["kid"] == pytest.approx(first["kid"], rel=1e-4)
    assert "made again" not in evaluated(capsys, *argv)[2]


class Touch:
    "A pickle that would run code."
    def __reduce__(self): return os.system, ("touch pwned",)


@pytest.mark.parametrize("case", ("code", "list", "numbers", "names", "nan", "bomb", "text", "fifo", "zero",
                                  "folder", "shapes"))
def test_inception(case, tmp_path, monkeypatch):
    "What is no Inception is refused in one line, and nothing in it is run or downloaded."
    from torch_fidelity import feature_extractor_inceptionv3 as module
    from marval.border import BadInput
    from marval.features import extractor
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "load_state_dict_from_url", lambda *_, **__: pytest.fail("downloaded"))
    path = tmp_path / "inception.pth"
    content = dict(code=Touch(), list=[torch.zeros(2)], numbers=dict(a=1), names={1: torch.zeros(2)},
                   nan=dict(a=torch.tensor(float("nan"))), shapes={"fc.weight": torch.zeros(1).expand(2**40)})
    if case in content: torch.save(content[case], path)
    elif case == "bomb":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("archive/data/0", bytes(2**26))
        monkeypatch.setattr("marval.arrays.machine_memory", lambda: 1 << 25)
    elif case == "text": path.write_text("weights")
    elif case == "fifo": os.mkfifo(path)
    elif case == "zero": path.symlink_to("/dev/zero")
    elif case == "folder": path.mkdir()
    with pytest.raises(BadInput, match="expected") as refusal: extractor(weights=path)
    assert str(refusal.value).isprintable() and "inception.pth" in str(refusal.value)
    assert not (tmp_path / "pwned").exists()


def test_inception_is_read_once(place, tmp_path, monkeypatch):
    "torch-fidelity gets what was checked, even if the file is another one by then."
    from marval import features
    from torch_fidelity import feature_extractor_inceptionv3 as module
    path, loaded = tmp_path / "inception.pth", []
    torch.save(dict(a=torch.ones(2)), path)
    class Swapped(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            path.write_bytes(b"swapped")
            loaded.append(torch.load(feature_extractor_weights_path, weights_only=False))
    Swapped.__module__ = module.__name__
    features._built(Swapped, "x", ["a"], path)
    assert torch.equal(loaded[0]["a"], torch.ones(2))


@pytest.mark.parametrize("images", (torch.zeros(2, 3, 4, 4) - 1, torch.full((2, 3, 4, 4), 200.0),
                                    torch.full((2, 3, 4, 4), float("inf")),
                                    torch.zeros(2, 3, 4, 4, dtype=torch.long), torch.zeros(2, 2, 4, 4),
                                    torch.zeros(3, 4, 4), torch.zeros(0, 3, 4, 4), torch.zeros(2, 3, 0, 4),
                                    torch.zeros(2, 3, 4, 4, dtype=torch.bool)))
def test_images(images):
    from marval.border import BadInput
    from marval.images import to_bytes
    with pytest.raises(BadInput, match="expected"): to_bytes(images)


@pytest.mark.parametrize("out", (torch.full((5, 8), float("nan")), torch.zeros(4, 8), torch.zeros(5),
                                 torch.zeros(5, 8, 1, 1)))
def test_extractor_gives(out):
    "Features that are none, or not one row each, are refused when they come, not when they are used."
    from marval.border import BadInput
    from marval.features import extract, extractor
    from marval.images import array_images
    class Odd(torch.nn.Module):
        def forward(self, x): return out
    with pytest.raises(BadInput, match="Odd gives"):
        extract(array_images(np.zeros((5, 8, 8, 3), np.uint8)), extractor(Odd()))


def test_memory(place, capsys, monkeypatch):
    "What this machine can't hold is refused before it is drawn."
    monkeypatch.setattr("marval.arrays.machine_memory", lambda: 10**5)
    status, _, said = evaluated(capsys, "--images", place / "png", "--reference", place / "png")
    assert status == 2 and "GB of memory" in said


# The command line

ARGUMENTS = """--images --weights --tables --reference --inception --download --extractor --out --cache --size
--batch --device --model --vae --n --K --reveal --cfg --cfg-schedule --teacher-chain --seed --time --reward
--reward-weights --reward-model --prompt --names""".split()
ODD = ["", " ", ".", "/", "..", "~nobody", "a" * 300, "images.npz", "png", "/dev/zero", "/dev/null", "pipe",
       "a\0b", "\udcff", "\x1b[2J", "x.json", "nan", "inf", "-1", "0", "5", "1e999", "999999999999",
       "9" * 5000, "1.7", "cpu", "cuda", "small", "clip", "{}", "cosine", "linear", "ADM",
       "student.safetensors"]


@settings(max_examples=80, **FUZZ)
@given(st.lists(st.tuples(st.sampled_from(ARGUMENTS), st.sampled_from(ODD) | st.text(max_size=8)),
                max_size=6), st.booleans())
def test_fuzzed_arguments(place, capsys, arguments, sensible):
    "Any argument list ends in a result or in one line."
    from marval.evaluate_cli import evaluate_cli
    before, argv = os.getcwd(), [word for pair in arguments
                                 for word in (pair if pair[0] != "--download" else ())]
    if sensible:
        argv = ["--images", "images.npz", "--reference", "images.npz", "--extractor", "small", "--device",
                "cpu", *argv]
    os.chdir(place)
    try:
        if not os.path.exists("pipe"): os.mkfifo("pipe")
        status = evaluate_cli(argv)
    except SystemExit as e: status = e.code             # --help
    finally: os.chdir(before)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert status in (0, 2) and "Traceback" not in err and len(errors) == (status == 2), (argv, err)


@pytest.mark.parametrize("argv", (["--n", "999999999999"], ["--n", "4"], ["--batch", "999999"],
                                  ["--K", "1e5"], ["--cfg", "nan"], ["--cfg", "-1"], ["--seed", "-1"],
                                  ["--size", "7"], ["--time", "0"], ["--teacher-chain", "1"],
                                  ["--prompt", "a\n{}"], ["--reveal", "sideways"]))
def test_ranges(argv, capsys):
    "Said before anything is loaded."
    from marval.evaluate_cli import evaluate_cli
    assert evaluate_cli(["--weights", "none", "--reference", "none", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and argv[0] in err and "--help" in err


def test_as_a_process(place, tmp_path):
    """In the C locale: a refusal is a line; what nobody expected is a line and a file, or a traceback with
    --debug."""
    script = """
import sys
from marval import evaluate_cli as e
argv = sys.argv[1:]
print(e.evaluate_cli([*argv, "--extractor", "vgg16"]))
e._evaluate = lambda *_: 1 / 0
print(e.evaluate_cli(argv))
e.evaluate_cli([*argv, "--debug"])
"""
    argv = ["--images", str(place / "images.npz"), "--reference", "räuber.npz"]
    env = environment(LANG="C", LC_ALL="C", PYTHONIOENCODING="ascii", TMPDIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=600,
                          env=env)
    refused, unexpected, *traceback = done.stderr.splitlines()
    assert done.stdout == "2\n1\n" and done.returncode == 1 and refused.startswith("error: ")
    assert "ZeroDivisionError" in unexpected and "--debug" in unexpected
    assert "ZeroDivisionError" in next(tmp_path.glob("marval-error-*")).read_text()
    assert traceback[0].startswith("Traceback") and "ZeroDivisionError" in traceback[-1]


PLACES = ("pipe", "pipe.npz", "pipe.safetensors", "zero", "zero.npz", "folder.npz", "empty", "text.npz",
          "text", "", "a" * 300, "a" * 300 + ".npz", "~nobody", "/dev/zero", "/dev/null", "a\0b", "\udcff",
          "a\nb.npz", "nowhere")


@pytest.mark.parametrize("option", ("--images", "--weights", "--reference", "--inception", "--cache"))
@pytest.mark.parametrize("name", PLACES)
def test_places(option, name, place, tmp_path, capsys, monkeypatch):
    "What is no file or folder of the kind is refused in one line; no pipe is waited for."
    monkeypatch.chdir(tmp_path)
    for pipe in ("pipe", "pipe.npz", "pipe.safetensors"): os.mkfifo(pipe)
    for link in ("zero", "zero.npz"): os.symlink("/dev/zero", link)
    for folder in ("folder.npz", "empty"): os.mkdir(folder)
    for file in ("text.npz", "text"): Path(file).write_text("a text")
    argv = {"--images": place / "images.npz", "--reference": place / "images.npz"}
    if option == "--weights": del argv["--images"]
    words = [str(word) for pair in (argv | {option: name}).items() for word in pair]
    status, _, said = evaluated(capsys, *words)
    writable = option == "--cache" and name in ("folder.npz", "empty", "~nobody", "nowhere")
    assert (status == 0) if writable else (status == 2 and "expected" in said)


@pytest.mark.parametrize("variables", (dict(RANK="abc"), dict(RANK="0"),
                                       dict(RANK="abc", WORLD_SIZE="1", LOCAL_RANK="0"),
                                       dict(RANK="-1", WORLD_SIZE="1", LOCAL_RANK="0")))
def test_ranks(variables, place, capsys, monkeypatch):
    for k, v in variables.items(): monkeypatch.setenv(k, v)
    status, _, said = evaluated(capsys, "--images", place / "images.npz", "--reference", place / "images.npz")
    assert status == 2 and "expected" in said


# Digits: figures, metrics.json, the report

@pytest.fixture(scope="module")
def digit_judges(tmp_path_factory):
    from marval.data import load_digits_data
    from marval.rewards import load_judges, train_judges
    folder = tmp_path_factory.mktemp("judges")
    with torch.random.fork_rng(): train_judges(*load_digits_data(), folder, iterations=5, clip_iterations=0)
    return load_judges(folder)


def test_digits_of_nan(digit_judges):
    "A diverged network: curves show nan, no invented figure; the final figures are refused."
    from marval.border import BadInput
    from marval.data import load_digits_data
    from marval.evaluate import accuracy, coverage, features, frechet, measure
    images, labels = load_digits_data()
    images, labels, net = images[:40], labels[:40], digit_judges.heldout_net
    bad = images.clone()
    bad[3] = float("nan")
    assert math.isnan(frechet(bad, images, net)) and features(net, bad)[3].isnan().all()
    assert features(net, bad)[4].isfinite().all()
    assert coverage(features(net, bad * math.nan), features(net, images)) == 0
    assert accuracy(bad * math.nan, labels, net) == 0
    with pytest.raises(BadInput, match="nan"): measure(bad, labels, digit_judges, images, labels)
    with pytest.raises(BadInput, match="expected"):
        measure(images[:3], labels[:3], digit_judges, images, labels)


def test_least_images(digit_judges):
    "The least number that is accepted gives finite figures; one less is refused before anything is drawn."
    from marval.border import BadInput
    from marval.config import preset
    from marval.data import load_digits_data
    from marval.evaluate import check_evaluation, least_images, measure
    n, (images, labels) = least_images(10), load_digits_data()
    pick = torch.tensor([(labels == i % 10).nonzero()[i // 10, 0] for i in range(n)])
    assert all(math.isfinite(v) for v in measure(images[pick], labels[pick], digit_judges, images,
                                                 labels).values())
    asked = lambda scale, n: replace(preset(scale), evaluate=replace(preset(scale).evaluate, n=n))
    check_evaluation(asked("smoke", n))
    check_evaluation(asked("base", 1))                   # nothing is measured without a reference
    for wrong in (1, n - 1, 10**7):
        with pytest.raises(BadInput, match="evaluate.n"): check_evaluation(asked("smoke", wrong))


METRICS = dict(device="CPU", torch="2", commit="01", seed=0, scale="digits", K=8, cfg=1.2, chain_steps=100,
               n=20, seconds=dict(rl=1.0), speedup={"1": 2.0, "64": 2.0}, reward=dict(before=-1.0, after=0.0),
               heldout_reward=dict(before=-1.0, after=0.0), rl_stopped="<script>alert(1)</script>")
FIGURES = dict.fromkeys("fd kid precision recall accuracy coverage diversity reward heldout_reward".split(),
                        0.5)
for name in ("teacher", "one_step_init", "student", "student_rl"):
    METRICS[name] = FIGURES | dict(seconds_per_image={"1": 0.5, "64": 0.1})
METRICS["real"] = FIGURES


def run_folder(folder, metrics, log=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    Image.new("L", (4, 4)).save(folder / "samples.png")
    for stage in ("teacher", "rl"):
        (folder / "state" / stage).mkdir(parents=True, exist_ok=True)
        (folder / "state" / stage / "log.jsonl").write_text(log)
    return folder


LOG = """{"step": 1, "loss": 0.5, "score": 1}
[1, 2]
{"step": "x", "loss": {}}
{"step": 2, "loss": NaN}
{"step": 3, "loss": 1e400}
{"step": 4, "score": 2, "fd": "<b>"}
null
{"ste"""


def test_report(tmp_path):
    "Of a hostile folder: numbers alone are drawn, text is no markup, a log that is none is passed over."
    from marval.report import write_report
    odd = {"<img src=x>": "<b>\x1b[2J</b>\ud800", "rl.guard": ["<i>"], "x": None}
    run_folder(tmp_path, METRICS | {"<u>": "<u>", "seconds": {"<a>": 1.0}}, LOG)
    (tmp_path / "state" / "distill").mkdir()
    os.mkfifo(tmp_path / "state" / "distill" / "log.jsonl")
    write_report(tmp_path, odd)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|b|i|u|a|img src=x)>",
                         page) and "\x1b" not in page and "alert(1)&lt;/script&gt;" in page
    assert page.count("<img") == page.count('<img alt="" src="data:image/png;base64,') == 3


@pytest.mark.parametrize("damage", ("metrics.json", "samples.png", "missing", "no picture"))
def test_report_without(damage, tmp_path):
    from marval.border import BadInput
    from marval.report import write_report
    run_folder(tmp_path, {k: v for k, v in METRICS.items() if k != "real"} if damage == "missing"
               else METRICS)
    if damage == "no picture": (tmp_path / "samples.png").write_text("<svg onload=alert(1)>")
    elif damage != "missing": (tmp_path / damage).unlink()
    with pytest.raises(BadInput) as refusal: write_report(tmp_path, {})
    assert str(refusal.value).isprintable() and not (tmp_path / "report.html").exists()


@settings(max_examples=60, **FUZZ)
@given(st.data())
def test_fuzzed_metrics(data):
    "metrics.json with anything in one or two places: a table of finite numbers, or one line."
    from marval.border import BadInput
    from marval.evaluate import check_metrics, metrics_table
    from marval.report import results_table
    metrics = METRICS
    for _ in range(data.draw(st.integers(1, 2))):
        metrics = replaced(metrics, data.draw(st.sampled_from(sorted(paths(metrics), key=str))),
                           data.draw(json_values()))
    try: check_metrics(metrics)
    except BadInput as e:
        assert str(e).isprintable()
        return
    for text in (results_table(metrics), metrics_table(metrics)): assert not re.search(r"\b(nan|inf)\b", text)


@pytest.mark.parametrize("text", ("diversity", "diversity 0", "diversity -1", "diversity inf",
                                  "diversity nan", "diversity 0.1 fd 0.5", "beauty 1", "fd 1, fd 2", "fd 1,",
                                  ",", "fd 1e999", "fd\x1b 1", "fd " + "9" * 400, "fd 1" * 1000, "fd,1",
                                  "fd=1", "watch 0x1"))
def test_guards(text):
    from marval.border import BadInput
    from marval.guards import parse_guards
    with pytest.raises(BadInput, match="rl.guard=") as refusal: parse_guards(text)
    assert str(refusal.value).isprintable() and len(str(refusal.value)) < 600
