"""The laws that every objective obeys, over the table of programs."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_elbo as pe
from tests.programs import (
    PROGRAMS,
    X,
    discrete_subsampled_guide,
    discrete_subsampled_model,
    global_guide,
    global_model,
    mixture_guide,
    mixture_model,
    subsampled_guide,
    subsampled_model,
)

table = pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.name)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def create_parameters(guide, args):
    """Run the guide under a handler: outside of one, Pyro warns of factor statements."""
    pyro.poutine.trace(guide).get_trace(*args)


def leaves():
    return dict(pyro.get_param_store().named_parameters())


def value_and_gradient(loss, model, guide, args, seed=7):
    """The loss and its gradient by parameter, on the draws of ``seed``."""
    create_parameters(guide, args)
    for p in leaves().values():
        p.grad = None
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, *args)
    return value, {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in leaves().items()}


def assert_same(ours, theirs):
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6, abs=1e-10)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def particle_settings(program):
    yield {}
    yield {"num_particles": 3}
    if program.vectorizes:
        yield {"num_particles": 3, "vectorize_particles": True}


@table
def test_sampled_form_equals_trace_elbo(program):
    guide = program.guide(program.model)
    for particles in particle_settings(program):
        ours = value_and_gradient(pe.TraceBeta_ELBO(kl="sampled", **particles), program.model, guide, program.args)
        theirs = value_and_gradient(Trace_ELBO(**particles), program.model, guide, program.args)
        assert_same(ours, theirs)


@table
def test_module_form_equals_the_svi_form(program):
    guide = program.guide(program.model)
    loss = pe.TraceBeta_ELBO(beta=0.7)
    expected = value_and_gradient(loss, program.model, guide, program.args)
    for p in leaves().values():
        p.grad = None
    pyro.set_rng_seed(7)
    value = loss(program.model, guide)(*program.args)
    if value.requires_grad:
        value.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves().items()}
    assert_same((value.item(), grads), expected)
    pyro.set_rng_seed(7)
    assert loss.loss(program.model, guide, *program.args) == pytest.approx(expected[0], rel=1e-12)


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.mean_field], ids=lambda p: p.name)
def test_auto_form_equals_trace_mean_field_elbo(program):
    guide = program.guide(program.model)
    for particles in particle_settings(program):
        ours = value_and_gradient(pe.TraceBeta_ELBO(**particles), program.model, guide, program.args)
        theirs = value_and_gradient(TraceMeanField_ELBO(**particles), program.model, guide, program.args)
        assert_same(ours, theirs)


@table
def test_exact_posterior_makes_the_bound_the_evidence(program):
    if program.evidence is None:
        assert not program.name.startswith("exact")
        return
    guide = program.guide(program.model)
    for particles in particle_settings(program):
        for seed in range(3):
            pyro.set_rng_seed(seed)
            terms = pe.TraceBeta_ELBO(kl="sampled", **particles).terms(program.model, guide, *program.args)
            torch.testing.assert_close(terms.elbo, program.evidence(), rtol=0, atol=1e-10)


@table
def test_terms_add_up_and_have_the_shape_of_their_plates(program):
    guide = program.guide(program.model)
    create_parameters(guide, program.args)
    for particles, kl in itertools.product(particle_settings(program), ("auto", "sampled")):
        terms = pe.TraceBeta_ELBO(kl=kl, **particles).terms(program.model, guide, *program.args)
        torch.testing.assert_close(terms.elbo, -terms.distortion - terms.rate)
        torch.testing.assert_close(terms.objective, terms.elbo)
        torch.testing.assert_close(sum(terms.kl_total.values()), terms.rate)
        likelihood = sum((x * terms.scale[n]).sum() for n, x in terms.log_likelihood.items())
        torch.testing.assert_close(-likelihood, terms.distortion)
        for name, x in {**terms.kl, **terms.log_likelihood}.items():
            assert x.shape == tuple(p.size for p in terms.plates[name])
            torch.testing.assert_close(
                (x * terms.scale[name]).sum(), terms.kl_total.get(name, (x * terms.scale[name]).sum())
            )
        for name, x in terms.kl_per_dim.items():
            extra = x.dim() - terms.kl[name].dim()
            torch.testing.assert_close(x.flatten(x.dim() - extra).sum(-1) if extra else x, terms.kl[name])
        data = terms.to_dataset()
        assert not any(bool(v.isnull().any()) for v in data.data_vars.values())
        assert {p.name for n in terms.kl for p in terms.plates[n]} <= set(data.dims)


@table
def test_elbo_ignores_weights_and_beta_zero_keeps_the_likelihood(program):
    guide = program.guide(program.model)
    create_parameters(guide, program.args)

    def terms(beta=1.0, **options):
        pyro.set_rng_seed(3)
        return pe.TraceBeta_ELBO(beta, **options).terms(program.model, guide, *program.args)

    plain = terms()
    for other in (
        terms(4.0),
        terms(0.0),
        terms(pe.LinearWarmup(0.0, 1.0, steps=9)),
        terms(pe.Capacity(0.0, 2.0, steps=9)),
        terms(free_bits=0.3),
    ):
        torch.testing.assert_close(other.elbo, plain.elbo, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms(0.0).objective, -plain.distortion)
    torch.testing.assert_close(terms(4.0).objective, -plain.distortion - 4 * plain.rate)
    value, gradient = value_and_gradient(pe.TraceBeta_ELBO(0.0), program.model, guide, program.args)
    assert torch.isfinite(torch.tensor(value))
    assert all(torch.isfinite(g).all() for g in gradient.values())


# --- gradients against finite differences of the exact bound ----------------------------------------------------


def exact_global(beta):
    """Σ E log N(x; z, 1) - β KL in closed form, z ~ N(m, s²)."""
    m, s = pyro.param("loc"), pyro.param("scale")
    likelihood = -0.5 * ((X - m) ** 2 + s**2 + torch.log(torch.tensor(2 * torch.pi))).sum()
    return likelihood - beta * torch.distributions.kl_divergence(dist.Normal(m, s), dist.Normal(0.0, 1.0))


def exact_mixture(beta):
    """The mixture's bound: k summed out, m in closed form."""
    m, s, logits = pyro.param("m_loc"), pyro.param("m_scale"), pyro.param("logits")
    q = logits.softmax(-1)
    prior = torch.tensor([0.2, 0.5, 0.3])
    centre = X[:, None] - (torch.arange(3.0) - 1.0)
    likelihood = -0.5 * ((centre - m) ** 2 + s**2 + torch.log(torch.tensor(2 * torch.pi)))
    kl_k = (q * (q.log() - prior.log())).sum()
    kl_m = torch.distributions.kl_divergence(dist.Normal(m, s), dist.Normal(0.0, 2.0))
    return (q * likelihood).sum() - beta * (kl_k + kl_m)


