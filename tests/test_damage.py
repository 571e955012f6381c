"Run folders that are damaged, forged or begun by mistake: one line that names the file and what to do, and never other weights."
import hashlib
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Launched, digests
from torch import nn

from marval import checkpoint, pipeline
from marval.checkpoint import load_checkpoint, newest, read_manifest, save_checkpoint
from marval.config import BadInput, override, preset
from marval.journal import Journal, read_log

TENSORS = "00000-00000.safetensors"
ODD_JSON = {
    "empty": b"", "null": b"null", "list": b"[]", "text": b'"x"', "number": b"7", "no fields": b"{}", "cut": b'{"products": {"a',
    "binary": bytes(range(256)), "deep": b"[" * 100_000, "deep object": b'{"a":' * 100_000, "NaN": b'{"seconds": NaN, "seed": NaN, "products": NaN}',
    "list for dict": b'{"products": [1], "seconds": [1]}', "text for number": b'{"products": {}, "seconds": "1"}', "number for text": b'{"products": {"teacher.safetensors": 7}}',
    "endless number": b'{"seconds": ' + b"9" * 5000 + b', "products": {}}'}


def refused(f, *args):
    "The one line that a call is refused with."
    with pytest.raises(BadInput) as e: f(*args)
    assert str(e.value).isprintable() and len(str(e.value)) < 2000
    return str(e.value)


class Toy:
    "A stage as far as a checkpoint cares."
    name, iterations = "toy", 12

    def __init__(self, width=3):
        torch.manual_seed(0)
        self.net = nn.Linear(2, width)
        self.opt = torch.optim.AdamW(self.net.parameters(), lr=0.1)

    def modules(self): return dict(net=self.net)

    def optimizers(self): return dict(net=self.opt)

    def steps(self, start, end):
        for i in range(start, end):
            self.net(torch.randn(4, 2, generator=torch.Generator().manual_seed(i))).square().mean().backward()
            self.opt.step()
            self.opt.zero_grad()
        return self

    def state(self):
        memory = self.opt.state_dict()["state"]
        return [*self.net.state_dict().values(), *(memory[i][k] for i in sorted(memory) for k in sorted(memory[i]))]


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


@pytest.fixture
def folder(tmp_path):
    "Checkpoints of steps 4 and 8."
    stage = Toy()
    for step in (4, 8): save_checkpoint(tmp_path, stage.steps(step - 4, step), 0, step, 1.5, [dict(loss=torch.tensor(0.5))])
    return tmp_path


def load(folder, stage=None): return load_checkpoint(newest(folder), stage or Toy(), 0)


def reseal(path, manifest=None, **changes):
    "A forger's manifest: with other values, and checksums that fit."
    m = manifest or json.loads((path / "manifest.json").read_text())
    m.pop("sha256", None)
    for part in m["parts"] if "parts" not in changes else ():
        data = (path / TENSORS).read_bytes()
        part.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    body = json.dumps(m | changes, indent=1).removesuffix("\n}").encode()
    (path / "manifest.json").write_bytes(body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')


# -- checkpoints: damage -----------------------------------------------------------------------------------------------

def test_goes_on_bit_for_bit(folder):
    stage = Toy()
    step, seconds, window = load(folder, stage)
    assert (step, seconds) == (8, 1.5) and window == [dict(loss=torch.tensor(0.5))] and same(stage.steps(8, 12), Toy().steps(0, 12))


@pytest.mark.parametrize("name", ["manifest.json", TENSORS])
def test_a_flipped_bit(folder, name):
    "In every byte of the manifest, and in every seventh of the tensors, their header included."
    path = newest(folder) / name
    whole = path.read_bytes()
    for i in range(0, len(whole), 1 if name == "manifest.json" else 7):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1:])
        said = refused(load, folder)
        assert str(newest(folder)) in said and "damaged" in said and said.endswith("remove this folder to go on from step 4"), i
    shutil.rmtree(newest(folder))
    assert load(folder)[0] == 4
    path = newest(folder) / name
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(load, folder).endswith("remove this folder to start the stage over")
    shutil.rmtree(newest(folder))
    assert load(folder) == (0, 0.0, [])


