"Trees, caches and files from strangers: what can't be used is refused in one line, soon."
import hashlib
import io
import json
import os
import shutil
import socket
import struct
import warnings
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from marval.border import BadInput
from marval.data import BadImage, class_names, index_tree, load_image, load_images
from marval.files import sha256
from marval.latents import LatentCache, build_cache

quick = settings(max_examples=60, deadline=None, derandomize=True)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8)


def refusal(f, *args, **kwargs):
    "The line of a call that has to be refused."
    found = outcome(f, *args, **kwargs)
    assert isinstance(found, BadInput), found
    return str(found)


def picture(path, size=(20, 24), seed=0):
    "An image of random colours."
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(w, h, data=b"", *more):
    "A PNG of 8-bit grey; its data may be anything."
    head = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    chunks = [chunk(b"IHDR", head), *more, chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(kind, size=(40, 30), mode="RGB", **options):
    "An image in a format of Pillow's."
    Image.new(mode, size).save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def tiff(entries, following=0):
    "A TIFF with these entries (tag, type, count, value) and a link to the next folder of entries."
    body = b"".join(struct.pack("<HHII", *e) for e in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", following)


def tiff_of(w, h, following=0):
    return tiff([(256, 4, 1, w), (257, 4, 1, h), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1),
                 (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, w * h % 2**32)], following)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"
PICTURES = {
    "empty.png": b"", "one byte.jpg": b"\xff", "text.png": b"hello\n", "page.jpg": b"<html></html>",
    "zeros.png": bytes(4096),
    "wide.png": png(1_000_000, 1, bytes(1_000_001)), "tall.png": png(1, 60_000, bytes(120_000)),
    "tall one.bmp": saved("BMP", (1, 9000)),
    "bomb.png": png(30_000, 30_000), "bomb of a billion.png": png(2**31 - 1, 2**31 - 1),
    "claim.png": png(9000, 9000), "large claim.png": png(12_000, 9000),
    "nothing wide.png": png(0, 20), "nothing high.png": png(20, 0),
    "cut.jpg": saved("JPEG", (400, 300))[:700],
    "bomb.ppm": b"P6 100000 100000 255\n", "negative.ppm": b"P6 -5 -5 255\n",
    "words.ppm": b"P3 9 9 255\nred green blue", "comment.ppm": b"P6 #" + b"x" * 10**6,
    "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 2**31 - 1, -2**31, 1, 24, *[0] * 6),
    "bomb.tif": tiff_of(2**31, 2**31), "long.tif": tiff_of(2**30, 1), "loop.tif": tiff_of(90_000, 20, 8),
    "entries.tif": tiff([(256, 4, 2**32 - 1, 0)]), "float.tif": saved("TIFF", mode="F"),
    "cut.webp": saved("WEBP")[:30],
    "bomb.webp": b"RIFF\x1e\0\0\0WEBPVP8X\n\0\0\0\2\0\0\0" + b"\xff\xff\xff" * 2 + bytes(20),
    "text.gif.png": b"GIF89a", "postscript.jpg": EPS, "icon.png": saved("ICO"), "targa.tif": saved("TGA"),
    "jpeg2000.jpg": saved("JPEG2000"), "pdf.jpg": b"%PDF-1.4\n",
    "words.png": png(20, 20, bytes(420), chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(10**8), 9))),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(tmp_path, name):
    "No picture, or one too large: its reason is one line, nothing is run, and the images beside it are read."
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / name).write_bytes(PICTURES[name])
    picture(tmp_path / "a" / "good.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of pictures beyond its own bound
        (images, notes), = load_images(tree := index_tree(tmp_path), range(2), 16, workers=2)
    bad, good = (tree.files.index(f"a/{n}") for n in (name, "good.png"))
    assert notes[good] == "RGB" and images[good].any() and not images[bad].any()
    assert isinstance(notes[bad], BadImage) and len(notes[bad].reason) < 250
    assert str(notes[bad]).isprintable() and name in str(notes[bad])


def test_postscript_is_never_run(tmp_path, monkeypatch):
    "A page in PostScript under the name of a photograph: Pillow would give it to Ghostscript."
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "page.jpg").write_bytes(EPS)
    assert "no known image format" in refusal(load_image, tmp_path / "page.jpg", 16)
    assert not (tmp_path / "ran").exists()


def special(folder, kind):
    "Something in a folder that is no regular file. Returns its path."
    path = folder / "x.png"
    if kind == "pipe": os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as s: s.bind(os.path.relpath(path))
    elif kind == "folder": path.mkdir()
    elif kind == "large":
        with open(path, "wb") as f: f.truncate(1 << 40)
    else:
        os.mkfifo(folder / "fifo")
        (folder / "sub").mkdir()
        target = dict(zero="/dev/zero", memory="/proc/self/mem", link_pipe=folder / "fifo",
                      link_folder=folder / "sub", gone=folder / "gone", loop=path)
        path.symlink_to(target[kind])
    return path