def finite_differences(exact, beta, step=1e-5):
    result = {}
    for name, p in leaves().items():
        flat = p.data.reshape(-1)
        slopes = []
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                with torch.no_grad():
                    values.append(exact(beta).item())
                flat[i] -= sign * step
            slopes.append((values[0] - values[1]) / (2 * step))
        result[name] = torch.tensor(slopes).reshape(p.shape)
    return result


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize(
    ("model", "guide", "exact"),
    [(global_model, global_guide, exact_global), (mixture_model, mixture_guide, exact_mixture)],
    ids=["reparameterised", "discrete"],
)
def test_gradient_equals_finite_differences_of_the_exact_bound(model, guide, exact, kl, beta):
    """5 SE in each of at most 14 parameters: a false alarm in 1 of 100 000 runs."""
    loss = pe.TraceBeta_ELBO(beta, kl=kl, num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
    create_parameters(guide, (X,))
    draws = [value_and_gradient(loss, model, guide, (X,), seed) for seed in range(10)]
    expected = finite_differences(exact, beta)
    for name in expected:
        samples = torch.stack([-gradient[name] for _, gradient in draws])
        error = (samples.mean(0) - expected[name]).abs()
        assert (error <= 5 * samples.std(0) / len(draws) ** 0.5 + 1e-7).all(), name


# --- subsampling ----------------------------------------------------------------------------------------------

PAIRS = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_unbiased_under_subsampling(beta):
    """Mean over all minibatches of two equals the full data, within 5 SE (a false alarm in 2 million)."""
    loss = pe.TraceBeta_ELBO(beta, num_particles=4000, vectorize_particles=True, max_plate_nesting=1)
    for model, guide in (
        (subsampled_model, subsampled_guide),
        (discrete_subsampled_model, discrete_subsampled_guide),
    ):
        with torch.no_grad():
            batches = [torch.stack([loss.terms(model, guide, X, i).objective for i in PAIRS]).mean() for _ in range(8)]
            full = [loss.terms(model, guide, X, torch.arange(4)).objective for _ in range(8)]
        batches, full = torch.stack(batches), torch.stack(full)
        error = (batches.mean() - full.mean()).abs()
        assert error <= 5 * ((batches.var() + full.var()) / 8).sqrt()


def test_per_datum_figures_divide_by_the_full_data():
    terms = pe.TraceBeta_ELBO().terms(subsampled_model, subsampled_guide, X, PAIRS[0])
    assert terms.num_data == 4
    assert terms.scale["z"] == terms.scale["x"] == 2.0
    assert terms.scale["w"] == 1.0


def test_terms_that_come_and_go_between_particles_count_as_zero():
    def model():
        b = pyro.sample("b", dist.Bernoulli(0.5))
        if b:
            pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", b)

    def guide():
        if pyro.sample("b", dist.Bernoulli(0.5)):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    pyro.set_rng_seed(0)
    terms = pe.TraceBeta_ELBO(num_particles=40).terms(model, guide)
    share = terms.log_likelihood["f"]
    assert 0 < share < 1
    torch.testing.assert_close(terms.kl["z"], 0.5 * share)


def test_the_jacobian_of_an_autoguide_is_counted():
    """Pyro's TraceMeanField_ELBO drops the log density of Delta sites; Trace_ELBO and this library count it."""

    def model():
        pyro.sample("rate", dist.Exponential(1.0))

    guide = pyro.infer.autoguide.AutoNormal(model, init_scale=0.5)
    guide()

    def value(loss):
        pyro.set_rng_seed(1)
        return loss.loss(model, guide)

    assert value(pe.TraceBeta_ELBO()) == pytest.approx(value(Trace_ELBO()))
    assert abs(value(TraceMeanField_ELBO()) - value(Trace_ELBO())) > 0.1