def _gone(path): path.unlink()
def _empty(path): path.write_bytes(b"")
def _longer(path): path.write_bytes(path.read_bytes() + b"\0")
def _folder(path): path.unlink(), path.mkdir()
def _pipe(path): path.unlink(), os.mkfifo(path)
def _endless(path): path.unlink(), path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", ["manifest.json", TENSORS])
@pytest.mark.parametrize("harm", [_gone, _empty, _longer, _folder, _pipe, _endless])
def test_no_file_of_ours(folder, name, harm):
    harm(newest(folder) / name)
    assert name in refused(load, folder)


def test_torn_saves(tmp_path, monkeypatch):
    """A process that dies before its n-th fsync or rename in a save, for every n there is: the checkpoint before stands, the next save clears away what was left, and there are never
    more than two on the disk."""
    class Dead(BaseException): pass
    stage, left, most = Toy().steps(0, 4), float("inf"), 0
    def dying(f):
        def call(*args):
            nonlocal left, most
            most = max(most, len(list(folder.glob("*checkpoint*"))))
            left -= 1
            if left < 0: raise Dead
            return f(*args)
        return call
    for name in ("replace", "fsync"): monkeypatch.setattr(os, name, dying(getattr(os, name)))
    for n in range(100):
        folder, dead = tmp_path / str(n), False
        folder.mkdir()
        for step in (1, 2): save_checkpoint(folder, stage, 0, step)
        left = n
        try: save_checkpoint(folder, stage, 0, 3)
        except Dead: dead = True
        left, other = float("inf"), Toy()
        assert load(folder, other)[0] in ((2, 3) if dead else (3,)) and same(stage, other)
        save_checkpoint(folder, stage, 0, 4)
        assert load(folder)[0] == 4 and len(list(folder.iterdir())) == 2
        if not dead: break
    assert 5 < n < 99 and most == 2


# -- checkpoints: forgery ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    dict(step=-1), dict(step=10**9), dict(step=13), dict(step=4), dict(step="8"), dict(step=8.5), dict(step=None), dict(step=True), dict(seed=1), dict(seed=-1), dict(seed=[0]),
    dict(seconds=-1), dict(seconds="x"), dict(seconds=1e300), dict(format="marval checkpoint 1"), dict(stage="teacher"), dict(stage=7), dict(stage="\x1b[31m"), dict(window={}),
    dict(window=[["nothing"]]), dict(window=[[["loss"]]]), dict(parts=[]), dict(parts={}), dict(parts=[dict(rank=-1, number=0, bytes=1, sha256="0")]),
    dict(parts=[dict(rank="../../x", number=0, bytes=1, sha256="0")]), dict(parts=[7])], ids=str)
def test_forged_manifest(folder, changes):
    reseal(newest(folder), **changes)
    assert "checkpoint-00000008" in refused(load, folder)


@pytest.mark.parametrize("content", ODD_JSON.values(), ids=ODD_JSON)
def test_odd_manifest(folder, content):
    path = newest(folder) / "manifest.json"
    path.write_bytes(content)
    assert "manifest.json" in refused(load, folder)
    body = content.removesuffix(b"\n}")
    path.write_bytes(body + b',\n "sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'"\n}\n')
    refused(load, folder)


def header(tensors: dict, data=b"") -> bytes:
    "A file of safetensors with any header."
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape, start, end, dtype="F32"): return dict(dtype=dtype, shape=shape, data_offsets=[start, end])


@pytest.mark.parametrize("content", [
    b"", b"\xff" * 100, struct.pack("<Q", 1 << 62) + b"{}", header({}), header({"modules/net/weight": entry([1 << 15, 1 << 15], 0, 1 << 32)}, b"\0" * 1000),
    header({"modules/net/weight": entry([1 << 40, 1 << 40], 0, 24)}, b"\0" * 24), header({"modules/net/weight": entry([3, 2], 0, 24), "modules/net/bias": entry([3], 0, 12)}, b"\0" * 24),
    header({"modules/net/weight": entry([3, 2], -24, 0)}, b"\0" * 24), b"[" * 100_000], ids=["empty", "noise", "long header", "nothing", "4 GB from 1 kB", "overflow", "overlap", "before", "deep"])
def test_forged_tensors(folder, content):
    "What a header claims and the file does not hold is refused before anything is allocated for it."
    (newest(folder) / TENSORS).write_bytes(content)
    reseal(newest(folder))
    assert "checkpoint-00000008" in refused(load, folder)