@pytest.mark.parametrize("kind", [
    "pipe", "socket", "folder", "large", "zero", "memory", "link_pipe", "link_folder", "gone", "loop"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    "Pipes and folders are no images; a link is followed: it is a bad image, or one that can't be read."
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a" / "good.png")
    path = special(tmp_path / "a", kind)
    tree = index_tree(tmp_path)
    assert (f"a/{path.name}" in tree.files) == (kind not in ("pipe", "socket", "folder"))
    found = outcome(load_image, path, 16)
    assert isinstance(found, BadInput)
    assert isinstance(found, BadImage) == (kind not in ("gone", "loop", "memory"))


def test_they_count_as_bad(tmp_path):
    "What is no picture is skipped up to `max_bad`, named in the manifest, and refused beyond."
    for k in range(3): picture(tmp_path / "tree" / "a" / f"{k}.png", seed=k)
    (tmp_path / "tree" / "a" / "endless.png").symlink_to("/dev/zero")
    (tmp_path / "tree" / "a" / "bomb.png").write_bytes(PICTURES["bomb of a billion.png"])
    tree = index_tree(tmp_path / "tree")
    said = refusal(build, tree, tmp_path / "cache", max_bad=1)
    assert "2 of 5 images cannot be decoded" in said and "a/endless.png (not a regular file)" in said
    assert sorted(build(tree, tmp_path / "cache", max_bad=2).skipped) == ["a/bomb.png", "a/endless.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read(tmp_path):
    path = picture(tmp_path / "a" / "1.png")
    path.chmod(0)
    assert not isinstance(outcome(load_image, path, 16), BadImage)
    path.parent.chmod(0)
    assert "Permission denied" in refusal(index_tree, tmp_path)
    path.parent.chmod(0o700)


def named(root, name, where):
    "A tree in which one folder or one file has this name, as bytes."
    folder = os.path.join(os.fsencode(root), name if where == "class" else b"a")
    os.makedirs(folder)
    file = b"1.png" if where == "class" else name + b".png"
    shutil.copy(picture(root.parent / "good.png"), os.path.join(folder, file))


@pytest.mark.parametrize("where", ["class", "file"])
@pytest.mark.parametrize("name", [
    b"caf\xe9", b"\xff\xfe", b"a\nb", b"\x1b[2Jb", b"\x7f", "a\x85b".encode(), b"\xed\xa0\x80"])
def test_names_that_cannot_be_written(tmp_path, name, where):
    named(tmp_path / "tree", name, where)
    assert "expected it to be renamed" in refusal(index_tree, tmp_path / "tree")


@pytest.mark.parametrize("where", ["class", "file"])
@pytest.mark.parametrize("name", [
    "café", "狐", "a\u202fb", "-rf", "'\"`$(x)", "%s{}", "x" * 240, "CON", "a\\b", "\U0001f98a"])
def test_names_that_are_fine(tmp_path, name, where):
    named(tmp_path / "tree", name.encode(), where)
    tree = index_tree(tmp_path / "tree")
    assert len(tree) == 1 and len(load_image(tree.root / tree.files[0], 16)) == 3 and len(tree.digest) == 64
    assert class_names(tree.classes) == (" ".join((name if where == "class" else "a").split()),)


@pytest.mark.parametrize("root", [
    "", "nowhere", "file", "pipe", "a\0b", "\ud800", "x" * 300, "y/" * 3000, "/dev/null", "empty", "deep",
    "images", "loop", "selves"])
def test_what_is_no_tree(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "deep" / "a" / "b" / "1.png")
    picture(tmp_path / "images" / "1.png")
    for name, target in (("loop", "a"), ("selves", ".")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").symlink_to(target)
    assert "expected" in refusal(index_tree, root)


def test_trees_that_are_one(tmp_path):
    "Classes by the thousand, that differ in case alone, or are links; an image that is there twice."
    good = picture(tmp_path / "good.png")
    for k in range(2000):
        (folder := tmp_path / "tree" / f"c{k:05d}").mkdir(parents=True)
        os.link(good, folder / "1.png")
    for name in ("c00000x", "C00000X"): (tmp_path / "tree" / name).symlink_to(tmp_path / "tree" / "c00000")
    tree = index_tree(tmp_path / "tree")
    assert len(tree.classes) == 2002 and tree.classes[0] == "C00000X"
    assert tree.labels.tolist() == list(range(2002))
    (images, _), = load_images(tree, [0, 1, 2], 16)
    assert images[0].equal(images[1]) and images[1].equal(images[2])


NAMES = {
    "empty": b"", "list": b'["fox", "newt"]', "null": b"null", "number": b"3", "text": b'"fox"',
    "null for a name": b'{"a": null, "b": "newt"}', "number for a name": b'{"a": 1, "b": "newt"}',
    "list for a name": b'{"a": ["fox", "vixen"], "b": "newt"}',
    "table for a name": b'{"a": {"name": "fox"}, "b": "newt"}', "true": b'{"a": true, "b": "newt"}',
    "nan": b'{"a": NaN, "b": "newt"}',
    "one lacks": b'{"a": "fox"}', "blank": b'{"a": " ", "b": "newt"}',
    "comma": b'{"a": ", fox", "b": "newt"}', "underscore": b'{"a": "_", "b": "newt"}',
    "NUL": b'{"a": "f\\u0000x", "b": "newt"}', "escape": b'{"a": "\\u001b[2Jfox", "b": "newt"}',
    "surrogate": b'{"a": "\\udcff", "b": "newt"}', "format": b'{"a": "fo\\u202ex", "b": "newt"}',
    "long": json.dumps({"a": "fox" * 5000, "b": "newt"}).encode(), "binary": bytes(range(256)),
    "UTF-16": '{"a": "fox", "b": "newt"}'.encode("utf-16"), "latin": b'{"a": "caf\xe9", "b": "newt"}',
    "deep": b'{"a":' * 100_000, "cut": b'{"a": "fox", "b": "ne', "two": b'{"a": "fox", "b": "newt"} {}',
}


@pytest.mark.parametrize("case", NAMES)
def test_names_files(tmp_path, case):
    path = tmp_path / "names.json"
    path.write_bytes(NAMES[case])
    assert "names.json" in refusal(class_names, ("a", "b"), path)


@quick
@given(table=plain, classes=st.lists(st.text(max_size=5), max_size=3, unique=True))
def test_anything_as_names(tmp_path_factory, table, classes):
    path = tmp_path_factory.mktemp("names") / "names.json"
    path.write_text(json.dumps(table))
    found = outcome(class_names, tuple(classes), path)
    if isinstance(found, BadInput): return
    assert len(found) == len(classes) and all(name and name.isprintable() for name in found)


@pytest.mark.parametrize("where", ["/dev/zero", "pipe", "folder", "nowhere", "a\0b", "x" * 300])
def test_names_in_what_is_no_file(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    assert "expected a JSON file" in refusal(class_names, ("a",), where)


def colours(x): return torch.cat([y := torch.nn.functional.avg_pool2d(x, 4), -y], 1)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    "Ten images of two classes, and one that is broken."
    root = tmp_path_factory.mktemp("tree")
    for k in range(10): picture(root / "ab"[k % 2] / f"{k}.png", seed=k)
    (root / "a" / "broken.png").write_bytes(b"?")
    return index_tree(root)


def build(tree, out, **more):
    options = dict(shard=4, batch=4, max_bad=1, workers=1, progress=False)
    return build_cache(tree, colours, out, **{**dict(size=8, vae="stand-in"), **options, **more})


@pytest.fixture(scope="session")
def made(tree, tmp_path_factory):
    "Its cache, three shards."
    build(tree, out := tmp_path_factory.mktemp("cache") / "cache")
    return out


@pytest.fixture
def copied(made, tmp_path): return shutil.copytree(made, tmp_path / "cache")


def everything(folder):
    "All that a cache gives, as bytes."
    cache = LatentCache(folder, vae="stand-in")
    rows = torch.arange(len(cache)).repeat(2)
    flip = torch.arange(2).repeat_interleave(len(cache))
    moments = cache.moments(rows, flip).numpy().tobytes()
    return moments, cache.labels.tolist(), cache.rows.tolist(), cache.classes


def digests(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def flip(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@quick
@given(k=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_shard(tree, made, tmp_path_factory, k, place, bit):
    "It is named with its file before it is used; without that file the build makes the same cache again."
    folder = shutil.copytree(made, tmp_path_factory.mktemp("flip") / "cache")
    path = folder / f"shard-{k:05d}.safetensors"
    flip(path, int(place * path.stat().st_size), 1 << bit)
    said = refusal(everything, folder)
    assert path.name in said and "remove it and run stage cache again" in said
    if bit: path.unlink()  # or as it is
    build(tree, folder)
    assert digests(folder) == digests(made) and everything(folder) == everything(made)


@quick
@given(name=st.sampled_from(["index.safetensors", "shard-00001.json"]),
       place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_beside_the_shards(tree, made, tmp_path_factory, name, place, bit):
    "In the index it is refused, in a record of no account; the build repairs what would change a number."
    folder = shutil.copytree(made, tmp_path_factory.mktemp("flip") / "cache")
    flip(folder / name, int(place * (folder / name).stat().st_size), 1 << bit)
    if name.startswith("index"): assert name in refusal(everything, folder)
    (folder / "manifest.json").unlink()
    found = outcome(build, tree, folder)
    if isinstance(found, BadInput): assert name in str(found)  # the record of another recipe
    else: assert everything(folder) == everything(made)


def test_a_flipped_bit_while_training(tree, copied):
    "A loader that has begun stops at the damaged image, and not before."
    from marval.latents import LatentLoader
    loader = LatentLoader(LatentCache(copied), 4, 0, "distill")
    loader(0)
    for path in copied.glob("shard-*.safetensors"): flip(path, -1)
    said = [outcome(loader, i) for i in range(3, 9)]
    loader.close()
    assert any(isinstance(s, BadInput) and "damaged" in str(s) for s in said)


def places(value, path=()):
    "All places in a JSON value."
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in inside: yield from places(v, (*path, k))


def put(value, path, new):
    "The value with something else in one place."
    if not path: return new
    value = value.copy()
    value[path[0]] = put(value[path[0]], path[1:], new)
    return value


odd = plain | st.sampled_from([-1, 0, 1, 5, 10**9, 2**63, 1e300, [], {}, "", "a\0b", "../x", "/etc/passwd",
                               "shard-00000.safetensors"])


@settings(quick, max_examples=150)
@given(data=st.data(), new=odd)
def test_any_manifest(made, tmp_path_factory, data, new):
    "One line, or the very same numbers; class names, versions and digests are nobody's numbers."
    manifest = json.loads((made / "manifest.json").read_text())
    where = data.draw(st.sampled_from(list(places(manifest))))
    folder = shutil.copytree(made, tmp_path_factory.mktemp("manifest") / "cache")
    (folder / "manifest.json").write_text(json.dumps(put(manifest, where, new)))
    found, whole = outcome(everything, folder), everything(made)
    if not isinstance(found, BadInput):
        assert found[:3] == whole[:3] and (found[3] == whole[3] or where[0] == "classes")


@pytest.mark.parametrize("part", ["header", "metadata"])
@settings(quick, max_examples=60)
@given(data=st.data(), new=odd)
def test_any_header(made, tmp_path_factory, part, data, new):
    "A shard whose header says something else is refused by its name."
    folder = shutil.copytree(made, tmp_path_factory.mktemp("header") / "cache")
    path = folder / "shard-00001.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    inner = json.loads(header["__metadata__"]["marval"])
    if part == "header": header = put(header, data.draw(st.sampled_from(list(places(header)))), new)
    else:
        where = data.draw(st.sampled_from(list(places(inner))))
        header["__metadata__"]["marval"] = json.dumps(put(inner, where, new))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    found = outcome(everything, folder)
    if isinstance(found, BadInput): assert path.name in str(found)
    else: assert found == everything(made)


def tensors_of(path):
    from safetensors import safe_open
    with safe_open(path, "pt") as f: return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def rewrite(folder, name, **changes):
    "Other tensors in a file of the cache, with digests that fit."
    from safetensors.torch import save_file
    path = folder / name
    tensors, metadata = tensors_of(path)
    save_file(tensors | changes, path, metadata=metadata)
    manifest = json.loads((folder / "manifest.json").read_text())
    for part in (manifest["index"], *manifest["shards"]):
        if part["file"] != name: continue
        part["sha256"] = sha256(path)
        if "bytes" in part: part["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))


ten = torch.arange(10, dtype=torch.int32)
INDEX = {
    "class too high": dict(labels=ten % 3), "class below 0": dict(labels=ten % 2 - 1),
    "too few": dict(labels=ten[:9] % 2), "none": dict(labels=ten[:0]),
    "two axes": dict(labels=(ten % 2)[None]),
    "fractions": dict(labels=(ten % 2).float()), "long": dict(labels=(ten % 2).long()),
    "rows beyond": dict(rows=ten + 2), "rows below": dict(rows=ten - 1), "rows twice": dict(rows=ten // 2),
}


@pytest.mark.parametrize("case", INDEX)
def test_labels_that_cannot_be(copied, case):
    rewrite(copied, "index.safetensors", **INDEX[case])
    assert "index.safetensors" in refusal(LatentCache, copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 60_000.0])
def test_moments_that_are_no_numbers(copied, value):
    "They could only come from another program; their checksums are right here."
    from marval.latents import _checks
    name = "shard-00000.safetensors"
    moments = tensors_of(copied / name)[0]["moments"]
    moments[0, 0, -1] = value  # a log-variance
    rewrite(copied, name, moments=moments, checks=_checks(moments))
    cache = LatentCache(copied, full=True)
    rows = torch.arange(len(cache))
    said = refusal(cache.batch, rows, torch.zeros(len(cache)), torch.ones(len(cache), *cache.latent))
    assert "not finite" in said


@pytest.mark.parametrize("name", [
    "manifest.json", "index.safetensors", "shard-00001.safetensors", "shard-00001.json"])
@pytest.mark.parametrize("kind", ["gone", "empty", "binary", "pipe", "folder", "zero"])
def test_files_of_a_cache(tree, made, copied, name, kind):
    "Each of its files missing, or something else: reading names it, and the build mends what it may replace."
    path = copied / name
    path.unlink()
    if kind == "empty": path.touch()
    elif kind == "binary": path.write_bytes(bytes(range(256)) * 4)
    elif kind == "pipe": os.mkfifo(path)
    elif kind == "folder": path.mkdir()
    elif kind == "zero": path.symlink_to("/dev/zero")
    if name != "shard-00001.json": assert "expected" in refusal(everything, copied)
    found = outcome(build, tree, copied)
    if kind in ("gone", "empty", "binary"): assert digests(copied) == digests(made)
    else: assert isinstance(found, BadInput) and name in str(found)


def test_two_recipes_in_one_folder(tree, copied):
    for change, clue in ((dict(vae="another"), "vae"), (dict(size=16), "size")):
        with pytest.raises(BadInput, match=f"was made with {clue}="):
            build(tree, copied, **change)
    other = replace(tree, files=tree.files[:-1], labels=tree.labels[:-1])
    assert "was made with tree=" in refusal(build, other, copied)
    assert LatentCache(copied).manifest.skipped == {"a/broken.png": "no known image format, 1 bytes"}


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    "A tokenizer, two towers and an aesthetic head of random weights, with their table."
    from open_clip.model import CLIP
    from marval.vae import KL16
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    tokenizer = KL16(ch=32, ch_mult=(1,) * 5, blocks=1, channels=16)
    torch.save({"model": tokenizer.state_dict()}, folder / "kl16.ckpt")
    (folder / "towers.json").write_text(json.dumps(TOWERS))
    torch.save(CLIP(**TOWERS).state_dict(), folder / "towers.bin")
    torch.save({"weight": torch.randn(1, 32), "bias": torch.zeros(1)}, folder / "head.pth")
    return folder


TOWERS = dict(
    embed_dim=32, vision_cfg=dict(layers=1, width=64, head_width=32, patch_size=16, image_size=64),
    text_cfg=dict(context_length=32, vocab_size=49408, width=32, heads=2, layers=1))
nan, empty = torch.full((32,), float("nan")), torch.zeros(0)

def thousand(name): return {name.format(i): torch.zeros(32) for i in range(1000)}


TOKENIZERS = {
    "NaN": ({"encoder.conv_in.bias": nan}, "NaN"),
    "infinity": ({"decoder.norm_out.weight": torch.full((32,), torch.inf)}, "infinity"),
    "a thousand levels": (thousand("encoder.down.{}.block.0.conv1.bias"), "levels = 1000"),
    "a thousand blocks": (thousand("encoder.down.0.block.{}.conv1.bias"), "blocks = 1000"),
    "many channels": ({"post_quant_conv.bias": torch.zeros(5000)}, "channels = 5000"),
    "wide": ({"encoder.conv_in.bias": torch.zeros(2**20)}, "ch = 1048576"),
    "no width": ({"encoder.conv_in.bias": empty}, "expected 1 axis"),
    "a number": ({"quant_conv.bias": 3}, "quant_conv.bias is missing"),
    "sparse": ({"quant_conv.bias": torch.zeros(32).to_sparse()}, "kl16.ckpt"),
    "whole numbers": ({"quant_conv.bias": torch.zeros(32).int()}, "int32"),
    "complex": ({"quant_conv.bias": torch.zeros(32) * 1j}, "complex"),
    "expanded": ({"quant_conv.bias": torch.zeros(1).expand(10**9)}, "kl16.ckpt"),
    "another shape": ({"quant_conv.weight": torch.zeros(8, 32, 1, 1)}, "has shape"),
    "one more": ({"x" * 1000: empty}, "unknown tensor"), "nothing": (None, "is missing"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_tokenizers(files, tmp_path, case, ending):
    from safetensors.torch import save_file
    from marval.vae import load_vae
    changes, clue = TOKENIZERS[case]
    state = {} if changes is None else torch.load(files / "kl16.ckpt")["model"] | changes
    path = tmp_path / f"kl16.{ending}"
    if ending == "ckpt": torch.save({"model": state}, path)
    elif case in ("a number", "sparse", "expanded"): pytest.skip("safetensors holds no such thing")
    else: save_file(state, path)
    assert clue.replace("kl16.ckpt", path.name) in refusal(load_vae, path)


def after_length(n, text=b""): return n.to_bytes(8, "little") + text


@pytest.mark.parametrize("content", [
    b"", b"\x80", b"PK\x03\x04", b"\xff" * 100, after_length(2**60), after_length(9, b"[[[[[[[[["),
    after_length(2, b"{}")])
@pytest.mark.parametrize("ending", ["ckpt", "safetensors"])
def test_files_that_hold_no_tensors(tmp_path, content, ending):
    from marval.preferences import read_head
    from marval.text_rewards import architecture, check_towers
    from marval.vae import load_vae
    path = tmp_path / f"file.{ending}"
    path.write_bytes(content)
    for f in (load_vae, lambda p: read_head(p, 32), lambda p: check_towers(architecture("ViT-B-32"), p)):
        assert path.name in refusal(f, path)


@pytest.mark.parametrize("where", [
    "/dev/zero", "pipe.ckpt", "pipe.safetensors", "folder", "a\0b", "x" * 300, "nowhere.safetensors"])
def test_weights_in_what_is_no_file(tmp_path, monkeypatch, where):
    from marval.image_reward import load_image_reward, word_pieces
    from marval.preferences import read_head
    from marval.vae import load_vae
    monkeypatch.chdir(tmp_path)
    for name in ("pipe.ckpt", "pipe.safetensors"): os.mkfifo(tmp_path / name)
    (tmp_path / "folder").mkdir()
    for f in (load_vae, lambda p: read_head(p, 32), load_image_reward, word_pieces):
        assert "expected" in refusal(f, where)


def table(**changes):
    "The table of towers with something else in it; a name with __ goes one level down."
    new = json.loads(json.dumps(TOWERS))
    for k, v in changes.items():
        *where, leaf = k.split("__")
        (new[where[0]] if where else new)[leaf] = v
    return new


ARCHITECTURES = {
    "list": [], "null": None, "text": "ViT-B-32", "nothing": {}, "no text": table(text_cfg=None),
    "a list of sizes": table(vision_cfg=[1]),
    "no width": table(embed_dim=0), "huge": table(embed_dim=2**40), "fraction": table(embed_dim=32.5),
    "true": table(embed_dim=True),
    "a billion blocks": table(vision_cfg__layers=10**9), "blocks below 0": table(text_cfg__layers=-1),
    "blocks as text": table(text_cfg__layers="2"), "many stages": table(vision_cfg__layers=[10**9] * 4),
    "a billion pixels": table(vision_cfg__image_size=10**9), "oblong": table(vision_cfg__image_size=[64, 32]),
    "no patch": table(vision_cfg__patch_size=0), "wide": table(text_cfg__width=10**9),
    "heads": table(text_cfg__heads=3), "heads of 0": table(text_cfg__heads=0),
    "long": table(text_cfg__context_length=10**9), "short": table(text_cfg__context_length=0),
    "words": table(text_cfg__vocab_size=10),
    "MLP": table(vision_cfg__mlp_ratio=1e9),
    "fetched": table(vision_cfg__timm_model_name="hf-hub:nobody/model"),
    "another folder": table(vision_cfg__timm_model_name="local-dir:/etc"),
    "fetched text": table(text_cfg__hf_model_name="nobody/model"),
    "file of words": table(text_cfg__tokenizer_kwargs=dict(bpe_path="/dev/zero")),
    "unknown": table(vision_cfg__nonsense=1), "unknown outside": table(nonsense=1),
    "colours": dict(model_cfg=TOWERS, preprocess_cfg=dict(mean=[0.5] * 4)),
    "no spread": dict(model_cfg=TOWERS, preprocess_cfg=dict(std=[0, 1, 1])),
    "look": dict(model_cfg=TOWERS, preprocess_cfg=[1]),
}


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_architectures(tmp_path, case):
    "A table of towers from a stranger: nothing is fetched, no file is opened, no memory asked for."
    from marval.text_rewards import architecture, build_towers
    path = tmp_path / "towers.json"
    path.write_text(json.dumps(ARCHITECTURES[case]))
    assert "towers.json" in refusal(lambda: build_towers(architecture(str(path))))


@settings(quick, max_examples=100)
@given(data=st.data(), new=odd)
def test_any_architecture(tmp_path_factory, data, new):
    from marval.text_rewards import architecture, build_towers
    path = tmp_path_factory.mktemp("towers") / "towers.json"
    path.write_text(json.dumps(put(TOWERS, data.draw(st.sampled_from(list(places(TOWERS)))), new)))
    outcome(lambda: build_towers(architecture(str(path))))


PROMPTS = {
    "empty": b"", "comments": b"# one\n\n", "binary": bytes(range(256)), "no braces": b"a photo\n",
    "two": b"{} and {}\n", "named": b"{name}\n", "index": b"{0}\n", "width": b"{:>999999999}\n",
    "method": b"{0.__class__}\n",
    "NUL": b"a \0 {}\n", "escape": b"\x1b[2J {}\n", "latin": b"caf\xe9 {}\n",
    "UTF-16": "a {}\n".encode("utf-16"), "long": b"x" * 5000 + b" {}\n", "many": b"a {}\n" * 2000,
    "large": b"# " + b"x" * (1 << 21) + b"\na {}\n",
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(tmp_path, case):
    from marval.config import override, preset
    from marval.reward_sums import prompt_templates
    (tmp_path / "prompts.txt").write_bytes(PROMPTS[case])
    config = override(preset("tiny"), [f"rl.prompts={tmp_path}/prompts.txt"])
    assert "prompts.txt" in refusal(prompt_templates, config)


@quick
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "replace")))
def test_any_prompts(tmp_path_factory, content):
    from marval.config import override, preset
    from marval.reward_sums import prompt_templates
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_bytes(content)
    found = outcome(prompt_templates, override(preset("tiny"), [f"rl.prompts={path}"]))
    if not isinstance(found, BadInput): assert all(t.count("{}") == 1 and t.isprintable() for t in found)


ODD_SETTINGS = [
    "rl.reward=", "rl.reward=beauty", "rl.reward=clip + clip", "rl.reward=0 clip", "rl.reward=-1 clip",
    "rl.reward=1e999 clip", "rl.reward=nan clip", "rl.reward=clip, aesthetic", "rl.reward=__class__",
    "rl.guard=fd", "rl.guard=diversity", "rl.guard=diversity 0", "rl.guard=diversity -1",
    "rl.guard=diversity nan", "rl.guard=diversity inf", "rl.guard=diversity 1e300",
    "rl.guard=diversity 0.1 0.2", "rl.guard=diversity 0.1,",
    "rl.guard=diversity 0.1, diversity 0.2", "rl.guard=, ,", "rl.guard=fd 0.1", "rl.guard=coverage 0.1",
    "rl.guard=beauty 0.1", "rl.guard=watch 0.1", "rl.guard=Diversity 0.1",
    "rl.watch=heldout", "rl.watch=classifier", "rl.watch=beauty", "rl.watch=clip + clip", "rl.watch=0 clip",
    "rl.watch=nan",
    "rl.prompt=", "rl.prompt=a picture", "rl.prompt={} {}", "rl.prompt={name}", "rl.prompt={:>999999999}",
    "rl.prompt={", "rl.prompt=" + "very " * 40 + "{}",
    "rl.reward_model=", "rl.reward_model=nowhere.json", "rl.reward_model=/dev/zero", "rl.reward_model=clip=",
    "rl.reward_model=clip=ViT-B-32,beauty=x", "rl.reward_model=ViT-B-32", "rl.reward_model=RN50",
    "rl.reward_weights=clip=", "rl.reward_weights=beauty=x", "rl.reward_weights=~nobody",
    "rl.reward_weights=nobody/knows/" + "x" * 300, "rl.reward_weights={files}",
    "rl.reward_weights={files}/kl16.ckpt", "rl.reward_weights={files}/head.pth",
]


@pytest.fixture(scope="session")
def photographs(files, tmp_path_factory):
    "A small run on photographs, as a configuration."
    from marval.config import override, preset
    root = tmp_path_factory.mktemp("photographs")
    for k in range(6): picture(root / "abc"[k % 3] / f"{k}.png", (70, 70), seed=k)
    (files / "names.json").write_text('{"a": "fox", "b": "newt", "c": "tench"}')
    return override(preset("tiny"), [
        "model.class_num=3", f"data.path={root}", f"data.vae={files}/kl16.ckpt",
        f"data.names={files}/names.json", "rl.metric_every=2",
        f"rl.reward_weights={files}/towers.bin", f"rl.reward_model={files}/towers.json"])


def early(base, out, *changes):
    "What is said when a run starts."
    from marval import pipeline
    from marval.config import override
    def start():
        config = override(base, list(changes))
        return pipeline.check(config, pipeline.select("all", config), out)
    found = outcome(start)
    assert not out.exists()
    return found


def test_a_run_that_may_start(photographs, files, tmp_path):
    assert set(early(photographs, tmp_path / "run").values()) == {"to do"}
    more = ["rl.guard=diversity 0.1, watch 0.5", "rl.watch=aesthetic",
            f"rl.watch_model=aesthetic={files}/towers.json",
            f"rl.watch_weights=aesthetic={files}/head.pth,aesthetic.tower={files}/towers.bin"]
    assert set(early(photographs, tmp_path / "run", *more).values()) == {"to do"}


@pytest.mark.parametrize("change", ODD_SETTINGS)
def test_odd_settings_are_refused_at_the_start(photographs, files, tmp_path, change):
    "Not when RL begins, days later; the setting is named."
    more = [f"rl.watch_weights={files}/towers.bin"] if change.startswith("rl.watch") else []
    found = early(photographs, tmp_path / "run", change.replace("{files}", str(files)), *more)
    assert isinstance(found, BadInput), found
    field = change.partition("=")[0].split("_")[0]
    assert any(clue in str(found) for clue in (field, "--reward", "prompt ", str(files)))


def aesthetic(head):
    weights = f"aesthetic={{tmp}}/{head}.pth,aesthetic.tower={{files}}/towers.bin"
    model = "aesthetic={files}/towers.json"
    return ["rl.reward=aesthetic", f"rl.reward_weights={weights}", f"rl.reward_model={model}"]


EARLY = {
    "names lack a class": (["data.names={tmp}/names.json"], "no name for 1 of 3 classes, first c"),
    "names are no names": (["data.names={tmp}/list.json"], "list.json"),
    "a class too many": (["model.class_num=2"], "has 3 class folders; expected 2"),
    "rewards that are not finite": (["rl.reward_weights={tmp}/nan.bin"], "holds NaN or infinity"),
    "a scale beyond numbers": (["rl.reward_weights={tmp}/scale.bin"], "logit_scale"),
    "towers of another table": (["rl.reward_model={tmp}/wide.json"], "has shape"),
    "a head of another width": (aesthetic("head"), "head.pth: weight has shape"),
    "a head of words": (aesthetic("words"), "words.pth"),
    "a tokenizer of NaN": (["data.vae={tmp}/nan.ckpt"], "nan.ckpt: encoder.conv_in.bias holds NaN"),
    "a tokenizer that overflows": (["data.vae={tmp}/large.ckpt"], "NaN or infinity of a grey picture"),
    "a watch of another table": (
        ["rl.watch=clip", "rl.watch_weights={files}/towers.bin", "rl.watch_model={tmp}/wide.json"],
        "has shape"),
    "a watch without weights": (["rl.watch=clip"], "rl.watch_weights is missing"),
    "a prompt among many": (["rl.prompts={tmp}/prompts.txt"], "tokens"),
}


@pytest.mark.parametrize("case", EARLY)
def test_content_is_tried_at_the_start(photographs, files, tmp_path, case):
    (tmp_path / "names.json").write_text('{"a": "fox", "b": "newt"}')
    (tmp_path / "list.json").write_text('["fox", "newt", "tench"]')
    (tmp_path / "wide.json").write_text(json.dumps(table(embed_dim=48)))
    (tmp_path / "prompts.txt").write_text("a photo of {}\n" + "very " * 40 + "good {}\n")
    towers, tokenizer = torch.load(files / "towers.bin"), torch.load(files / "kl16.ckpt")["model"]
    torch.save(towers | {"visual.proj": towers["visual.proj"] * torch.nan}, tmp_path / "nan.bin")
    torch.save(towers | {"logit_scale": torch.tensor(1000.0)}, tmp_path / "scale.bin")
    torch.save({"weight": torch.zeros(1, 33), "bias": torch.zeros(1)}, tmp_path / "head.pth")
    torch.save({"weight": "heavy", "bias": 3}, tmp_path / "words.pth")
    torch.save({"model": tokenizer | {"encoder.conv_in.bias": nan}}, tmp_path / "nan.ckpt")
    torch.save({"model": {k: v * 1e30 for k, v in tokenizer.items()}}, tmp_path / "large.ckpt")
    changes, clue = EARLY[case]
    changes = [c.format(tmp=tmp_path, files=files) for c in changes]
    assert clue in str(early(photographs, tmp_path / "run", *changes))


def test_large_rewards_are_not_read_at_the_start(photographs, files, tmp_path, monkeypatch):
    "Of them names and shapes alone are compared, and still a wrong shape is seen."
    from marval import reward_sums
    monkeypatch.setattr(reward_sums, "_SMALL", 0)
    monkeypatch.setattr(reward_sums, "make_text_reward", lambda *_: pytest.fail("was loaded"))
    assert set(early(photographs, tmp_path / "run").values()) == {"to do"}
    (tmp_path / "wide.json").write_text(json.dumps(table(embed_dim=48)))
    assert "has shape" in str(early(photographs, tmp_path / "run", f"rl.reward_model={tmp_path}/wide.json"))


def test_prompts_by_the_million(tmp_path):
    "So many templates for so many classes would be encoded for days."
    from marval.config import override, preset
    from marval.reward_sums import check_reward
    (tmp_path / "prompts.txt").write_text("a picture of {}\n" * 1000)
    config = override(preset("base"), [f"rl.prompts={tmp_path}/prompts.txt"])
    assert "1000 templates for 1000 classes" in refusal(check_reward, config, [f"c{i}" for i in range(1000)])


def test_digits_prompts_at_the_start(tmp_path):
    from marval.config import preset
    for prompt in ("a digit", "very " * 30 + "{}"):
        changes = ["rl.reward=clip", f"rl.prompt={prompt}"]
        assert "prompt" in str(early(preset("smoke"), tmp_path / "run", *changes))


def test_a_cache_of_other_classes(photographs, tree, tmp_path):
    "The cache of a tree with two classes, in a run that has three."
    from marval.config import override
    from marval.stages import Photographs
    sizes = ["model.img_size=16", "model.vae_stride=4", "model.vae_embed_dim=3", "sampling.K=4"]
    config = override(photographs, sizes)
    build_cache(tree, colours, tmp_path / "cache", 16, sha256(config.data.vae), max_bad=1, progress=False)
    assert "has 2 classes; expected 3" in refusal(lambda: Photographs(config, tmp_path).cache)
