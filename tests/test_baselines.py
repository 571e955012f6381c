"bench/baselines.py at a tiny size, its result in the tables, and the architectures it builds at full size."
import importlib.util
import json

import pytest
import torch
from conftest import ROOT

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def baselines():
    "The program as a module."
    spec = importlib.util.spec_from_file_location("baselines", ROOT / "bench" / "baselines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ("ADM", "DiT-XL/2"))
def test_published_sizes(name, baselines):
    """Parameters and operations of the full architectures, without numbers in them; and a difference of 2 %
    is refused."""
    made = baselines.size(name, {"ADM": baselines.adm, "DiT-XL/2": baselines.dit}[name])
    assert made["parameters"] == pytest.approx(made["published_parameters"], rel=1e-3)
    assert made["multiply_adds"] == pytest.approx(made["published_multiply_adds"], rel=1e-3)
    with pytest.raises(RuntimeError, match="within 1 %"):
        baselines.agreed(name, (made["parameters"], None), (made["published_parameters"] * 1.02, None))


def test_tiny(baselines, tmp_path):
    """The program, twice: the second replaces its own row alone. Tiny networks have no place in the tables;
    what full ones would say has, with its labels."""
    from marval.tables import fill, read_results
    out = tmp_path / "baselines.json"
    with torch.random.fork_rng():
        for models in (["ADM", "DiT-XL/2", "MAR-B", "MARVAL-B"], ["ADM"]):
            baselines.main(["--device", "cpu", "--tiny", "--rounds", "1", "--models", *models, "--paths",
                            "plain", "--out", str(out)])
    runs = json.loads(out.read_text())["runs"]
    assert [r["model"] for r in runs] == ["ADM", "DiT-XL/2", "MAR-B", "MARVAL-B"]
    assert all(r["seconds"] > 0 and r["weights"] == "random" and r["decoded"] for r in runs)
    adm, dit = runs[:2]
    assert adm["measured"] == "3 of 5 steps"
    assert adm["seconds"] == pytest.approx(5 * sorted(adm["step_seconds"])[1])
    assert dit["seconds"] == pytest.approx(5 * sorted(dit["step_seconds"])[1] + dit["decode_seconds"])
    assert not any(f.ours for f in fill(read_results([tmp_path])))
    out.write_text(json.dumps({"kind": "marval-baselines", "runs": [r | {"tiny": False} for r in runs]}))
    shown = {f.line.model: f.ours for f in fill(read_results([tmp_path])) if f.ours}
    assert set(shown) == {"ADM", "DiT-XL/2", "MAR-B", "MARVAL-B"}
    assert all("random weights" in s and "processor time" in s for s in shown.values())
    assert "K = 4" in shown["MARVAL-B"]