@pytest.mark.parametrize("name, x", [
    ("modules/net/weight", torch.zeros(2, 3)), ("modules/net/weight", torch.zeros(3, 2, dtype=torch.float64)), ("modules/net/more", torch.zeros(1)), ("modules/other/weight", torch.zeros(1)),
    ("optimizers/net/0/exp_avg", torch.zeros(1 << 20)), ("optimizers/net/7/exp_avg", torch.zeros(1)), ("optimizers/net/-1/exp_avg", torch.zeros(3)), ("optimizers/other/0/exp_avg", torch.zeros(1)),
    ("optimizers/net", torch.zeros(1)), ("anything", torch.zeros(1)), ("modules/net/bias", None)], ids=str)
def test_other_tensors(folder, name, x):
    from safetensors.torch import load_file, save_file
    path = newest(folder) / TENSORS
    tensors = load_file(path)
    if x is None: del tensors[name]
    else: tensors[name] = x
    save_file({k: v.clone() for k, v in tensors.items()}, path)
    reseal(newest(folder))
    assert name.split("/", 1)[1 if name.startswith("modules") else 0].replace("/", ".")[:8] in refused(load, folder).replace("/", ".")


class Evil:
    "Leaves a mark when it is unpickled."
    def __init__(self, mark): self.mark = mark

    def __reduce__(self): return Path.touch, (self.mark,)


def test_no_code_from_a_folder(folder, tmp_path):
    """A payload in the place of every file, under the checksums that it has, as pickle and as what `torch.save` makes of it; in the files of `torch.distributed.checkpoint`, which were
    read once; and as the file of an earlier version."""
    mark = tmp_path / "marked"
    torch.save(Evil(mark), tmp_path / "payload.pt")
    payloads = [pickle.dumps(Evil(mark)), (tmp_path / "payload.pt").read_bytes()]
    pickle.loads(payloads[0])
    assert mark.exists(), "the payload works"
    mark.unlink()
    for payload in payloads:
        path, whole = newest(folder), {name: (newest(folder) / name).read_bytes() for name in (TENSORS, "manifest.json")}
        for name in (".metadata", "head.pt", "__0_0.distcp"): (path / name).write_bytes(payload)
        assert load(folder)[0] == 8
        for name in whole:
            (path / name).write_bytes(payload)
            if name == TENSORS: reseal(path)
            refused(load, folder)
            for n, content in whole.items(): (path / n).write_bytes(content)
        (path / "manifest.json").unlink()
        refused(load, folder)
        (path / "manifest.json").write_bytes(whole["manifest.json"])
        old = tmp_path / "old"
        shutil.rmtree(old, ignore_errors=True)
        old.mkdir()
        (old / "checkpoint.pt").write_bytes(payload)
        assert "earlier version" in refused(newest, old)
    assert not mark.exists()
    source = (ROOT / "marval" / "checkpoint.py").read_text()
    assert not any(word in source for word in ("import pickle", "torch.load", "torch.save", "eval(", "exec("))


# -- logs --------------------------------------------------------------------------------------------------------------

ROWS = [json.dumps(dict(step=s, seconds=1.0, loss=0.5)).encode() + b"\n" for s in (10, 20, 30)]
GARBAGE = [b"\x00\xff\xfe\n", b"null\n", b"[1]\n", b'{"loss": 1}\n', b'{"step": "10"}\n', b'{"step": -3}\n', b'{"step": 20, "loss": {}}\n', b"[" * 60_000 + b"\n", b"\n" * 9, b"x" * 300_000 + b"\n",
           b"y" * 65_536 + b'{"step": 1, "seconds": 1}\n', b'{"step": ' + b"9" * 5000 + b"}\n"]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda g: repr(g[:12]))
