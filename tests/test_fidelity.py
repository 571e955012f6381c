"""FID and its company under real processes: two ranks, a kill, the command line; and Inception itself, with
random weights."""
import json
import os
import re
import signal
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import contents
from PIL import Image
from test_parallel import start

FIGURES = ("n", "fid", "fid_infinity", "is_mean", "is_std", "kid", "kid_std", "precision", "recall",
           "n_reference", "extractor", "warnings")


def register():
    "A small extractor for torch-fidelity: 8 features, 10 logits."
    import torch_fidelity as tf
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

    class Small(tf.FeatureExtractorBase):
        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                self.conv, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 10)

        def forward(self, x):
            f = self.conv(x.float() / 255).relu().mean((2, 3)) * 10
            return tuple({"features": f, "logits": self.head(f)}[k] for k in self.features_list)

        @staticmethod
        def get_provided_features_list(): return "features", "logits"
        @staticmethod
        def get_default_feature_layer_for_metric(metric): return "logits" if metric == "isc" else "features"

    if "small" not in FEATURE_EXTRACTORS_REGISTRY: tf.register_feature_extractor("small", Small)


def work(jobs):
    "The command, several times; `die` = n: killed at its n-th draw. Says how often it drew."
    from marval.cli import Sampler
    from marval.evaluate_cli import evaluate_cli
    register()
    torch.set_num_threads(1)
    sample = Sampler.sample
    for argv, die in jobs:
        draws = 0
        def counted(*args):
            nonlocal draws
            draws += 1
            if draws == die: os.kill(os.getpid(), signal.SIGKILL)
            return sample(*args)
        Sampler.sample = counted
        status = evaluate_cli(argv)
        for stream in (sys.stdout, sys.stderr):
            print(f"== status {status}, drew {draws}", file=stream, flush=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A student with random weights, references of every kind, files that are none."
    from marval.config import preset
    from marval.data import load_digits_data
    from marval.features import extract, extractor
    from marval.fidelity import save_statistics, statistics
    from marval.images import dataset_images
    from marval.mar import MAR, save_weights
    register()
    folder, cfg = tmp_path_factory.mktemp("fidelity"), preset("smoke")
    torch.manual_seed(0)
    net = MAR(cfg.model)
    for p in net.parameters(): p.data += 0.05 * torch.randn_like(p)
    save_weights(net, folder / "student.safetensors", stage="student", **asdict(cfg.sampling))
    real = load_digits_data()[0][:150]
    np.savez(folder / "digits.npz", (real.expand(-1, 3, -1,
                                                 -1) * 255).round().byte().permute(0, 2, 3, 1).numpy())
    save_statistics(folder / "stats.npz", statistics(extract(dataset_images(real),
                                                             extractor("small"))["features"]))
    np.savez(folder / "narrow.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(folder / "crooked.npz", mu=np.zeros(5), sigma=np.eye(6))
    np.savez(folder / "others.npz", labels=np.zeros(5))
    (folder / "text.npz").write_text("statistics, honestly")
    (folder / "empty").mkdir()
    (folder / "four").mkdir()
    for i in range(4): Image.new("RGB", (8, 8)).save(folder / "four" / f"{i}.png")
    (folder / "one bad").mkdir()
    for i in range(20): Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / "one bad" / f"{i:02d}.png")
    (folder / "one bad" / "07.png").write_bytes(b"no picture")
    torch.save({"conv": torch.zeros(2)}, folder / "foreign.pth")
    return folder


def command(folder, *more, reference="digits.npz"):
    return ["--weights", str(folder / "student.safetensors"), "--n", "73", "--batch", "10", "--device", "cpu",
            "--reference", str(folder / reference), "--extractor", "small", *map(str, more)]


@pytest.fixture(scope="module")
def ended(folder, tmp_path_factory):
    """Result files: `one`, by this process; `two`, by two ranks; `killed`, at the fourth draw (the first is
    a rehearsal), by one, and gone on with by two. What had been kept of the last. What the two ranks
    said of `two`, of `killed`, and of a folder with a bad picture in the second rank's batch: per job
    and rank stdout, stderr and status."""
    from marval.evaluate_cli import evaluate_cli
    out, threads = tmp_path_factory.mktemp("ended"), torch.get_num_threads()
    argv = lambda name: command(folder, "--out", out / name / "result.json")
    dying, = start(1, [json.dumps([(argv("killed"), 4)])], __file__)
    torch.set_num_threads(1)
    assert evaluate_cli(argv("one")) == 0
    torch.set_num_threads(threads)
    dying.communicate(timeout=300)
    kept = sorted(p.name for p in (out / "killed").rglob("*.safetensors"))
    assert dying.returncode == -signal.SIGKILL
    bad = ["--images", str(folder / "one bad"), "--batch", "5", "--reference", str(folder / "stats.npz"),
           "--extractor", "small", "--device", "cpu"]
    ranks = [(*rank.communicate(timeout=300), rank.returncode)
             for rank in start(2, [json.dumps([([*argv("two"), "--time", "2"], 0), (argv("killed"), 0),
                                               (bad, 0)])], __file__)]
    assert [rc for *_, rc in ranks] == [0, 0], ranks
    parts = [[re.findall(r"(.*?)== (status \d, drew \d+)\n", text, re.S) for text in rank[:2]]
             for rank in ranks]
    said = [[(o[job][0], e[job][0], o[job][1]) for o, e in parts] for job in range(3)]
    return {name: json.loads((out / name / "result.json").read_text())
            for name in ("one", "two", "killed")}, kept, said


def assert_alike(a, b, keys=FIGURES[:-2]):
    """Two computations of the same figures: equal within rounding, which may move an image over the edge of
    a ball."""
    for k in keys:
        assert a[k] == pytest.approx(b[k], rel=1e-4, abs=0.03 if k in ("precision", "recall") else 1e-9), k
    assert a["extractor"] == b["extractor"] and len(a["warnings"]) == len(b["warnings"])


def test_two_ranks_are_one(ended):
    "Within rounding; said once."
    results, _, ((out, err, status), (out2, err2, status2)) = ended[0], ended[1], ended[2][0]
    assert_alike(results["two"], results["one"])
    assert results["two"]["images"] == results["one"]["images"]
    assert (results["one"]["ranks"], results["two"]["ranks"], results["one"]["n"]) == (1, 2, 73)
    assert out.count("FID") == 1 and out2 == ""
    for said in ("FID of 73 images is biased upwards", "The Inception score of 73 images is biased"):
        assert err.count(f"warning: {said}") == 1
    assert err2 == ""
    # 8 batches, and a rehearsal each; three single images timed by the first
    assert (status, status2) == ("status 0, drew 8", "status 0, drew 5")
    assert results["one"]["time"] is None and results["two"]["time"]["rounds"] == 2
    assert results["two"]["time"]["seconds"] > 0


def test_killed_goes_on(ended):
    """Two batches were kept when it was killed; two ranks draw the other six, and the figures are those of
    one that nobody disturbed."""
    results, kept, said = ended
    assert kept == ["0000000-0000010.safetensors", "0000010-0000020.safetensors"]
    assert [status for *_, status in said[1]] == ["status 0, drew 4"] * 2
    assert_alike(results["killed"], results["one"])


def test_refusal_reaches_both(ended):
    (_, err, status), (_, err2, status2) = ended[2][2]
    assert status == status2 == "status 2, drew 0" and err.count("error:") == 1 and "07.png" in err
    assert err2 == ""


def test_all_roads_give_the_same(folder, ended, tmp_path, capsys):
    """The sampler's images as files and as an array; the reference as images and as statistics; a longer
    evaluation from a shorter one's features."""
    from marval.evaluate_cli import evaluate_cli, network_images
    from marval.images import to_bytes
    images = network_images(folder / "student.safetensors", 73, batch=10)
    pixels = torch.cat([to_bytes(images.read(*s)) for s in images.stretches()]).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "samples.npz", pixels)
    (tmp_path / "png").mkdir()
    for i, x in enumerate(pixels): Image.fromarray(x).save(tmp_path / "png" / f"{i:05d}.png")
    end = ["--batch", "10", "--device", "cpu", "--extractor", "small", "--out", str(tmp_path / "result.json")]
    one = ended[0]["one"]
    for source in ("samples.npz", "png"):
        for reference in ("digits.npz", "stats.npz"):
            assert evaluate_cli(["--images", str(tmp_path / source), "--reference", str(folder / reference),
                                 *end]) == 0
            result = json.loads((tmp_path / "result.json").read_text())
            if reference == "digits.npz": assert_alike(result, one)
            else:
                for k in ("n", "fid", "is_mean"): assert result[k] == pytest.approx(one[k], rel=1e-4), k
    assert "KID" not in capsys.readouterr().out.splitlines()[-1] and result["precision"] is None
    assert result["reference"]["kind"] == "statistics"


