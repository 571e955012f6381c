"What enters from outside ends in a value or in one line: configurations, JSON, files, and the edge of a program."
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from marval.border import BadInput, Parser, entry_point, one_line, parse_json
from marval.config import SCALES, Config, from_dict, override, preset, validated
from marval.files import atomic_write, ensure_folder, open_regular, read_json, sha256, write_json

quick = settings(max_examples=150, deadline=None, derandomize=True)
leaves = [f"{part}.{name}" for part, fields in preset("digits").dict().items() if isinstance(fields, dict) for name in fields]
odd_text = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["", "nan", "inf", "-inf", "1e999", "-1", "0", "1.7", "1e3", "0x10", "None", "True", "[]", "{}",
                     "9" * 5000, "\0", "a\nb", "\udcff", "digits", "../..", "~nobody"]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3), max_leaves=10)


@quick
@given(name=st.sampled_from(leaves) | odd_text, value=odd_text)
def test_override(name, value):
    found = outcome(override, preset("digits"), [f"{name}={value}"])
    if isinstance(found, Config): assert validated(found) == found


@quick
@given(part=st.sampled_from([*preset("digits").dict()]), name=st.sampled_from([leaf.split(".")[1] for leaf in leaves]), value=plain)
def test_stored_configuration(part, name, value):
    stored = preset("digits").dict()
    if isinstance(stored[part], dict) and name in stored[part]: stored[part][name] = value
    else: stored[part] = value
    found = outcome(from_dict, stored)
    if isinstance(found, Config): assert json.loads(json.dumps(found.dict(), allow_nan=False))


@quick
@given(value=plain)
def test_anything_as_a_configuration(value):
    if not isinstance(value, dict): value = {"model": value}
    assert isinstance(outcome(from_dict, value), BadInput)


@pytest.mark.parametrize("scale", SCALES)
def test_presets_pass_their_own_border(scale): assert validated(preset(scale)) == preset(scale)


@quick
@given(content=st.binary(max_size=200) | plain.map(lambda v: json.dumps(v).encode()))
def test_read_json(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(content)
    for kind in (dict, dict[str, int], dict[str, list[float]]): outcome(read_json, path, kind)


def test_deep_json():
    assert isinstance(outcome(parse_json, dict[str, int], "[" * 100_000, "x"), BadInput)


@pytest.mark.parametrize("name", ["", ".", "/", "..", "a" * 300, "x\0y", "\udcff", "a/b/c", "~nobody", "/dev/zero", "/proc/self/mem"])
def test_names(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for f in (open_regular, sha256, read_json, ensure_folder, lambda p: write_json(p, {})):
        found = outcome(f, name)
        if not isinstance(found, BadInput): assert name in ("\udcff", "..", ".", "/", "", "a/b/c", "~nobody", "/proc/self/mem")
        if hasattr(found, "close"): found.close()


@pytest.mark.parametrize("kind", ["folder", "link", "dangling link", "pipe", "device"])
def test_what_is_no_regular_file_stays(tmp_path, kind):
    path = tmp_path / "out.json"
    (tmp_path / "target").write_text("kept")
    if kind == "folder": path.mkdir()
    elif kind == "link": path.symlink_to(tmp_path / "target")
    elif kind == "dangling link": path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe": os.mkfifo(path)
    else:
        try: os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError: pytest.skip("making a device needs root")
    before = os.lstat(path).st_mode, os.lstat(path).st_ino
    assert isinstance(outcome(write_json, path, {}), BadInput)
    assert (os.lstat(path).st_mode, os.lstat(path).st_ino) == before
    assert (tmp_path / "target").read_text() == "kept" and not (tmp_path / "elsewhere").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"out.json", "target"}


def test_a_waiting_link_is_not_followed(tmp_path):
    "Links under every name that a guesser might try leave their target alone."
    (tmp_path / "precious").write_text("kept")
    for name in (".out.tmp.json", ".out.json.tmp", "out.json.tmp"): (tmp_path / name).symlink_to(tmp_path / "precious")
    write_json(tmp_path / "out.json", {"a": 1})
    assert (tmp_path / "precious").read_text() == "kept" and read_json(tmp_path / "out.json") == {"a": 1}


def test_writers_never_share_a_temporary_file(tmp_path):
    seen, barrier = [], threading.Barrier(4)
    def writer(p):
        seen.append(p)
        barrier.wait(30)
        p.write_text("x" * 1000)
    threads = [threading.Thread(target=atomic_write, args=(tmp_path / "out", writer)) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert len(set(seen)) == 4 and [p.name for p in tmp_path.iterdir()] == ["out"]


PROGRAM = """
import sys
from marval.border import BadInput, Parser, entry_point

@entry_point
def main(argv):
    p = Parser(prog="toy")
    p.add_argument("--how", default="")
    how = p.parse_args(argv).how
    if how == "bad": raise BadInput("--out d\\u00e9j\\u00e0 \\udcff\\x1b[31m: expected less")
    if how == "bug": return {}["missing"]
    if how == "deep": return (lambda f: f(f))(lambda f: f(f))
    if how == "memory": bytearray(1 << 62)
    if how == "stop": raise KeyboardInterrupt
    if how == "print": print("d\\u00e9j\\u00e0 \\udcff")
    return 0

sys.exit(main())
"""


@pytest.mark.parametrize("how, status", [("bad", 2), ("bug", 1), ("deep", 1), ("memory", 1), ("stop", 130), ("print", 0), ("", 0)])
def test_edge_of_a_program(tmp_path, how, status):
    env = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--how", how], capture_output=True, env=env, timeout=120)
    line = done.stderr.decode("ascii")
    assert done.returncode == status and "Traceback" not in line
    assert line.count("\n") == (status != 0) and "\x1b" not in line
    if status == 1 and how != "memory":
        kept = Path(line.split("the traceback is in ")[1].split(",")[0])
        assert kept.is_relative_to(tmp_path) and "Traceback" in kept.read_text()


def test_debug_raises():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--how", "bug", "--debug"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "KeyError: 'missing'" in done.stderr and "Traceback" in done.stderr


def test_unknown_options_are_one_line(capsys):
    @entry_point
    def main(argv): return Parser(prog="toy").parse_args(argv) and 0
    assert main(["--nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_pydantic_is_not_loaded_by_the_method():
    code = "import sys, marval, marval.config, marval.mar, marval.sampling; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
