"The road of photographs at toy size: image files, a tokenizer of random weights, latent cache, teacher, distillation, RL on a text reward, pictures."
import json
import os
import shutil
import zipfile

import pytest
import torch
from conftest import ROOT, Launched, contents, digests
from PIL import Image

from marval import pipeline
from marval.config import BadInput, override, preset
from marval.latents import LatentCache
from marval.mar import MAR, load_weights, save_weights
from marval.official import save_official

SAMPLE = (ROOT / os.environ.get("MARVAL_SHARED", "../shared") / "data" / "imagenet-sample").resolve()
MODELS = ("teacher", "one_step_init", "student", "student_rl")


def write_files(folder, classes):
    "A tokenizer, a teacher in MAR's layout and ours, the towers of a reward: random weights, in the layouts of the public files."
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    from marval.vae import KL16
    torch.manual_seed(0)
    torch.save({"model": KL16(ch=32, ch_mult=(1,) * 5, blocks=1, channels=16).state_dict()}, folder / "kl16.ckpt")
    cfg = override(preset("tiny"), [f"model.class_num={classes}"])
    net = MAR(cfg.model)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)          # the head starts at zero: wake it
    save_official(net, folder / "teacher.pth")
    save_weights(net, folder / "teacher.safetensors")
    towers = dict(embed_dim=32, vision_cfg=dict(layers=1, width=64, head_width=32, patch_size=16, image_size=64), text_cfg=dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=1))
    (folder / "towers.json").write_text(json.dumps(towers))
    torch.save(CLIP(32, CLIPVisionCfg(**towers["vision_cfg"]), CLIPTextCfg(**towers["text_cfg"])).state_dict(), folder / "towers.bin")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "Five classes of four coloured pictures each, and the files."
    folder = write_files(tmp_path_factory.mktemp("small"), 5)
    g = torch.Generator().manual_seed(0)
    for c in range(5):
        (folder / "tree" / f"class {c}").mkdir(parents=True)
        for i in range(4): Image.fromarray(torch.randint(0, 256, (70 + c, 80, 3), generator=g).byte().numpy()).save(folder / "tree" / f"class {c}" / f"{i}.png")
    return folder


def options(folder, tree="tree", teacher="teacher.pth"):
    return ["--data", folder / tree, "--vae", folder / "kl16.ckpt", "--reward", folder / "towers.bin", *(["--teacher", folder / teacher] if teacher else []),
            "--set", f"rl.reward_model={folder / 'towers.json'}"]


def settings(folder, *more, classes=5, teacher="teacher.pth"):
    "The same as a configuration."
    files = dict(data_path="tree", data_vae="kl16.ckpt", rl_reward__weights="towers.bin", rl_reward__model="towers.json") | ({"teacher_checkpoint": teacher} if teacher else {})
    return override(preset("tiny"), [f"model.class_num={classes}", "teacher.batch=16", *(f"{k.replace('_', '.', 1).replace('__', '_')}={folder / v}" for k, v in files.items()), *more])


@pytest.mark.slow
def test_thousand_real_images(tmp_path):
    "From 1000 photographs of ImageNet to pictures named after their prompts, by the command a researcher types; and nothing is done twice."
    if not (SAMPLE / "train.zip").exists(): pytest.skip(f"no {SAMPLE / 'train.zip'}: the 1000 photographs are not part of this repository")
    folder, out = write_files(tmp_path, 1000), tmp_path / "run"
    with zipfile.ZipFile(SAMPLE / "train.zip") as z: z.extractall(folder / "tree")
    command = ["--scale", "tiny", "--cluster", "local", "--out", out, *options(folder)]
    status, said, err = Launched(*command).end()
    assert status == 0, err
    assert [line.split("]")[1].strip() for line in said.splitlines() if line.startswith("[")] == list(pipeline.STAGES)
    cache = LatentCache(out / "cache", full=True)
    assert len(cache) == 1000 and len(cache.classes) == 1000
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["n"] == 8 and metrics["prompts"][0] == "a high-quality and harmonious picture of tench" and set(MODELS) < set(metrics)
    for model in MODELS:
        pictures = sorted((out / "samples" / model).iterdir())
        assert len(pictures) == 8 and pictures[0].name == "0000 a high-quality and harmonious picture of tench.png"
        assert all(Image.open(p).size == (64, 64) for p in pictures) and len({p.read_bytes() for p in pictures}) == 8
    moved = {name: sum(float((a - b).abs().sum()) for a, b in zip(*(load_weights(out / f"{m}.safetensors").state_dict().values() for m in pair)))
             for name, pair in dict(distill=("teacher", "student"), rl=("student", "student_rl")).items()}
    assert all(v > 0 for v in moved.values())
    before = contents(out)
    status, said, _ = Launched(*command).end()
    assert status == 0 and "finished before" in said and contents(out) == before


