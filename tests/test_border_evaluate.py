"What marval-evaluate reads from others: whatever is given ends in a result or in one line."
import copy
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FUZZ = dict(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

EVALUATION = dict(
    kind="marval-evaluate", device="NVIDIA A100", commit="0123456789ab", n=50000, fid=3.3, is_mean=200.0, n_reference=None,
    extractor=dict(name="inception-v3-compat"), network=dict(scale="base"), model=None,
    images=dict(kind="network", path="runs/student.safetensors", stage="student", K=64, cfg=1.2, cfg_schedule="constant",
                chain_steps=0, classes=1000),
    reference=dict(path="adm_in256_stats.npz", statistics=True),
    scores=dict(clip=dict(mean=29.0, standard_error=0.1, towers="ViT-L-14", prompt="a {}")),
    time=dict(seconds=1.0, cpu_seconds=1.0, batch=1, dtype="float32", threads=1))
OF_MODEL = dict(fid=3.0, is_mean=200.0, n=9, extractor=dict(name="x"), seconds_per_image={"1": 0.5})
RUN = dict(device="CPU", commit="01", scale="base", chain_steps=100, cfg=1.2, K=64, cfg_schedule="linear", reference="r.npz",
           teacher=OF_MODEL, student=OF_MODEL, student_rl=OF_MODEL)
BASELINES = dict(kind="marval-baselines", runs=[dict(
    model="ADM", path="diffusers", sampler="chain", seconds=9.0, cpu_seconds=9.0, measured="whole images", steps=250, cfg=None,
    K=None, batch=1, dtype="fp32", threads=1, decoded=True, device="CPU", commit="01", weights="random", tiny=False)])
SAMPLING = dict(provenance=dict(device="CPU"), cells=dict(one=dict(
    size="base", K=64, cfg=2.9, chain_steps=100, decode=True, threads=1, commit="01", batch=1,
    runs={"chain, plain, fp32": dict(seconds=9.0, cpu_seconds=9.0)})))
RESULTS = dict(evaluation=EVALUATION, run=RUN, baselines=BASELINES, sampling=SAMPLING)


def paths(value, at=()):
    "Every place in a nested value."
    if at: yield at
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
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


NO_JSON = dict(binary=b"\x00\xff\xfe\x80", empty=b"", depth=b'{"a":' * 100_000, deep_list=b"[" * 100_000, cut=b'{"fid": 3',
               nan=b'{"fid": NaN, "n": Infinity}', list=b"[1, 2]", null=b"null", number=b"3",
               digits=b'{"n": ' + b"9" * 5000 + b"}")
OTHER = dict(empty={}, settings={"model.width": 64}, benchmark=dict(provenance={}, cells={"a": {"seconds": "fast"}}),
             cells_null=dict(provenance=1, cells=None), cells_list=dict(provenance=1, cells=[[]]), runs=dict(kind=[], runs={}))


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
    for place in ("", "a" * 300, tmp_path / "nowhere", tmp_path / "pipe.json", "/dev/zero", os.fsdecode(b"\xff"), "a\0b"):
        assert tables(capsys, place)[0] == 2


WRONG = dict(null=(("n",), None), text=(("n",), "5"), list=(("images",), []), inf=(("fid",), 1e400), nan=(("is_mean",), float("nan")),
             huge=(("n",), 10**30), control=(("device",), "CPU\x1b[2J"), lines=(("commit",), "a\nb"), long=(("commit",), "a" * 10**5),
             score=(("scores", "clip", "mean"), None), scores=(("scores",), 7), seconds=(("time", "seconds"), -1.0), flag=(("n",), True),
             surrogate=(("device",), "\ud800"), classes=(("images", "classes"), 0.5))


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
                      st.sampled_from([10**400, -1, 1e308, "9" * 4300, "\ud800", "NaN", "../../x", "|", "<b>"]))
    return st.recursive(plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                        max_leaves=6)


@settings(max_examples=150, **FUZZ)
@given(st.data())
def test_fuzzed_results(tmp_path_factory, data):
    "One to three values of a true result replaced by anything: a table without NaN, or one line."
    from marval.border import BadInput
    from marval.tables import fill, left_out, read_results, render
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    content = RESULTS[data.draw(st.sampled_from(sorted(RESULTS)))]
    for _ in range(data.draw(st.integers(1, 3))):
        content = replaced(content, data.draw(st.sampled_from(sorted(paths(content), key=str))), data.draw(json_values()))
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
