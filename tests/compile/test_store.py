"""Machine code on disk: found by the next process without Inductor, and by no other graph, setting or version."""

import json
import os
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.compile import store
from pyro_elbo.compile._torch import config
from pyro_elbo.compile.record import Recording, record
from pyro_elbo.errors import CompileError
from tests.support.compiled import X, _double, adam, guide, model, sampled  # noqa: F401

SCRIPT = """
import sys, pyro, torch, pyro_elbo as pe
from models.eight_schools import noncentered
pyro.set_rng_seed(0)
sigma, y = torch.tensor([15.0, 10.0, 16.0, 11.0]), torch.tensor([28.0, 8.0, -3.0, 7.0])
guide = pyro.infer.autoguide.AutoNormal(noncentered)
svi = pe.SVI(noncentered, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO(), compile=True)
losses = [svi.step(sigma, y) for _ in range(5)]
print(losses, "torch._inductor.compile_fx" in sys.modules)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a cache that is empty."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path / "pyro_elbo"


def test_a_second_process_takes_the_same_steps_without_inductor(folder):
    command = [sys.executable, "-c", SCRIPT]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("] ") for _ in range(2)
    )
    assert second[0] == first[0]
    assert (first[1].strip(), second[1].strip()) == ("True", "False")
    assert {path.suffix for path in folder.iterdir()} == {".so", ".json"}


def recording(function=lambda x: (x * 2.0).sum() > 0, *inputs) -> Recording:
    return record(function, inputs or (torch.ones(3),))


def key(function=lambda x: (x * 2.0).sum() > 0, *inputs, kept=0, lift_noise=True):
    return store.key_of(recording(function, *inputs), kept, lift_noise)


CHANGES = {
    "number": lambda: key(lambda x: (x * 3.0).sum() > 0),
    "kind of number": lambda: key(lambda x: (x * 2).sum() > 0),
    "sign of zero": lambda: key(lambda x: (x * -0.0).sum() > 0),
    "operator": lambda: key(lambda x: (x + 2.0).sum() > 0),
    "order of arguments": lambda: key(lambda x: (2.0 * x).sum() > 0, torch.ones(4)),
    "shape": lambda: key(lambda x: (x * 2.0).sum() > 0, torch.ones(3, 1)),
    "dtype": lambda: key(lambda x: (x * 2.0).sum() > 0, torch.ones(3, dtype=torch.float32)),
    "strides": lambda: key(lambda x: (x * 2.0).sum() > 0, torch.ones(6)[::2]),
    "offset": lambda: key(lambda x: (x * 2.0).sum() > 0, torch.ones(4)[1:]),
    "another input": lambda: key(lambda x, y: (x * 2.0).sum() > 0, torch.ones(3), torch.ones(3)),
    "external": lambda: key(lambda x: (x * torch.ones(3)).sum() > 0),
    "kept": lambda: key(kept=1),
    "noise": lambda: key(lift_noise=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_on_the_code_decides_on_the_key(change):
    assert CHANGES[change]() not in (key(), None)
    assert key() == key()


SETTINGS = {
    "threads": lambda patch: patch.setattr(torch, "get_num_threads", lambda: 17),
    "variable of the compiler": lambda patch: patch.setenv("CXX", "another-compiler"),
    "variable of Inductor": lambda patch: patch.setenv("TORCHINDUCTOR_SIMDLEN", "8"),
    "precision": lambda patch: patch.setattr(torch, "get_float32_matmul_precision", lambda: "medium"),
    "version of torch": lambda patch: patch.setattr(torch, "__version__", "2.99"),
    "instructions of the processor": lambda patch: patch.setattr(
        torch.backends.cpu, "get_cpu_capability", lambda: "NONE"
    ),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_surroundings_decide_on_the_key(change, monkeypatch):
    before = key()
    SETTINGS[change](monkeypatch)
    store.installation.cache_clear()
    try:
        assert key() not in (before, None)
    finally:
        monkeypatch.undo()
        store.installation.cache_clear()
    assert key() == before


def test_operators_of_others_have_no_key():
    @torch.library.custom_op("elsewhere::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    assert key(lambda x: twice(x).sum() > 0) is None


def test_settings_of_inductor_decide_on_the_key():
    before = key()
    with config.patch(epilogue_fusion=not config.epilogue_fusion):
        assert key() not in (before, None)
    with config.patch(force_disable_caches=True):
        assert key() is None
    assert key() == before


def train(beta=1.0, **options):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = pe.SVI(model, guide, adam(), sampled(beta), compile=True, **options)
    return [svi.step(X) for _ in range(4)]


def steps_in(folder):
    """The libraries of steps; the driver has one too."""
    return {p for p in folder.glob("*.so") if "noise" in json.loads(p.with_suffix(".json").read_text())}


def damage_json(path):
    path.with_suffix(".json").write_text("{")


def name_another_type(path):
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"noise": [["normal", "load", 3]]}))


def cut_library(path):
    content = path.read_bytes()
    path.unlink()  # this process has mapped the file
    path.write_bytes(content[:1000])


def open_folder(path):
    path.parent.chmod(0o777)


@pytest.mark.parametrize("damage", [damage_json, name_another_type, cut_library, open_folder])
def test_what_is_not_what_was_written_is_compiled_anew(folder, damage, caplog):
    expected = train()
    (step,) = steps_in(folder)
    damage(step)
    assert train() == expected
    assert "anew" in caplog.text or "others than you" in caplog.text


def test_code_of_another_graph_is_found_out(folder, monkeypatch):
    """The code for β = 2, taken for that for β = 1."""
    monkeypatch.setenv("PYRO_ELBO_CHECK", "1")
    train()
    right = steps_in(folder)
    train()
    train(beta=2.0)
    (wrong,) = steps_in(folder) - right
    monkeypatch.setattr(store, "key_of", lambda *arguments: wrong.stem)
    with pytest.raises(CompileError, match="something else than its graph"):
        train()


def test_without_caches_steps_are_compiled_anew(folder):
    with config.patch(force_disable_caches=True):
        assert len(train()) == 4
    assert not folder.exists()


def test_a_full_disk_costs_nothing_but_time(folder, monkeypatch, caplog):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "whole_file", full)
    assert len(train()) == 4
    assert "No space left" in caplog.text
    assert not list(folder.iterdir())


def test_writes_to_shared_memory_are_refused_from_the_disk_too(folder):
    """Whether tensors overlap is no part of a graph."""

    def program(x, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.param("loc"), scale.exp()), obs=x)

    def fit(loc, scale):
        pyro.clear_param_store()
        pyro.param("loc", loc)
        svi = pe.SVI(lambda x: program(x, scale), lambda x: None, adam(), sampled(), compile=True)
        return [svi.step(X) for _ in range(3)]

    assert len(fit(torch.zeros(()), torch.zeros(()))) == 3
    both = torch.zeros(2)
    with pytest.raises(CompileError, match="share memory"):
        fit(both[0], both[0:1][0])


def test_the_folder_is_the_owners(folder):
    train()
    assert oct(os.stat(folder).st_mode & 0o777) == "0o700"