@pytest.fixture(scope="module")
def trained(small):
    "A run on the small tree that trains its own teacher, through the package."
    out = small / "trained"
    cfg = settings(small, teacher="")
    assert pipeline.guarded(cfg, pipeline.select("all", cfg), out) == (0, "")
    return out


def test_teacher_of_its_own(trained):
    "Without --teacher there is one more training stage; every product is there, the loss was logged, and pictures were drawn through the tokenizer."
    assert all((trained / name).is_file() for node in pipeline.IMAGENET.values() for name in node.writes)
    for stage in ("teacher", "distill", "rl"):
        rows = [json.loads(line) for line in (trained / "state" / stage / "log.jsonl").read_text().splitlines()]
        assert rows and all(torch.tensor(float(r["loss"])).isfinite() for r in rows)
        assert len(list((trained / "state" / stage / "samples").iterdir())) >= 1
    assert "reward" in rows[-1]


def test_public_checkpoint_and_ours(small, tmp_path):
    "MAR's layout and ours give the same teacher; the average is what is taken from MAR's."
    cfg = settings(small)
    ema = MAR(cfg.model)
    save_official(ema, tmp_path / "ema.pth", model_ema=load_weights(small / "teacher.safetensors"))
    kept = []
    for name, path in dict(a=small / "teacher.pth", b=small / "teacher.safetensors", c=tmp_path / "ema.pth").items():
        assert pipeline.run(override(cfg, [f"teacher.checkpoint={path}"]), ("teacher",), tmp_path / name) == {"teacher": "done"}
        kept.append(load_weights(tmp_path / name / "teacher.safetensors").state_dict())
    for other in kept[1:]: assert all(torch.equal(v, other[k]) for k, v in kept[0].items())
    pipeline.run(override(cfg, [f"teacher.checkpoint={tmp_path / 'ema.pth'}", "teacher.which=model"]), ("teacher",), tmp_path / "d")
    assert not torch.equal(load_weights(tmp_path / "d" / "teacher.safetensors").z_proj.weight, kept[0]["z_proj.weight"])


def test_sum_of_rewards(small, trained, tmp_path):
    "RL on a sum of two scores and two prompts: each part is logged, and the sum is what they add up to."
    shutil.copytree(trained, out := tmp_path / "run")
    for stage in ("rl", "evaluate"): shutil.rmtree(out / "state" / stage)
    torch.manual_seed(1)
    torch.save({"weight": torch.randn(1, 32), "bias": torch.zeros(1)}, small / "head.pth")
    (small / "prompts.txt").write_text("# two of them\na photo of {}\n\na painting of {}\n")
    files = f"clip={small / 'towers.bin'},aesthetic={small / 'head.pth'},aesthetic.tower={small / 'towers.bin'}"
    cfg = settings(small, "rl.reward=clip + 0.5 aesthetic", f"rl.reward_weights={files}", f"rl.reward_model=clip={small / 'towers.json'},aesthetic={small / 'towers.json'}", f"rl.prompts={small / 'prompts.txt'}", teacher="")
    assert pipeline.guarded(cfg, ("rl",), out) == (0, "")
    rows = [{k: float(v) for k, v in json.loads(line).items() if k.startswith("reward")} for line in (out / "state" / "rl" / "log.jsonl").read_text().splitlines()]
    assert rows
    for r in rows: assert r["reward"] == pytest.approx(r["reward_clip"] + 0.5 * r["reward_aesthetic"], rel=1e-4, abs=1e-4)