def test_photographs(tmp_path, capsys):
    "Latents and their tokenizer, random weights, by the teacher's chain; and the tokenizer is asked for."
    from test_imagenet import write_files
    from marval.evaluate_cli import evaluate_cli
    from marval.files import sha256
    register()
    folder = write_files(tmp_path, 3)
    np.savez(folder / "real.npz", np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8))
    argv = ["--weights", str(folder / "teacher.pth"), "--teacher-chain", "2", "--K", "2", "--cfg", "1.5",
            "--n", "6", "--batch", "4", "--reference", str(folder / "real.npz"), "--extractor", "small",
            "--device", "cpu"]
    assert evaluate_cli([*argv, "--vae", str(folder / "kl16.ckpt"), "--out",
                         str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["fid"] > 0
    assert {k: result["images"][k] for k in ("K", "cfg", "chain_steps",
                                             "classes")} == dict(K=2, cfg=1.5, chain_steps=2, classes=3)
    assert result["images"]["vae_sha256"] == sha256(folder / "kl16.ckpt")
    assert result["images"]["weights_sha256"] == sha256(folder / "teacher.pth")
    capsys.readouterr()
    assert evaluate_cli(argv) == 2 and "--vae" in capsys.readouterr().err


BAD = {"neither": (["--reference", "stats.npz"], "--weights"),
       "both": (["--images", "four", "--weights", "student.safetensors"], "both"),
       "no reference": (["--images", "four"], "--reference"),
       "option of a network": (["--images", "one bad", "--cfg", "2"], "--cfg"),
       "few images": (["--images", "four"], "4 images"), "no images": (["--images", "empty"], "empty"),
       "no folder": (["--images", "nowhere"], "nowhere"), "bad picture": (["--images", "one bad"], "07.png"),
       "file of other things": (["--images", "stats.npz"], "arr_0"),
       "no weights": (["--weights", "none.safetensors"], "none.safetensors"),
       "K": (["--weights", "student.safetensors", "--K", "17"], "K=17"),
       "cfg of a student": (["--weights", "student.safetensors", "--cfg", "2"], "cfg=2"),
       "n": (["--weights", "student.safetensors", "--n", "4"], "--n: 4"),
       "n no number": (["--weights", "student.safetensors", "--n", "many"], "many"),
       "batch": (["--weights", "student.safetensors", "--batch", "0"], "--batch: 0"),
       "statistics of another extractor": (["--weights", "student.safetensors", "--reference", "narrow.npz"],
                                           "5 features"),
       "statistics that don't fit": (["--weights", "student.safetensors", "--reference", "crooked.npz"],
                                     "sigma"),
       "no statistics": (["--weights", "student.safetensors", "--reference", "others.npz"], "mu"),
       "text": (["--weights", "student.safetensors", "--reference", "text.npz"], "text.npz"),
       "no such reference": (["--weights", "student.safetensors", "--reference", "none.npz"], "none.npz"),
       "unknown extractor": (["--weights", "student.safetensors", "--extractor", "large"], "large"),
       "no Inception": (["--weights", "student.safetensors", "--extractor", "inception-v3-compat"],
                        "--inception"), "Inception not there": (["--weights", "student.safetensors",
                                                                 "--extractor", "inception-v3-compat",
                                                                 "--inception", "none.pth"], "none.pth"),
       "foreign Inception": (["--weights", "student.safetensors", "--extractor", "inception-v3-compat",
                              "--inception", "foreign.pth"], "foreign.pth"),
       "out": (["--weights", "student.safetensors", "--out", "result.txt"], "result.txt"),
       "reward without names": (["--weights", "student.safetensors", "--reward", "clip", "--reward-weights",
                                 "clip.pt"], "--names"),
       "weights without reward": (["--weights", "student.safetensors", "--reward-weights", "clip.pt"],
                                  "--reward-weights without --reward"),
       "a weight too many": (["--weights", "student.safetensors", "--reward", "clip", "--reward-weights", "a",
                              "--reward-weights", "b"], "2 --reward-weights for 1"),
       "reward of a folder": (["--images", "one bad", "--reward", "clip"], "--reward"),
       "model of a network": (["--weights", "student.safetensors", "--model", "ADM"], "--model"),
       "time": (["--weights", "student.safetensors", "--time", "0"], "--time: 0"),
       "tables and more": (["--tables", "."], "--tables with --reference"),
       "unwritable": (["--weights", "student.safetensors", "--out", "student.safetensors/result.json"],
                      "cannot write student.safetensors"), }


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, folder, monkeypatch, capsys, tmp_path):
    from marval.evaluate_cli import evaluate_cli
    argv, clue = BAD[case]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    before = contents(folder)
    for option, value in (("--reference", "stats.npz"), ("--extractor", "small"), ("--device", "cpu")):
        if option not in argv and (case, option) != ("no reference", "--reference"):
            argv = [*argv, option, value]
    assert evaluate_cli(argv) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "error: " in line]
    assert out == "" and len(said) == 1 and clue in said[0] and contents(folder) == before
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    "A file in the layout of Inception's weights, random numbers inside."
    from torch_fidelity import feature_extractor_inceptionv3 as module
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    for p in net.parameters():
        if p.dim() == 4: torch.nn.init.kaiming_normal_(p, nonlinearity="relu")
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def test_inception_from_a_file(inception):
    "Its layers in the right places, and torch-fidelity's own numbers."
    from torch_fidelity.utils import create_feature_extractor
    from marval.features import extractor
    from marval.files import sha256
    net, x = extractor(weights=inception), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8,
                                                         generator=torch.Generator().manual_seed(0))
    theirs = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], cuda=False,
                                      feature_extractor_weights_path=str(inception), verbose=False)(x)
    ours = net(x)
    assert net.digest == sha256(inception)
    assert [list(v.shape) for v in ours.values()] == [[2, 2048], [2, 1008]]
    assert ours["features"].std() > 0
    for mine, reference in zip(ours.values(), theirs):
        assert torch.allclose(mine, reference, rtol=1e-3, atol=1e-4 * reference.abs().max())


def test_download(inception, tmp_path, monkeypatch):
    "Only if asked for; refused in one line where the network or the file is bad; kept for the next time."
    from torch_fidelity import feature_extractor_inceptionv3 as module
    from marval.config import BadInput
    from marval.features import extractor, inception_file
    from marval.files import sha256
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    served = tmp_path / f"weights-{sha256(inception)[:8]}.pth"
    served.symlink_to(inception)
    wrong = ("http://127.0.0.1:9/weights-00000000.pth", f"file://{tmp_path}/none-00000000.pth",
             f"file://{inception}")
    for url in wrong:
        monkeypatch.setattr(module, "URL_INCEPTION_V3", url)
        with pytest.raises(BadInput, match="expected") as refusal: extractor(download=True)
        assert "\n" not in str(refusal.value) and not (tmp_path / "torch").exists()
    monkeypatch.setattr(module, "URL_INCEPTION_V3", f"file://{served}")
    with pytest.raises(BadInput, match="fetch file://"): extractor()
    assert extractor(download=True).digest == sha256(inception) == sha256(inception_file())


if __name__ == "__main__": work(json.loads(sys.argv[1]))
