"Trees, caches and files from strangers: what is no picture, no name and no latent is refused in one line, soon."
import hashlib
import io
import json
import os
import shutil
import socket
import struct
import warnings
import zlib
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
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
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=8)


def outcome(f, *args, **kwargs):
    "What a call gives; a refusal has to be one printable line."
    try: return f(*args, **kwargs)
    except BadInput as e:
        assert str(e).isprintable()
        return e


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


def chunk(kind, content): return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


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


def tiff_of(w, h, following=0): return tiff([(256, 4, 1, w), (257, 4, 1, h), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1), (279, 4, 1, w * h % 2**32)], following)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(/tmp/marval-was-here) (w) file closefile\nshowpage\n%%EOF\n"
PICTURES = {
    "empty.png": b"", "one byte.jpg": b"\xff", "text.png": b"hello\n", "page.jpg": b"<html></html>", "zeros.png": bytes(4096),
    "wide.png": png(1_000_000, 1, bytes(1_000_001)), "tall.png": png(1, 60_000, bytes(120_000)), "tall one.bmp": saved("BMP", (1, 9000)),
    "bomb.png": png(30_000, 30_000), "bomb of a billion.png": png(2**31 - 1, 2**31 - 1), "claim.png": png(9000, 9000), "large claim.png": png(12_000, 9000),
    "nothing wide.png": png(0, 20), "nothing high.png": png(20, 0), "cut.jpg": saved("JPEG", (400, 300))[:700],
    "bomb.ppm": b"P6 100000 100000 255\n", "negative.ppm": b"P6 -5 -5 255\n", "words.ppm": b"P3 9 9 255\nred green blue", "comment.ppm": b"P6 #" + b"x" * 10**6,
    "bomb.bmp": b"BM" + struct.pack("<IIIIiiHHIIiiII", 60, 0, 54, 40, 2**31 - 1, -2**31, 1, 24, 0, 0, 0, 0, 0, 0),
    "bomb.tif": tiff_of(2**31, 2**31), "long.tif": tiff_of(2**30, 1), "loop.tif": tiff_of(90_000, 20, 8), "entries.tif": tiff([(256, 4, 2**32 - 1, 0)]), "float.tif": saved("TIFF", mode="F"),
    "cut.webp": saved("WEBP")[:30], "bomb.webp": b"RIFF\x1e\0\0\0WEBPVP8X\n\0\0\0\2\0\0\0" + b"\xff\xff\xff" * 2 + bytes(20),
    "text.gif.png": b"GIF89a", "postscript.jpg": EPS, "icon.png": saved("ICO"), "targa.tif": saved("TGA"), "jpeg2000.jpg": saved("JPEG2000"), "pdf.jpg": b"%PDF-1.4\n",
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
    assert isinstance(notes[bad], BadImage) and str(notes[bad]).isprintable() and name in str(notes[bad]) and len(notes[bad].reason) < 250


def test_postscript_is_never_run(tmp_path, monkeypatch):
    "A page in PostScript under the name of a photograph: Pillow would give it to Ghostscript."
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "page.jpg").write_bytes(EPS)
    assert "no known image format" in refusal(load_image, tmp_path / "page.jpg", 16) and not (tmp_path / "ran").exists()


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
        path.symlink_to(dict(zero="/dev/zero", tty="/dev/tty", memory="/proc/self/mem", link_pipe=folder / "fifo", link_folder=folder / "sub", gone=folder / "gone", loop=path)[kind])
    return path


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "large", "zero", "memory", "link_pipe", "link_folder", "gone", "loop"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind):
    "Pipes and folders are no images; a link is followed, and counts as a bad image, or as one that can't be read."
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "a" / "good.png")
    path = special(tmp_path / "a", kind)
    tree = index_tree(tmp_path)
    assert (f"a/{path.name}" in tree.files) == (kind not in ("pipe", "socket", "folder"))
    found = outcome(load_image, path, 16)
    assert isinstance(found, BadInput) and isinstance(found, BadImage) == (kind not in ("gone", "loop", "memory"))


def named(root, name, where):
    "A tree in which one folder or one file has this name, as bytes."
    folder = os.path.join(os.fsencode(root), name if where == "class" else b"a")
    os.makedirs(folder)
    shutil.copy(picture(root.parent / "good.png"), os.path.join(folder, b"1.png" if where == "class" else name + b".png"))


@pytest.mark.parametrize("where", ["class", "file"])
@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"a\nb", b"\x1b[2Jb", b"\x7f", "a\x85b".encode(), b"\xed\xa0\x80"])
def test_names_that_cannot_be_written(tmp_path, name, where):
    named(tmp_path / "tree", name, where)
    assert "expected it to be renamed" in refusal(index_tree, tmp_path / "tree")