def test_figures(small, trained, tmp_path, monkeypatch):
    "With a reference, every model's FID and its kin stand in metrics.json; the network behind them is a small one here."
    from marval import features
    class Small(torch.nn.Module):
        def forward(self, x):
            f = x.float().mean((2, 3)) / 255
            return f, 10 * f
    whole = features.extractor
    monkeypatch.setattr(features, "inception_file", lambda path: path)
    monkeypatch.setattr(features, "extractor", lambda weights=None, device="cpu": whole(Small(), device=device))
    shutil.copytree(trained, out := tmp_path / "run")
    shutil.rmtree(out / "state" / "evaluate")
    few = settings(small, f"evaluate.reference={small / 'tree' / 'class 0'}", "evaluate.n=24", teacher="")
    status, why = pipeline.guarded(few, ("evaluate",), out)
    assert status == 2 and "the reference: 4 images" in why and not (out / "state" / "evaluate").exists()       # said before anything is drawn
    (small / "reals").mkdir()
    for p in (small / "tree").rglob("*.png"): shutil.copy(p, small / "reals" / f"{p.parent.name} {p.name}")
    assert pipeline.guarded(settings(small, f"evaluate.reference={small / 'reals'}", "evaluate.n=24", teacher=""), ("evaluate",), out) == (0, "")
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(metrics[m]["n"] == 24 and metrics[m]["fid"] > 0 and metrics[m]["warnings"] for m in MODELS)
    assert metrics["teacher"]["fid"] != metrics["student"]["fid"]


@pytest.mark.slow
def test_two_ranks(small, trained, tmp_path):
    "Two processes share the cache, the teacher, distillation and RL: the cache is the same file by file, the weights up to rounding."
    from test_parallel import start
    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(settings(small, teacher="").dict()))
    script = """
import json, sys
from pathlib import Path
from marval import pipeline
from marval.config import from_dict
cfg = from_dict(json.loads(Path(sys.argv[1]).read_text()))
pipeline.run(cfg, pipeline.select("all", cfg), Path(sys.argv[2]))
"""
    ranks = start(2, [str(config), str(out)], "-c", script)
    try: ended = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks: rank.kill()
    for rank, (_, err) in zip(ranks, ended): assert rank.returncode == 0, err
    files = lambda folder: {p.name: p.read_bytes() for p in (folder / "cache").iterdir()}
    assert files(out) == files(trained)
    for name in ("teacher", "student", "student_rl"):
        mine, theirs = (load_weights(f / f"{name}.safetensors").state_dict() for f in (out, trained))
        off = max(float((mine[k] - v).abs().max()) for k, v in theirs.items()) / max(float(v.abs().max()) for v in theirs.values())
        print(f"{name}: {off:.1e}")
        assert off < 1e-3


@pytest.mark.slow
def test_killed_anywhere(small, trained, tmp_path):
    "The job is killed once in each stage, the command repeated: the same bits as the run that nobody disturbed."
    from conftest import wait_for
    out, command = tmp_path / "run", ["--scale", "tiny", "--cluster", "local", "--out", tmp_path / "run", *options(small, teacher=None), "model.class_num=5"]
    for sign in ("state/teacher/checkpoint-*", "state/distill/checkpoint-*", "state/rl/checkpoint-*"):
        started = Launched(*command)
        wait_for(lambda: list(out.glob(sign)), started.process)
        started.signal(9)
        started.end()
        assert started.gone()
    status, _, err = Launched(*command).end()
    assert status == 0, err
    names = [f"{m}.safetensors" for m in ("teacher", "student", "student_rl")]
    assert digests(out, names) == digests(trained, names)


def refusal(cfg, out, stage="all"):
    with pytest.raises(BadInput) as e: pipeline.check(cfg, pipeline.select(stage, cfg), out)
    assert "\n" not in str(e.value)
    return str(e.value)


