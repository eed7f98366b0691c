import re

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests import programs_chains as programs
from tests.programs_chains import CHAINS, LENGTHS, START, STEPS
from tests.programs_discrete import nothing
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.compiled import assert_same as compiled_equals_eager
from tests.support.refusing import refusing
from tests.test_conformance import assert_same, leaves, value_and_gradient

refuses = refusing(re.compile(r"Write|Flip|Pass|Draw|Move|Mark|Give"))
by_name = {c.name: c for c in CHAINS}
MARK = {"enumerate": "parallel"}
LOSSES = {
    "elbo": lambda: pe.TraceTimestep_ELBO(kl="sampled"),
    "beta": lambda: pe.TraceTimestep_ELBO(0.4, kl="sampled"),
    "particles": lambda: pe.TraceTimestep_ELBO(kl="sampled", num_particles=2),
    "vectorized": lambda: pe.TraceTimestep_ELBO(
        kl="sampled", num_particles=3, vectorize_particles=True, max_plate_nesting=2
    ),
    "importance": lambda: pe.TraceIW_ELBO(3, vectorize_particles=True, max_plate_nesting=2),
}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def rows(chains):
    return pytest.mark.parametrize("chain", chains, ids=lambda c: c.name)


def start(chain):
    """Create the parameters of both programs."""
    pyro.set_rng_seed(7)
    pe.TraceBeta_ELBO().loss(chain.loop, chain.loop_guide, STEPS)


@rows(CHAINS)
@pytest.mark.parametrize("loss", LOSSES)
def test_value_and_gradient_equal_those_of_the_loop(chain, loss):
    start(chain)
    scan, loop = (
        value_and_gradient(LOSSES[loss](), model, guide, (STEPS,))
        for model, guide in ((chain.scan, chain.guide), (chain.loop, chain.loop_guide))
    )
    assert_same(scan, loop)


@rows(CHAINS)
def test_terms_equal_those_of_the_loop_step_by_step(chain):
    start(chain)
    pyro.set_rng_seed(1)
    ours = pe.TraceTimestep_ELBO(kl="sampled").terms(chain.scan, chain.guide, STEPS)
    pyro.set_rng_seed(1)
    theirs = pe.TraceTimestep_ELBO(kl="sampled").terms(chain.loop, chain.loop_guide, STEPS)
    counted = torch.arange(4) < LENGTHS[:, None] if chain.name == "ragged" else torch.tensor(True)
    for kind in ("kl", "log_likelihood"):
        a, b = getattr(ours, kind), getattr(theirs, kind)
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-9)
    for name, q in theirs.posterior.items():
        counts = counted.unsqueeze(-1) if name == "k" else torch.tensor(True)
        torch.testing.assert_close(ours.posterior[name] * counts, q * counts, rtol=1e-9, atol=1e-9)
    ours.to_dataset()


@rows(CHAINS)
def test_compiled_steps_equal_eager_ones(interpreted, chain):
    def scenario(SVI):
        svi = SVI(chain.scan, chain.guide, pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO())
        pyro.set_rng_seed(3)
        losses = svi.run(3, STEPS, progress=False)
        return [losses, *(p.detach().clone() for p in leaves().values())]

    compiled_equals_eager(scenario)