def test_garbage_in_a_log(tmp_path, garbage):
    "It is passed over; a run goes on, keeps the rows up to its checkpoint, and the file as it was."
    (tmp_path / "log.jsonl").write_bytes(garbage + ROWS[0] + garbage + ROWS[1] + ROWS[2] + garbage + b'{"step": 4')
    assert [r["step"] for r in read_log(tmp_path)] == [10, 20, 30]
    with Journal(tmp_path) as journal:
        journal.resume(20)
        journal.row(30, 2.0, dict(loss=0.25))
    assert [(r["step"], r["loss"]) for r in read_log(tmp_path)] == [(10, 0.5), (20, 0.5), (30, 0.25)]
    assert (tmp_path / "log.jsonl").read_bytes().startswith(ROWS[0] + ROWS[1]) and garbage in (tmp_path / "log.damaged.jsonl").read_bytes()


@pytest.mark.parametrize("harm", [_folder, _pipe, _endless])
def test_no_log(tmp_path, harm):
    (tmp_path / "log.jsonl").touch()
    harm(tmp_path / "log.jsonl")
    assert "log.jsonl" in refused(Journal, tmp_path) and read_log(tmp_path) == []


def test_a_link_is_not_written_through(tmp_path):
    "Neither the log nor the lock of a folder that somebody sent is another file of ours."
    (tmp_path / "precious").write_text("precious\n")
    (tmp_path / "state").mkdir()
    for name in ("log.jsonl", "state/lock"): (tmp_path / name).symlink_to(tmp_path / "precious")
    refused(Journal, tmp_path)
    refused(pipeline.lock, tmp_path)
    assert (tmp_path / "precious").read_text() == "precious\n"


# -- stages ------------------------------------------------------------------------------------------------------------

SMOKE = override(preset("smoke"), ["teacher.iterations=10", "log.sample_every=100"])
PRODUCT = ("teacher.safetensors",)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    "A finished teacher at smoke scale, with checkpoints of steps 8 and 10."
    out, kept = tmp_path_factory.mktemp("damage") / "run", tmp_path_factory.mktemp("kept")
    keep = checkpoint.keep_last
    checkpoint.keep_last = lambda folder, n=1: keep(folder, n) if not (folder / "done.json").exists() else None
    try: assert pipeline.run(SMOKE, ("teacher",), out) == {"teacher": "done"}
    finally: checkpoint.keep_last = keep
    assert sorted(p.name for p in (out / "state" / "teacher").glob("checkpoint-*")) == ["checkpoint-00000008", "checkpoint-00000010"]
    return out


@pytest.fixture
def run(taught, tmp_path):
    "A copy of it."
    return shutil.copytree(taught, tmp_path / "run")


def unfinished(run):
    "The same, interrupted just before its end."
    (run / "state" / "teacher" / "done.json").unlink()
    (run / PRODUCT[0]).unlink()
    return run / "state" / "teacher"


def guarded(run, cfg=SMOKE, stages=("teacher",)):
    status, line = pipeline.guarded(cfg, stages, run)
    assert line.isprintable() and "unexpected" not in line, line
    return status, line