BAD = {
    "no data": (["data.path="], "--data is missing"),
    "data not there": (["data.path=nowhere"], "--data nowhere: no such folder"),
    "data is a file": (["data.path={small}/kl16.ckpt"], "no such folder"),
    "data without classes": (["data.path={small}/tree/class 0"], "has no class folders"),
    "too few classes": (["model.class_num=6"], "has 5 class folders; expected 6"),
    "no tokenizer": (["data.vae="], "--vae is missing"),
    "tokenizer not there": (["data.vae=nowhere.ckpt"], "--vae nowhere.ckpt: no such file"),
    "tokenizer is a teacher": (["data.vae={small}/teacher.pth"], "teacher.pth: tensor encoder.conv_in.bias is missing"),
    "tokenizer truncated": (["data.vae={small}/cut.ckpt"], "cut.ckpt: truncated"),
    "tokenizer of another stride": (["data.vae={small}/stride.ckpt"], "has stride 4 and 16 channels; expected 16 and 16"),
    "teacher not there": (["teacher.checkpoint=nowhere.pth"], "--teacher nowhere.pth: no such file"),
    "teacher is a tokenizer": (["teacher.checkpoint={small}/kl16.ckpt"], "kl16.ckpt: no state dict 'model_ema'"),
    "teacher truncated": (["teacher.checkpoint={small}/cut.pth"], "cut.pth: truncated"),
    "teacher runs code": (["teacher.checkpoint={small}/evil.pth"], "evil.pth: holds "),
    "teacher of another scale": (["teacher.checkpoint={small}/wide.pth"], "wide.pth is another network: width=128; expected width=64 (scale tiny)"),
    "no reward": (["rl.reward_weights="], "--reward is missing"),
    "reward not there": (["rl.reward_weights=nowhere.bin"], "--reward nowhere.bin: no such file"),
    "reward of digits": (["rl.reward=classifier"], "expected pickscore, clip"),
    "one file for a sum": (["rl.reward=clip + 0.5 aesthetic"], "one file for several rewards"),
    "a file of a sum not there": (["rl.reward=clip + 0.5 aesthetic", "rl.reward_weights=clip={small}/towers.bin,aesthetic=nowhere.pth,aesthetic.tower={small}/towers.bin"], "--reward nowhere.pth: no such file"),
    "prompts not there": (["rl.prompts=nowhere.txt"], "rl.prompts: cannot read nowhere.txt: No such file"),
    "no reference": (["evaluate.reference=nowhere.npz"], "evaluate.reference nowhere.npz: no such file"),
    "no Inception": (["evaluate.reference={small}/tree", "evaluate.inception=nowhere.pth"], "nowhere.pth"),
    "no names": (["data.names=nowhere.json"], "--names nowhere.json: no such file"),
}


@pytest.fixture(scope="module")
def broken(small):
    "The files that are no good."
    from marval.vae import KL16
    for name, whole in (("cut.ckpt", "kl16.ckpt"), ("cut.pth", "teacher.pth")): (small / name).write_bytes((small / whole).read_bytes()[:5000])
    torch.save({"model": KL16(ch=32, ch_mult=(1,) * 3, blocks=1, channels=16).state_dict()}, small / "stride.ckpt")
    save_official(MAR(override(preset("tiny"), ["model.class_num=5", "model.width=128"]).model), small / "wide.pth")
    class Evil:
        def __reduce__(self): return os.system, (f"touch {small}/ran",)
    torch.save({"model_ema": {}, "args": Evil()}, small / "evil.pth")
    return small


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, broken, tmp_path):
    "One line that names what was given and what is accepted; nothing is written, nothing is run."
    changes, clue = BAD[case]
    changes = [c.format(small=broken) for c in changes]
    cfg = settings(broken, *changes) if case != "too few classes" else settings(broken, classes=6, teacher="")
    assert clue in refusal(cfg, tmp_path / "run") and not (tmp_path / "run").exists() and not (broken / "ran").exists()


def test_damaged_cache(small, trained, tmp_path):
    "Another tokenizer, a shard cut short, a shard of another cache: each is named before a stage starts."
    cfg = settings(small, teacher="")
    def copy(name):
        shutil.copytree(trained, out := tmp_path / name)
        for stage in ("distill", "rl", "evaluate"): shutil.rmtree(out / "state" / stage)
        return out
    torch.save({"model": {k: v + 1 for k, v in torch.load(small / "kl16.ckpt")["model"].items()}}, small / "other.ckpt")
    assert "was made by the tokenizer" in refusal(override(cfg, [f"data.vae={small}/other.ckpt"]), copy("other"), "distill")
    cut = copy("cut")
    shard = cut / "cache" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    assert "has another size; run --stage cache" in refusal(cfg, cut, "distill")
    gone = copy("gone")
    (gone / "cache" / "manifest.json").unlink()
    assert "distill needs cache/manifest.json" in refusal(cfg, gone, "distill")


