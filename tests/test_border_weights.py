"Files of weights from strangers: a network, or one line that says what is wrong, soon and with little memory."
import argparse
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from dataclasses import asdict, replace

import pytest
import torch
from conftest import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from marval.border import BadInput
from marval.config import preset
from marval.mar import MAR, load_into, load_weights, read_meta, save_weights
from marval.official import load_official, read_foreign, save_official

CONFIG = preset("smoke")
ODD_NAMES = ["", ".", "/", "..", "a" * 300, "x\0y", "\udcff", "a\nb", "~nobody", "/dev/zero", "/proc/self/mem",
             None, 3, b"x", ["a"], "nowhere/w.pth"]


def refusal(f, *args, seconds=20, megabytes=1000, **kwargs):
    "The line with which a call is refused, after little work (seconds of a processor, whatever else runs) and with little memory."
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    found = outcome(f, *args, **kwargs)
    assert isinstance(found, BadInput), found
    assert time.process_time() - start < seconds
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000 * megabytes
    return str(found)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = MAR(CONFIG.model).eval()
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    return net


@pytest.fixture(scope="module")
def good(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "w.safetensors"
    save_weights(net, path, stage="teacher", **asdict(CONFIG.sampling))
    return path


def rewritten(good, path, config={}, meta={}, drop=(), tensors={}, whole=None):
    "A copy of a file of weights with other texts in its header, and other tensors."
    with safe_open(good, "pt") as f:
        header = json.loads(f.metadata()["marval"])
        state = {k: f.get_tensor(k) for k in f.keys()}
    header["config"].update(config)
    header["meta"].update(meta)
    for k in drop: header["config"].pop(k)
    text = json.dumps(header) if whole is None else whole
    save_file({k: v for k, v in {**state, **tensors}.items() if v is not None}, path, metadata={"marval": text})
    return path


HEADERS = {
    "a size that is no whole number": (dict(config=dict(width=64.0)), "config.width=64.0"),
    "a size that is no number": (dict(config=dict(width="64")), "config.width='64'"),
    "an image of 10^12 pixels": (dict(config=dict(img_size=10**12)), "config.img_size=1000000000000"),
    "a million blocks": (dict(config=dict(depth=10**6)), "config.depth=1000000"),
    "as many blocks as are accepted": (dict(config=dict(depth=256, head_depth=256)), "expected at least 8192"),
    "a network of 10^12 numbers": (dict(config=dict(width=16384, head_width=16384, class_num=10**5)), "has shape"),
    "heads that don't divide": (dict(config=dict(heads=3)), "model.heads"),
    "a negative size": (dict(config=dict(width=-32)), "config.width=-32"),
    "true": (dict(config=dict(depth=True)), "config.depth=True"),
    "null": (dict(config=dict(depth=None)), "config.depth=None"),
    "NaN": (dict(config=dict(mlp_ratio=float("nan"))), "config.mlp_ratio"),
    "a foreign key": (dict(config=dict(colour=3)), "config.colour"),
    "a key that is missing": (dict(drop=["heads"]), "config.heads"),
    "K": (dict(meta=dict(K="abc")), "K=abc"),
    "K too large": (dict(meta=dict(K="9" * 30)), "K=9999"),
    "cfg": (dict(meta=dict(cfg="nan")), "cfg=nan"),
    "reveal": (dict(meta=dict(reveal="sine")), "reveal=sine"),
    "clip": (dict(meta=dict(clip="-1")), "clip=-1"),
    "temperature": (dict(meta=dict(temperature="1e400")), "temperature=1e400"),
    "entry_abar": (dict(meta=dict(entry_abar="1")), "entry_abar=1"),
    "latent_scale": (dict(meta=dict(latent_scale="0")), "latent_scale=0"),
    "chain_steps": (dict(meta=dict(chain_steps="1")), "chain_steps=1"),
    "control characters": (dict(meta=dict(stage="\x1b[31m")), "stage"),
    "a number for a text": (dict(meta=dict(stage=3)), "meta.stage=3"),
    "a list for a text": (dict(meta=dict(stage=["teacher"])), "meta.stage"),
    "no JSON": (dict(whole="{"), "JSON"),
    "a list": (dict(whole="[1, 2]"), "[1, 2]"),
    "null everywhere": (dict(whole='{"config": null, "meta": null}'), "config=None"),
    "no meta": (dict(whole='{"config": {}}'), "meta is missing"),
    "deep": (dict(whole="[" * 10**5), "JSON"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(good, tmp_path, case):
    change, clue = HEADERS[case]
    path = rewritten(good, tmp_path / "w.safetensors", **change)
    assert clue in refusal(load_weights, path)
    refusal(load_into, MAR(CONFIG.model), path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(part=st.sampled_from(["config", "meta"]), name=st.sampled_from([*asdict(CONFIG.model), *asdict(CONFIG.sampling), "x"]),
       value=st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers(), max_size=2))
def test_any_header(good, part, name, value):
    path = good.with_name("any.safetensors")
    found = outcome(load_weights, rewritten(good, path, **{part: {name: value}}))
    assert isinstance(found, (MAR, BadInput))
    assert isinstance(outcome(read_meta, path), (dict, BadInput))


BITS = torch.zeros(32, dtype=torch.long)
TENSORS = {
    "NaN": ({"z_proj.weight": torch.full((32, 4), torch.nan)}, "z_proj.weight holds NaN"),
    "one infinity": ({"mask_token": torch.zeros(1, 1, 32).index_fill(2, torch.tensor([31]), -torch.inf)}, "mask_token"),
    "integers": ({"encoder_norm.bias": BITS}, "encoder_norm.bias holds I64"),
    "truth values": ({"encoder_norm.bias": BITS.bool()}, "encoder_norm.bias holds BOOL"),
    "eight bits": ({"encoder_norm.bias": BITS.float().to(torch.float8_e4m3fn)}, "encoder_norm.bias holds F8_E4M3"),
    "complex": ({"encoder_norm.bias": BITS.to(torch.complex64)}, "encoder_norm.bias holds C64"),
    "two types": ({"encoder_norm.bias": BITS.half()}, "one type"),
    "missing": ({"encoder_norm.bias": None}, "encoder_norm.bias is missing"),
    "foreign": ({"a\nb": BITS}, "unknown tensor"),
    "misshapen": ({"encoder_norm.bias": torch.zeros(2, 16)}, "[2, 16]"),
    "empty": ({"encoder_norm.bias": torch.zeros(0)}, "[0]"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors(good, net, tmp_path, case):
    change, clue = TENSORS[case]
    assert clue in refusal(load_weights, rewritten(good, tmp_path / "w.safetensors", tensors=change))
    state = {k: v for k, v in {**net.state_dict(), **change}.items() if v is not None}
    torch.save({"model_ema": state}, tmp_path / "w.pth")
    clue = clue.replace("I64", "torch.int64").replace("BOOL", "torch.bool").replace("F8_E4M3", "torch.float8_e4m3fn")
    line = refusal(load_official, tmp_path / "w.pth", img_size=8, vae_stride=1, patch_size=2)
    assert clue.replace("C64", "torch.complex64") in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read(net, tmp_path, dtype):
    save_weights(MAR(CONFIG.model).to(dtype), tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors").mask_token.dtype == dtype


def entry(shape, start, end, dtype="F32"): return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def safetensors(header, data=bytes(8), length=None):
    "The bytes of a file with any header."
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


BYTES = {
    "nothing": b"",
    "text": b"weights, honestly",
    "a length and no more": struct.pack("<Q", 2),
    "a header of 2^63 bytes": safetensors({}, length=2**63),
    "a header of 2^64 - 1 bytes": safetensors({}, length=2**64 - 1),
    "a header of 64 MiB": safetensors(b'{"a":' + b" " * 2**26 + b"{}}"),
    "a list": safetensors(b"[1, 2]"),
    "deep": safetensors(b'{"a":' * 10**5),
    "no UTF-8": safetensors(b"\xff\xfe{}"),
    "half a surrogate": safetensors(b'{"\\ud800": 1}'),
    "overlapping": safetensors({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}),
    "twice": safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
    "a hole": safetensors({"a": entry([1], 4, 8)}),
    "backwards": safetensors({"a": entry([1], 8, 4)}),
    "10^18 numbers": safetensors({"a": entry([10**18], 0, 8)}),
    "2^64 numbers": safetensors({"a": entry([2**32, 2**32], 0, 8)}),
    "a negative shape": safetensors({"a": entry([-1], 0, 8)}),
    "lists as texts": safetensors({"__metadata__": {"marval": [1]}, "a": entry([2], 0, 8)}),
    "null as texts": safetensors({"__metadata__": None, "a": entry([2], 0, 8)}),
    "other texts": safetensors({"__metadata__": {"format": "pt"}, "a": entry([2], 0, 8)}),
    "an unknown type": safetensors({"a": entry([2], 0, 8, "F31")}),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes(tmp_path, case):
    for suffix in (".safetensors", ".pth"):
        path = tmp_path / f"w{suffix}"
        path.write_bytes(BYTES[case])
        for f in (load_weights, read_meta, load_official): refusal(f, path)
        outcome(read_foreign, path)  # some versions of torch read safetensors


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_damaged_bytes(good, net, data):
    "Cut anywhere, or with a few bytes of the first kilobytes changed."
    pth = good.with_name("w.pth")
    if not pth.exists(): save_official(net, pth)
    for path, load in ((good, load_weights), (pth, load_official)):
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()): content = content[:data.draw(st.integers(0, len(content)))]
        for _ in range(data.draw(st.integers(1, 4))):
            if content: content[data.draw(st.integers(0, min(len(content), 12000) - 1))] = data.draw(st.integers(0, 255))
        bad = good.with_name(f"damaged{path.suffix}")
        bad.write_bytes(content)
        assert isinstance(outcome(load, bad), (MAR, BadInput))


@pytest.mark.parametrize("name", ODD_NAMES, ids=str)
def test_names(net, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for f in (load_weights, read_meta, load_official, read_foreign, lambda p: load_into(net, p)): refusal(f, name)
    for f in (save_weights, save_official): outcome(f, net, name)


@pytest.mark.parametrize("load", [load_weights, read_meta, load_official, read_foreign])
def test_what_is_no_regular_file(tmp_path, load):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "zero"): assert "regular" in refusal(load, tmp_path / name)


class Rebuilt:
    "A tensor of any size and stride over a storage, as a forged pickle has it."
    def __init__(self, storage, size, stride, offset=0): self.args = storage, offset, size, stride

    def __reduce__(self):
        from collections import OrderedDict
        return torch._utils._rebuild_tensor_v2, (*self.args, False, OrderedDict())


@pytest.mark.filterwarnings("ignore:TypedStorage")
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("size, stride, offset", [
    ((10**9,), (0,), 0), ((2**15, 2**15), (0, 1), 0), ((10**9,), (1,), 0), ((2,), (10**9,), 0), ((4,), (1,), 10**9), ((10**12,), (1,), 0)])
def test_views_that_claim_more(tmp_path, zipped, size, stride, offset):
    "Four gigabytes out of a kilobyte."
    path = tmp_path / "bomb.pth"
    forged = Rebuilt(torch.zeros(2**15).storage(), size, stride, offset)
    torch.save({"model_ema": {"class_emb.weight": forged}}, path, _use_new_zipfile_serialization=zipped)
    refusal(read_foreign, path)
    refusal(load_official, path)


def test_one_storage_under_many_names(tmp_path):
    block = torch.zeros(2**18)
    torch.save({"model": {str(i): block.view(512, 512) for i in range(1000)}}, tmp_path / "w.pth")
    assert "1048576000 bytes" in refusal(read_foreign, tmp_path / "w.pth")


def repacked(source, path, how):
    "The same archive, packed again."
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(path, "w", how) as b:
        for e in a.infolist(): b.writestr(e.filename, a.read(e))
    return path


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_packed_again(net, tmp_path, how):
    "The weights of an archive that somebody has unpacked and packed again are the same, or it is refused."
    save_official(net, tmp_path / "w.pth")
    again = load_official(repacked(tmp_path / "w.pth", tmp_path / "again.pth", how), vae_stride=1, patch_size=2)
    for k, v in net.state_dict().items(): assert torch.equal(again.state_dict()[k], v), k


@pytest.mark.parametrize("how", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_packed_in_a_way_that_torch_cannot_read(net, tmp_path, how):
    save_official(net, tmp_path / "w.pth")
    refusal(load_official, repacked(tmp_path / "w.pth", tmp_path / "again.pth", how))


def test_an_archive_that_explodes(tmp_path):
    torch.save({"model": {"a": torch.zeros(2**26)}}, tmp_path / "zeros.pth")
    path = repacked(tmp_path / "zeros.pth", tmp_path / "bomb.pth", zipfile.ZIP_DEFLATED)
    (tmp_path / "zeros.pth").unlink()
    assert path.stat().st_size < 2**20 and "32 times" in refusal(read_foreign, path, megabytes=100)


ARGS = {
    "a text": dict(heads="4"), "a fraction": dict(img_size=8.5), "NaN": dict(attn_dropout=float("nan")),
    "null": dict(vae_stride=None), "a tensor": dict(heads=torch.ones(2)), "huge": dict(img_size=10**400),
    "true": dict(heads=True), "a list": dict(patch_size=[2]), "too large": dict(patch_size=10**9), "zero": dict(heads=0),
}


@pytest.mark.parametrize("case", ARGS)
def test_arguments_of_a_public_file(net, tmp_path, case):
    args = argparse.Namespace(**{**dict(img_size=8, vae_stride=1, patch_size=2), **ARGS[case]})
    torch.save({"model_ema": net.state_dict(), "args": args}, tmp_path / "w.pth")
    refusal(load_official, tmp_path / "w.pth")


PICKLES = {
    "a list": [1], "no dictionary": {"model_ema": [1]}, "keys that are numbers": {"model_ema": {1: torch.zeros(2)}},
    "no tensors": {"model_ema": {"class_emb.weight": "x", "diffusion_pos_embed_learned": None}},
    "a line break": {"model\nema": 1}, "sparse": {"model_ema": {"class_emb.weight": torch.zeros(3, 4).to_sparse()}},
    "no memory": {"model_ema": {"class_emb.weight": torch.zeros(3, 4, device="meta")}},
    "a circle": (lambda x: x.update(x=x) or x)({}),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles(tmp_path, case):
    torch.save(PICKLES[case], tmp_path / "w.pth")
    refusal(load_official, tmp_path / "w.pth")


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_takes_for_ever(tmp_path, old):
    "A tuple of two tuples of two tuples ... as a key: 200 bytes that are hashed in 2^60 steps."
    nested = b"".join(b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60))
    bomb = b"\x80\x02})q\x00" + nested + b"K\x01s."
    torch.save({"a": 1}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as a, zipfile.ZipFile(tmp_path / "w.pth", "w") as b:
        for e in a.infolist(): b.writestr(e.filename, bomb if e.filename.endswith("data.pkl") else a.read(e))
    if old: (tmp_path / "w.pth").write_bytes(bomb)
    assert "a tuple of more than" in refusal(load_official, tmp_path / "w.pth")


def test_a_pickle_that_runs_code(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "sprung"),)
    writers = {
        "zip": torch.save,
        "old": lambda o, f: torch.save(o, f, _use_new_zipfile_serialization=False),
        "pickle": lambda o, f: f.write_bytes(pickle.dumps(o, protocol=2)),
    }
    for name, write in writers.items():
        write({"model_ema": {}, "args": Trap()}, tmp_path / f"{name}.pth")
        assert "mkdir" in refusal(load_official, tmp_path / f"{name}.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_network_that_refuses_a_file_keeps_its_weights(good, net, tmp_path):
    other = MAR(CONFIG.model)
    before = {k: v.clone() for k, v in other.state_dict().items()}
    save_weights(MAR(replace(CONFIG.model, heads=1)), tmp_path / "heads.safetensors")
    rewritten(good, tmp_path / "nan.safetensors", tensors=TENSORS["NaN"][0])
    for name in ("heads", "nan"): refusal(load_into, other, tmp_path / f"{name}.safetensors")
    for k, v in other.state_dict().items(): assert torch.equal(v, before[k])