def test_a_damaged_checkpoint_in_a_run(taught, run):
    "The advice works: without it, the run goes on from the last but one, to the same weights."
    folder = unfinished(run)
    file = newest(folder) / TENSORS
    data = file.read_bytes()
    file.write_bytes(data[:-9] + bytes([data[-9] ^ 64]) + data[-8:])
    status, line = guarded(run)
    assert status == 2 and str(newest(folder)) in line and line.endswith("remove this folder to go on from step 8") and not (run / PRODUCT[0]).exists()
    shutil.rmtree(newest(folder))
    assert guarded(run) == (0, "") and digests(run, PRODUCT) == digests(taught, PRODUCT) and len(list(folder.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("content", ODD_JSON.values(), ids=ODD_JSON)
@pytest.mark.parametrize("name", ["done.json", "settings.json"])
def test_odd_json(taught, run, name, content):
    "A refusal names the file and what helps, and that does help."
    path = run / "state" / "teacher" / name
    path.write_bytes(content)
    status, line = guarded(run)
    assert status == 2 and ("remove it" if name == "done.json" else "--redo teacher") in line
    if content != b"null": return                                       # once is enough: the advice is the same
    if name == "done.json": path.unlink() if path.exists() else None
    else: assert pipeline.redo("teacher", SMOKE, run) == ("teacher",)
    assert guarded(run) == (0, "") and digests(run, PRODUCT) == digests(taught, PRODUCT)


def test_settings_are_missing(run):
    "A checkpoint of unknown settings is not gone on from."
    unfinished(run)
    (run / "state" / "teacher" / "settings.json").unlink()
    status, line = guarded(run)
    assert status == 2 and "settings.json" in line and "--redo teacher" in line


@pytest.mark.parametrize("content", [b"\xff\xfe garbage", b"9" * 1000, b""])
def test_garbage_in_the_lock(run, content):
    (run / "state" / "lock").write_bytes(content)
    held = open(run / "state" / "lock", "rb+")
    import fcntl
    fcntl.flock(held, fcntl.LOCK_EX)
    assert "in use by process" in refused(pipeline.lock, run, 0)
    held.close()
    assert guarded(run) == (0, "")


def test_a_damaged_product(taught, run):
    "It is named; removed, it is made again from the checkpoint."
    path = run / PRODUCT[0]
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    status, line = guarded(run)
    assert status == 2 and str(path) in line and "remove it to have it made again" in line
    path.unlink()
    assert guarded(run) == (0, "") and digests(run, PRODUCT) == digests(taught, PRODUCT)


def test_a_mistake_locks_no_run(taught, tmp_path):
    "A learning rate that diverges before anything is saved is simply corrected; where there is a checkpoint, the line says how."
    out, wrong = tmp_path / "run", override(SMOKE, ["teacher.lr=50", "teacher.clip=1000000", "teacher.warmup=0"])
    (out / "state" / "teacher").mkdir(parents=True)
    (out / "state" / "teacher" / "settings.json").write_text(json.dumps(pipeline.settings(wrong, "teacher", out)))
    (out / "state" / "teacher" / "log.jsonl").write_bytes(b"".join(ROWS))
    assert pipeline.check(SMOKE, ("teacher",), out) == {"teacher": "to do"}
    assert guarded(out) == (0, "") and digests(out, PRODUCT) == digests(taught, PRODUCT)
    status, line = guarded(out, wrong)
    assert status == 2 and "teacher.lr=0.001, now teacher.lr=50.0" in line and "--redo teacher to start the stage over" in line
    assert pipeline.check(wrong, ("teacher",), out, pipeline.dependants("teacher", wrong)) == {"teacher": "to do"}


def test_divergence_says_how_to_go_on(monkeypatch, tmp_path):
    from marval.teacher import TeacherStage
    step = TeacherStage.step
    monkeypatch.setattr(TeacherStage, "step", lambda self, i, g: step(self, i, g) | (dict(loss=torch.tensor(float("nan"))) if i > 4 else {}))
    status, line = guarded(tmp_path / "run")
    assert status == 1 and "loss is nan by step 8" in line and "--redo teacher --set teacher.lr=" in line
    assert read_manifest(newest(tmp_path / "run" / "state" / "teacher")).step == 4


@pytest.mark.parametrize("error, said", [
    (ZeroDivisionError("by\nnothing"), "unexpected ZeroDivisionError"), (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB"), "compute.accumulate"), (MemoryError(), "compute.accumulate")],
    ids=["bug", "GPU", "memory"])
def test_an_error_that_nobody_foresaw(monkeypatch, tmp_path, error, said):
    "One line, status 1, and the traceback in the run folder."
    from marval.teacher import TeacherStage
    def broken(*_): raise error
    monkeypatch.setattr(TeacherStage, "step", broken)
    status, line = pipeline.guarded(SMOKE, ("teacher",), tmp_path / "run")
    file, = (tmp_path / "run" / "state").glob("error-*.txt")
    assert status == 1 and line.isprintable() and said in line and str(file) in line and "in broken" in file.read_text()


def test_a_refusal_of_the_system(monkeypatch, tmp_path):
    from marval.teacher import TeacherStage
    def broken(*_): raise OSError(5, "Input/output error", "/somewhere/a file")
    monkeypatch.setattr(TeacherStage, "step", broken)
    status, line = guarded(tmp_path / "run")
    assert status == 2 and "Input/output error: /somewhere/a file" in line


def test_a_configuration_from_python(tmp_path):
    from dataclasses import replace
    broken = replace(SMOKE, teacher=replace(SMOKE.teacher, lr="fast", batch=-3))
    assert guarded(tmp_path / "run", broken)[0] == 2 and not (tmp_path / "run").exists()


# -- starting over -----------------------------------------------------------------------------------------------------

def fake(out, *stages):
    "What finished stages leave."
    for stage in stages:
        node, folder = pipeline.DIGITS[stage], out / "state" / stage
        for product in node.writes:
            (out / product).parent.mkdir(parents=True, exist_ok=True)
            (out / product).write_text(stage)
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(pipeline.settings(SMOKE, stage, out)))
        (folder / "done.json").write_text(json.dumps(dict(products=digests(out, node.writes))))
    return out


def test_redo(tmp_path, launch, capsys):
    "A stage and what depends on it, nothing else; not while somebody works there, not by a command that is refused or a dry run."
    out = fake(tmp_path / "run", *pipeline.DIGITS)
    argv = ["--scale", "smoke", "--cluster", "local", "--out", str(out), "--set", "teacher.iterations=10", "log.sample_every=100"]
    before = sorted(p.relative_to(out) for p in out.rglob("*"))
    held = pipeline.lock(out)
    assert "in use" in refused(pipeline.redo, "rl", SMOKE, out)
    held.close()
    assert launch.main([*argv, "--redo", "nothing"]) == 2 and launch.main([*argv, "--redo", "rl", "--seed", "1", "--stage", "teacher"]) == 2
    assert launch.main([*argv, "--dry-run", "--redo", "rl"]) == 0
    assert "would be removed: rl, evaluate" in capsys.readouterr().out
    assert {*before, Path("state/lock")} == {p.relative_to(out) for p in out.rglob("*")}
    assert pipeline.redo("distill", SMOKE, out) == ("evaluate", "rl", "distill")
    left = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert left == {"teacher.safetensors", *pipeline.DIGITS["judges"].writes, "state/lock", *(f"state/{s}/{n}.json" for s in ("teacher", "judges") for n in ("settings", "done"))}
    assert pipeline.redo("distill", SMOKE, out) == () and launch.without_redo([*argv, "--redo", "rl", "--redo=rl"]) == argv


def test_redo_by_the_command(taught, run):
    "The line that refuses other settings is followed."
    argv = ("--scale", "smoke", "--stage", "teacher", "--cluster", "local", "--out", run, "--set", "teacher.iterations=10", "log.sample_every=100", "teacher.lr=0.0005")
    status, _, err = Launched(*argv).end()
    assert status == 2 and err.count("\n") == 1 and "--redo teacher to start the stage over" in err
    status, said, err = Launched(*argv, "--redo", "teacher").end()
    assert status == 0 and f"removed from {run}: teacher" in said and digests(run, PRODUCT) != digests(taught, PRODUCT), err
    assert Launched(*argv).end()[0] == 0


def test_redo_keeps_what_was_brought(tmp_path):
    "A teacher that was copied into the folder is nobody's product."
    (tmp_path / "teacher.safetensors").write_text("copied")
    assert pipeline.redo("teacher", SMOKE, tmp_path) == () and (tmp_path / "teacher.safetensors").exists()


def test_a_lost_shard(tmp_path):
    "It makes the stage one that goes on, and what is missing is made again; a stage that reads the cache says which one to run."
    from PIL import Image
    from marval.vae import KL16
    torch.manual_seed(0)
    torch.save({"model": KL16(ch=32, ch_mult=(1,) * 5, blocks=1, channels=16).state_dict()}, tmp_path / "kl16.ckpt")
    for c in range(2):
        (tmp_path / "tree" / f"class {c}").mkdir(parents=True)
        for i in range(2): Image.new("RGB", (64, 64), (99 * c, 80 * i, 7)).save(tmp_path / "tree" / f"class {c}" / f"{i}.png")
    cfg = override(preset("tiny"), ["model.class_num=2", f"data.path={tmp_path / 'tree'}", f"data.vae={tmp_path / 'kl16.ckpt'}"])
    out = tmp_path / "run"
    assert pipeline.run(cfg, ("cache",), out) == {"cache": "done"} and pipeline.run(cfg, ("cache",), out) == {"cache": "skipped"}
    shard, = (out / "cache").glob("shard-*.safetensors")
    manifest = (out / "cache" / "manifest.json").read_bytes()
    for harm in (_gone, _longer):
        harm(shard)
        assert "run --stage cache" in refused(pipeline.check, cfg, ("teacher",), out)
        assert pipeline.check(cfg, ("cache",), out) == {"cache": "resume"}
        assert guarded(out, cfg, ("cache",)) == (0, "") and (out / "cache" / "manifest.json").read_bytes() == manifest
    assert pipeline.redo("cache", cfg, out) == ("cache",) and not list((out / "cache").iterdir())


# -- evaluation --------------------------------------------------------------------------------------------------------

def test_kept_images(tmp_path):
    "Images of an interrupted evaluation count only if they are what was kept; else they are drawn again."
    from marval.outcome import keep
    drawn, path = [], tmp_path / "teacher.safetensors"
    def make():
        drawn.append(1)
        return dict(images=torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    kept = lambda: keep(path, make, "recipe", lambda found: None)["images"]
    images = kept()
    assert torch.equal(kept(), images) and len(drawn) == 1
    whole = path.read_bytes()
    for i in (0, 12, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1:])
        assert torch.equal(kept(), images)
    assert len(drawn) == 5


def test_the_least_evaluation(tmp_path):
    "Fewer images than the figures need are refused at once; the least number gives every figure."
    import math
    from marval.data import load_data
    from marval.evaluate import measure
    from marval.rewards import load_judges
    for text in ("evaluate.n=15", "evaluate.pictures=0", "log.metric_n=3"): assert "expected a whole number in" in refused(override, preset("digits"), [text])
    images, labels = load_data(preset("digits"))
    found = measure(images[:16], torch.arange(16) % 10, load_judges(ROOT / "reference" / "digits" / "judges", "cpu"), images, labels)
    assert found and all(math.isfinite(v) for v in found.values())


def test_what_a_report_remembers(tmp_path):
    "Settings and times of the stages that can be read; garbage beside them is passed over."
    from marval.outcome import _readable, _used
    from marval.pipeline import Done
    out = fake(tmp_path, "teacher", "judges")
    for name, content in (("jobs", b"\xff"), ("more", b"[]"), ("deep", b"[" * 100_000)):
        (out / "state" / name).mkdir()
        (out / "state" / name / "settings.json").write_bytes(content)
    (out / "state" / "judges" / "done.json").write_bytes(b"null")
    used, seconds = _used(out), {stage: done.seconds for stage, done in _readable(out, "done.json", Done).items()}
    assert used["teacher.lr"] == 0.001 and "judges.iterations" in used and seconds == dict(teacher=0.0)


# -- several ranks -----------------------------------------------------------------------------------------------------

def test_what_one_rank_finds_all_ranks_say(tmp_path):
    "Two ranks save a sharded stage. A flipped bit in a file that rank 1 checks, and a write that rank 1 can't do, end both in the same line, and soon."
    from test_parallel import end, start
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from marval import checkpoint
from marval.config import BadInput, override, preset
from marval.parallel import group, on_first, rank
from test_parallel import SHARDED, build
folder = Path(sys.argv[2])
def told(f, *args):
    try: f(*args)
    except BadInput as e: print(e, flush=True)
with group():
    stage = build("teacher", SHARDED)[1]
    for step in (4, 8): checkpoint.save_checkpoint(folder, stage, 0, step)
    assert checkpoint.load_checkpoint(checkpoint.newest(folder), stage, 0)[0] == 8
    def harm():
        path = folder / "checkpoint-00000008" / "00001-00000.safetensors"
        data = bytearray(path.read_bytes())
        data[-5] ^= 1
        path.write_bytes(data)
    on_first(harm)
    told(checkpoint.load_checkpoint, folder / "checkpoint-00000008", stage, 0)
    write = checkpoint._write_part
    def failing(*args):
        if rank() == 1: raise BadInput("cannot write: rank 1's disk is full")
        return write(*args)
    checkpoint._write_part = failing
    told(checkpoint.save_checkpoint, folder, stage, 0, 12)
"""
    ended = end(ranks := start(2, [str(Path(__file__).parent), str(tmp_path)], "-c", script), 300)
    for process, (out, err) in zip(ranks, ended):
        assert process.returncode == 0, err
        damaged, full = out.splitlines()
        assert damaged.endswith("00001-00000.safetensors has another checksum; remove this folder to go on from step 4") and "rank 1's disk is full" in full
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-00000008"}