def test_a_flipped_byte_in_the_cache(small, trained, tmp_path):
    """A stage stops at the image that has changed and names the file; without that file the same command makes it
    anew, and what comes out are the weights of a run that nobody disturbed."""
    cfg = settings(small, teacher="")
    shutil.copytree(trained, out := tmp_path / "run")
    for stage in ("distill", "rl", "evaluate"): shutil.rmtree(out / "state" / stage)
    for name in ("student.safetensors", "student_rl.safetensors"): (out / name).unlink()
    shard = out / "cache" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    status, said = pipeline.guarded(cfg, ("distill",), out)
    assert status == 2 and "shard-00000.safetensors is damaged" in said and "remove it" in said
    assert not (out / "student.safetensors").exists()
    shard.unlink()
    assert pipeline.guarded(cfg, ("cache", "distill"), out) == (0, "")
    assert digests(out, ["student.safetensors"]) == digests(trained, ["student.safetensors"])
    assert shard.read_bytes() == (trained / "cache" / shard.name).read_bytes()


def test_guard_and_watch(small, trained, tmp_path):
    "RL that is measured by a second text reward, and ends where that falls; what it was measured by is in the log, why it ended in done.json and, after an evaluation, in metrics.json."
    shutil.copytree(trained, out := tmp_path / "run")
    for stage in ("rl", "evaluate"): shutil.rmtree(out / "state" / stage)
    more = ["rl.watch=clip", f"rl.watch_weights={small / 'towers.bin'}", "rl.metric_every=2", "log.metric_n=20"]
    cfg = settings(small, *more, "rl.guard=watch 1e-9, diversity 1e-9", "rl.lr=1e-2", "rl.anchor=0", teacher="")
    assert pipeline.run(cfg, ("rl", "evaluate"), out) == {"rl": "done", "evaluate": "done"}
    rows = [r for r in map(json.loads, (out / "state" / "rl" / "log.jsonl").read_text().splitlines()) if "score" in r]
    assert rows[0]["step"] == 0 and all(r["watch"] == pytest.approx(r["score"], rel=1e-5) and 0 < r["diversity"] < 2 for r in rows)
    said = json.loads((out / "state" / "rl" / "done.json").read_text())["stopped"]
    assert f"ended at step {rows[-1]['step']} of 8" in said and json.loads((out / "metrics.json").read_text())["rl_stopped"] == said
    for guard, clue in (("fd 0.1", "fd is not measured on photographs"), ("diversity", "no guard")): assert clue in refusal(override(cfg, [f"rl.guard={guard}"]), tmp_path / "new")
    assert "rl.watch_weights nowhere.bin: no such file" in refusal(override(cfg, ["rl.watch_weights=nowhere.bin"]), tmp_path / "new")


def test_best_of(small, trained, tmp_path):
    "The command's picture is made of the candidates that the run's reward likes best."
    from marval.cli import load, sample_cli
    from marval.stages import road
    from marval.journal import image_grid, save_png
    from marval.train import step_seed
    argv = ["--weights", str(trained / "student.safetensors"), "--vae", str(small / "kl16.ckpt"), "--labels", "0", "4", "--n", "2", "--best-of", "3", "--out", str(tmp_path / "best.png")]
    assert sample_cli(argv) == 0 and sample_cli([*argv[:-1], str(tmp_path / "same.png"), "--reward", str(small / "towers.bin")]) == 0
    sampler, reward, labels = load(trained / "student.safetensors", vae=small / "kl16.ckpt"), road(settings(small, teacher=""), trained).reward(), torch.tensor([0, 0, 4, 4])
    images = torch.stack([sampler.sample(labels, seed=s) for s in (0, step_seed(0, "best-of", 1), step_seed(0, "best-of", 2))])
    winner = torch.stack([reward(x, labels) for x in images]).argmax(0)
    assert winner.sum() > 0
    save_png(tmp_path / "mine.png", image_grid(images[winner, torch.arange(4)], columns=2))
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in ("best", "same", "mine")}) == 1