@pytest.mark.parametrize("where", ["class", "file"])
@pytest.mark.parametrize("name", ["café", "狐", "a\u202fb", "-rf", "'\"`$(x)", "%s{}", "x" * 240, "CON", "a\\b", "\U0001f98a"])
def test_names_that_are_fine(tmp_path, name, where):
    named(tmp_path / "tree", name.encode(), where)
    tree = index_tree(tmp_path / "tree")
    assert len(tree) == 1 and len(load_image(tree.root / tree.files[0], 16)) == 3 and len(tree.digest) == 64
    assert class_names(tree.classes) == (" ".join((name if where == "class" else "a").replace("_", " ").split()),)


@pytest.mark.parametrize("root", ["", "nowhere", "file", "pipe", "a\0b", "\ud800", "x" * 300, "y/" * 3000, "/dev/null", "empty", "deep", "images", "loop", "selves"])
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
    assert len(tree.classes) == len(tree) == 2002 and tree.classes[0] == "C00000X" and tree.labels.tolist() == list(range(2002))
    (images, _), = load_images(tree, [0, 1, 2], 16)
    assert images[0].equal(images[1]) and images[1].equal(images[2])


NAMES = {
    "empty": b"", "list": b'["fox", "newt"]', "null": b"null", "number": b"3", "text": b'"fox"', "null for a name": b'{"a": null, "b": "newt"}', "number for a name": b'{"a": 1, "b": "newt"}',
    "list for a name": b'{"a": ["fox", "vixen"], "b": "newt"}', "table for a name": b'{"a": {"name": "fox"}, "b": "newt"}', "true": b'{"a": true, "b": "newt"}', "nan": b'{"a": NaN, "b": "newt"}',
    "one lacks": b'{"a": "fox"}', "blank": b'{"a": " ", "b": "newt"}', "comma": b'{"a": ", fox", "b": "newt"}', "underscore": b'{"a": "_", "b": "newt"}',
    "NUL": b'{"a": "f\\u0000x", "b": "newt"}', "escape": b'{"a": "\\u001b[2Jfox", "b": "newt"}', "surrogate": b'{"a": "\\udcff", "b": "newt"}', "format": b'{"a": "fo\\u202ex", "b": "newt"}',
    "long": json.dumps({"a": "fox" * 5000, "b": "newt"}).encode(), "binary": bytes(range(256)), "UTF-16": '{"a": "fox", "b": "newt"}'.encode("utf-16"), "latin": b'{"a": "caf\xe9", "b": "newt"}',
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
    if not isinstance(found, BadInput): assert all(name and name.isprintable() for name in found) and len(found) == len(classes)


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
    return build_cache(tree, colours, out, 8, "stand-in", **{**dict(shard=4, batch=4, max_bad=1, workers=1, progress=False), **more})


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
    return cache.moments(rows, flip).numpy().tobytes(), cache.labels.tolist(), cache.rows.tolist(), cache.classes


def digests(folder): return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def flip(path, at, bit=1):
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


@quick
@given(k=st.integers(0, 2), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_shard(tree, made, tmp_path_factory, k, place, bit):
    "It is named with its file before what it says is used; without that file the build makes the same cache again."
    folder = shutil.copytree(made, tmp_path_factory.mktemp("flip") / "cache")
    path = folder / f"shard-{k:05d}.safetensors"
    flip(path, int(place * path.stat().st_size), 1 << bit)
    said = refusal(everything, folder)
    assert path.name in said and "remove it and run stage cache again" in said
    if bit: path.unlink()  # or as it is
    build(tree, folder)
    assert digests(folder) == digests(made) and everything(folder) == everything(made)


@quick
@given(name=st.sampled_from(["index.safetensors", "shard-00001.json"]), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
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


odd = plain | st.sampled_from([-1, 0, 1, 5, 10**9, 2**63, 1e300, "shard-00000.safetensors", "../x", "/etc/passwd", [], {}, "", "a\0b"])


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
    else: header["__metadata__"]["marval"] = json.dumps(put(inner, data.draw(st.sampled_from(list(places(inner)))), new))
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
        if part["file"] == name: part.update(sha256=sha256(path), **({"bytes": path.stat().st_size} if "bytes" in part else {}))
    (folder / "manifest.json").write_text(json.dumps(manifest))


ten = torch.arange(10, dtype=torch.int32)
INDEX = {
    "class too high": dict(labels=ten % 3), "class below 0": dict(labels=ten % 2 - 1), "too few": dict(labels=ten[:9] % 2), "none": dict(labels=ten[:0]), "two axes": dict(labels=(ten % 2)[None]),
    "fractions": dict(labels=(ten % 2).float()), "long": dict(labels=(ten % 2).long()), "rows beyond": dict(rows=ten + 2), "rows below": dict(rows=ten - 1), "rows twice": dict(rows=ten // 2),
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


@pytest.mark.parametrize("name", ["manifest.json", "index.safetensors", "shard-00001.safetensors", "shard-00001.json"])
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
            build_cache(tree, colours, copied, **{**dict(size=8, vae="stand-in", shard=4, max_bad=1, progress=False), **change})
    other = replace(tree, files=tree.files[:-1], labels=tree.labels[:-1])
    assert "was made with tree=" in refusal(build, other, copied)
    assert asdict(LatentCache(copied).manifest)["skipped"] == {"a/broken.png": "no known image format, 1 bytes"}
