"The latent cache under real processes: killed at any moment, several at once; and the loader in processes of its own."
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import contents, environment, wait_for
from PIL import Image

SCRIPT = '''
import os, signal, sys, time
from pathlib import Path
import torch
from marval.data import index_tree
from marval.latents import LatentCache, LatentLoader, build_cache
torch.set_num_threads(1)
what, tree, out, rank, world = *sys.argv[1:4], *map(int, sys.argv[4:6])

calls = 0

def encode(x): # not an autoencoder: block averages, and time enough to be killed in
    global calls
    calls += 1
    if what == "die" and calls == 10: os.kill(os.getpid(), signal.SIGKILL)     # in the third shard
    if what != "everywhere": time.sleep(0.03)
    colours = torch.nn.functional.avg_pool2d(x, 8)
    return torch.cat([colours, -colours], 1)

def build(out=out, shard=8, batch=4): build_cache(index_tree(tree), encode, out, 32, "stand-in", shard=shard, batch=batch, max_bad=1, workers=2, rank=rank, world=world, patience=600., progress=False)


def child(folder, n=0):
    "Build a cache of three shards in a process of its own, which dies at its n-th call that changes a file. Returns whether it died."
    if pid := os.fork():
        status = os.waitpid(pid, 0)[1]
        assert status in (0, signal.SIGKILL), status
        return bool(status)
    try:
        calls = 0
        for name in ("fsync", "replace"):
            def call(*args, real=getattr(os, name), **kwargs):
                nonlocal calls
                calls += 1
                if calls == n: os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(os, name, call)
        build(folder, 40, 32)
        os._exit(0)
    except BaseException: os._exit(1)


def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


print("ready", flush=True)
if what in ("build", "die"): build()
elif what == "everywhere":
    out, n = Path(out), 1
    child(out/"calm")
    while child(out/f"{n}", n):
        before = files(out/f"{n}")
        assert "manifest.json" not in before or before == files(out/"calm"), n
        assert not child(out/f"{n}") and files(out/f"{n}") == files(out/"calm"), n
        n += 1
    print(n - 1, "kills")
elif what == "load":
    loader = LatentLoader(LatentCache(out, vae="stand-in", full=True), 12, 7, "distill", rank, world)
    torch.save([loader(i) for i in (9, 10, 2)], f"{tree}/loaded-{world}-{rank}.pt")
    loader.close()
'''


def start(what, tree, out, rank=0, world=1):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, what, str(tree), str(out), str(rank), str(world)],
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())


def finish(process, timeout=900):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def files(folder): return {str(name): content for name, (content, _) in contents(folder).items()}


def shards(folder): return len(list(folder.glob("shard-*.json")))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A tree of 96 images and one that is broken, and its cache, built by one process that nobody disturbed."
    base, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for k in range(96):
        path = base / "tree" / f"class {k % 3}" / f"{k:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), np.uint8)).save(path)
    (base / "tree" / "class 1" / "broken.jpg").write_bytes(b"not an image")
    finish(start("build", base / "tree", base / "cache"))
    return base / "tree", base / "cache"


def test_killed_at_random_moments(made, tmp_path):
    "SIGKILL at five moments, each some shards further on; then to the end. The same files, nothing else."
    tree, cache = made
    seed, out = time.time_ns(), tmp_path / "cache"
    rng = random.Random(seed)
    print("seed of the moments:", seed)
    for kill in range(5):
        process = start("build", tree, out)
        assert wait_for(lambda: shards(out) >= 2 * kill, process)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL and not (out / "manifest.json").exists(), "it had ended before"
    assert shards(out) >= 8
    finish(start("build", tree, out))
    assert files(out) == files(cache)


def test_killed_at_every_change_of_a_file(made, tmp_path):
    """A process that dies at its n-th fsync or rename, for every n that there is, and another that goes on. The same files each time. Three shards and their records, index and
    manifest are eight files, each with two fsyncs (file, folder) and a rename."""
    assert finish(start("everywhere", made[0], tmp_path)).split() == ["ready", "24", "kills"]


def test_two_ranks_at_once(made, tmp_path):
    "Both at the same time; the same files as from one process."
    tree, cache = made
    both = [start("build", tree, tmp_path / "cache", rank, 2) for rank in (0, 1)]
    for process in both: finish(process)
    assert files(tmp_path / "cache") == files(cache)


def test_one_rank_of_two_is_killed(made, tmp_path):
    "Rank 0 waits for what rank 1 did not get done, and goes on when another process does it."
    tree, cache = made
    out = tmp_path / "cache"
    first, second = start("build", tree, out, 0, 2), start("die", tree, out, 1, 2)
    second.communicate()
    assert wait_for(lambda: (out / "shard-00012.json").exists(), first) and first.poll() is None
    assert second.returncode == -signal.SIGKILL and shards(out) == 9 and not (out / "manifest.json").exists()
    finish(start("build", tree, out, 1, 2))
    finish(first)
    assert files(out) == files(cache)


def test_ranks_load_one_batch(made, tmp_path):
    "The shares of three processes, put together, are the batch of one."
    import torch
    tree, cache = made
    (tmp_path / "loaded").mkdir()
    for process in [start("load", tmp_path / "loaded", cache, rank, world) for world in (1, 3) for rank in range(world)]: finish(process)
    load = lambda world, rank: torch.load(tmp_path / "loaded" / f"loaded-{world}-{rank}.pt", weights_only=True)
    single = load(1, 0)
    assert len({z.sum().item() for z, _ in single}) == 3
    for rank in range(3):
        for (z, labels), (all_z, all_labels) in zip(load(3, rank), single):
            assert torch.equal(z, all_z.chunk(3)[rank]) and torch.equal(labels, all_labels.chunk(3)[rank])
