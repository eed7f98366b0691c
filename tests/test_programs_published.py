"""Published programs: Pyro's losses, the same compiled, exported."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_elbo as pe
from pyro_elbo.errors import CompileError
from tests.programs_published import PUBLISHED
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.rows import thorough

table = pytest.mark.parametrize("program", PUBLISHED, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def trained(program, loss, svi_of=SVI, steps=3):
    """The losses of a few steps and the parameters after them, from one seed; and the pair."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide = program.make()
    args = program.data()
    svi = svi_of(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    losses = [svi.step(*args) for _ in range(steps)]
    parameters = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    return losses, parameters, (model, guide, args)


@table
def test_losses_and_parameters_are_those_of_pyro(program):
    pairs = [(pe.TraceBeta_ELBO(kl="sampled"), Trace_ELBO())]
    if program.mean_field:
        pairs.append((pe.TraceBeta_ELBO(), TraceMeanField_ELBO()))
    for ours, theirs in pairs:
        found, expected = trained(program, ours), trained(program, theirs)
        assert found[0] == pytest.approx(expected[0], rel=2e-5)
        torch.testing.assert_close(found[1], expected[1], rtol=2e-5, atol=1e-7)


@table
def test_exports(program):
    """Every latent of the posterior is there, with weights; eval mode is kept to itself."""
    *_, (model, guide, args) = trained(program, pe.TraceBeta_ELBO(), steps=1)
    data = pe.to_arviz(model, guide, *args, num_samples=6)
    latents = pe.TraceBeta_ELBO().terms(model, guide, *args).kl
    names = set(data["posterior"].data_vars)
    missing = {n for n in latents if n not in names and not n.startswith("_") and n not in ("top", "local")}
    assert not missing
    assert bool(data["sample_stats"]["log_weight"].notnull().all())


# A capture takes a second or two: `make test` tries those whose graphs differ most, `make fuzz` all of them.
CAPTURED = {
    "VAE, grey pixels",
    "AIR",
    "Bayesian regression, PyroSample",
    "LKJ",
    "eight schools, flow guide",
}
captured = pytest.mark.parametrize(
    "program",
    [p if p.name in CAPTURED else thorough(p) for p in PUBLISHED],
    ids=lambda p: p.name,
)


@captured
def test_compiled_steps_equal_eager_ones(interpreted, program):
    assert_compiled(program)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["VAE, grey pixels", "hierarchical logistic"])
def test_machine_code_equals_eager_steps(name):
    assert_compiled(next(p for p in PUBLISHED if p.name == name))


def assert_compiled(program):
    def compiled(model, guide, optim, loss):
        return pe.SVI(model, guide, optim, loss, compile=True, fallback_random=True)

    if program.refused:
        with pytest.raises(CompileError) as caught:
            trained(program, pe.TraceBeta_ELBO(), compiled)
        assert program.refused in str(caught.value)
        return
    expected = trained(program, pe.TraceBeta_ELBO())
    found = trained(program, pe.TraceBeta_ELBO(), compiled)
    assert found[0] == pytest.approx(expected[0], rel=1e-8)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-8)
