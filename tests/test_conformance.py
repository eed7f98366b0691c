"""The laws that every objective obeys, over the table of programs."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

import pyro_elbo as pe
from pyro_elbo.errors import SiteError
from tests.programs import (
    MASK,
    PROGRAMS,
    X2,
    Program,
    X,
    discrete_auxiliary_guide,
    discrete_subsampled_guide,
    discrete_subsampled_model,
    log_joint_rows,
    mixture_guide,
    mixture_model,
    row_model,
    subsampled_guide,
    subsampled_model,
)
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.rows import every_other, thorough

LOGITS = torch.tensor([0.4, -0.7, 1.1, 0.0], dtype=torch.float64)
DISCRETE = next(p for p in PROGRAMS if p.name == "exact posterior, discrete")
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


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.pyro_agrees], ids=lambda p: p.name)
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


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.evidence], ids=lambda p: p.name)
def test_exact_posterior_makes_the_bound_the_evidence(program):
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


# --- every objective over every program -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """One row: a new objective is one of these.

    Attributes:
        make: the objective with this many particles.
        bound: its value for one row, from the row's log weights, particles first.
        particles: a number of particles that it takes.
        refuses: a part of the message with which it refuses a program, or None where it takes it.
        is_elbo: the objective is the ELBO less its penalties; otherwise a tighter bound, the ELBO for one particle.
        kl: the form of its KL terms.
        least: the fewest particles that it takes.
        draws_as_elbo: the programs run as for the ELBO, so that both see the same draws; one particle suffices.
        compiled: a program that its compiled steps are tried on.
    """

    name: str
    make: Callable[[int], pe.TraceBeta_ELBO]
    bound: Callable[[torch.Tensor], torch.Tensor]
    particles: int = 3
    refuses: Callable[[Program], str | None] = lambda program: None
    is_elbo: bool = True
    kl: str = "auto"
    least: int = 1
    draws_as_elbo: bool = True
    compiled: str = "local latents"


def row_weights(program):
    """Importance weights need rows that all sites share, and one scale."""
    if program.name in ("subsampled plate", "AutoNormal, subsampled"):
        return "not all sites lie in it"
    return "differ in scale" if "scale in the" in program.name else None


SCORED = {"Bernoulli", "mixture", "two plates, factor", "without pathwise gradient"}


def pathwise_rows(program):
    """DReG needs rows, and a path through every draw."""
    scored = program.name in SCORED or "discrete" in program.name
    return "no pathwise gradient" if scored else row_weights(program)


def one_scan(program):
    return None if program.name in ("scan", "exact posterior, scan") else "all latents must be drawn in one pe.scan"


# The latents on whose rows a penalty can act: in a plate, with a density and a pathwise gradient.
PENALIZED = {
    "local latents": "z",
    "nested plates": "m",
    "subsampled plate": "z",
    "poutine.mask": "z",
    "dist.mask": "z",
    "poutine.scale": "z",
    "flow guide": "z",
    "exact posterior, local": "z",
}
# Latents that the laws of penalties leave out: their scale or mask differs between model and guide.
ALSO_PENALIZED = ("scale in the model alone", "mask in the model alone", "mask in the guide alone")


def rows_of_z(program):
    """Information needs a latent that each row has one of, with a density and a pathwise gradient."""
    rows = "in no plate|is not a latent|no pathwise gradient|no density"
    return None if program.name in {*PENALIZED, *ALSO_PENALIZED} else rows


def filtering(particles):
    """Without resampling, the importance-weighted bound of whole sequences."""
    options = {"num_particles": particles, "resample": 0.0, "max_plate_nesting": 2}
    return pe.TraceTimestep_ELBO(bound="filtering", **options)


def importance_over_time(particles):
    return pe.TraceTimestep_ELBO(bound="importance", num_particles=particles)


def elbo_by(gradient, make=pe.TraceBeta_ELBO):
    return lambda k: make(gradient=gradient, num_particles=k)


def importance_by(gradient, **options):
    return lambda k: pe.TraceIW_ELBO(k, gradient=gradient, **options)


def mean(log_weights):
    return log_weights.mean(0)


def log_mean(log_weights):
    return log_weights.logsumexp(0) - torch.tensor(float(len(log_weights))).log()


def renyi(log_weights):
    """Order 1/2: 2 log mean √w."""
    return 2 * log_mean(log_weights / 2)


SAMPLED = {"bound": mean, "kl": "sampled"}
IW = {"bound": log_mean, "is_elbo": False, "kl": "sampled"}
OBJECTIVES = [
    Objective("TraceBeta, auto", lambda k: pe.TraceBeta_ELBO(num_particles=k), mean),
    Objective("TraceBeta, sampled", lambda k: pe.TraceBeta_ELBO(kl="sampled", num_particles=k), mean, kl="sampled"),
    Objective("TraceIW", pe.TraceIW_ELBO, refuses=row_weights, **IW),
    Objective("TraceTimestep", lambda k: pe.TraceTimestep_ELBO(num_particles=k), mean, compiled="scan"),
    Objective("importance over time", importance_over_time, refuses=row_weights, compiled="scan", **IW),
    Objective("filtering", filtering, refuses=one_scan, draws_as_elbo=False, compiled="scan", **IW),
    Objective("stl", elbo_by("stl"), **SAMPLED),
    Objective("rloo", elbo_by("rloo"), mean, least=2, compiled="mixture"),
    Objective("vargrad", elbo_by("vargrad"), least=2, **SAMPLED),
    Objective("stl over time", elbo_by("stl", pe.TraceTimestep_ELBO), compiled="scan", **SAMPLED),
    Objective("vargrad over time", elbo_by("vargrad", pe.TraceTimestep_ELBO), least=2, compiled="scan", **SAMPLED),
    Objective("TraceIW, dreg", importance_by("dreg"), refuses=pathwise_rows, **IW),
    Objective("TraceIW, rloo", importance_by("rloo"), refuses=row_weights, least=2, compiled="mixture", **IW),
    Objective("Rényi", importance_by("auto", alpha=0.5), refuses=row_weights, **IW | {"bound": renyi}),
    Objective("Rényi, rloo", importance_by("rloo", alpha=0.5), refuses=row_weights, least=2, **IW | {"bound": renyi}),
    Objective(
        "dreg over time",
        lambda k: pe.TraceTimestep_ELBO(bound="importance", gradient="dreg", num_particles=k),
        refuses=pathwise_rows,
        compiled="scan",
        **IW,
    ),
    Objective("TraceMI", lambda k: pe.TraceMI_ELBO("z", weight=2.0, num_particles=k), mean, refuses=rows_of_z),
]
ROWS = [pytest.param(o, p, id=f"{o.name}, {p.name}") for o in OBJECTIVES for p in PROGRAMS]


@pytest.mark.parametrize(("objective", "program"), ROWS)
def test_an_objective_takes_a_program_or_says_why_not(objective, program):
    """The terms are those of the ELBO; the objective is the ELBO less penalties, or a bound above it."""
    guide = program.guide(program.model)
    create_parameters(guide, program.args)
    loss = objective.make(objective.particles)
    if reason := objective.refuses(program):
        with pytest.raises(SiteError, match=reason):
            loss.terms(program.model, guide, *program.args)
        return
    pyro.set_rng_seed(3)
    terms = loss.terms(program.model, guide, *program.args)
    if objective.draws_as_elbo:
        pyro.set_rng_seed(3)
        elbo = pe.TraceBeta_ELBO(kl=objective.kl, num_particles=objective.particles)
        torch.testing.assert_close(terms.elbo, elbo.terms(program.model, guide, *program.args).elbo)
    cost = sum(penalty.cost for penalty in terms.penalties.values())
    if objective.is_elbo:
        torch.testing.assert_close(terms.objective, terms.elbo - cost)
    else:
        assert terms.objective >= terms.elbo - 1e-9  # Jensen, on the same draws
    if program.evidence and objective.kl == "sampled":
        torch.testing.assert_close(terms.objective, program.evidence(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("objective", "program"),
    [
        pytest.param(o, p, id=f"{o.name}, {p.name}")
        for o in OBJECTIVES
        for p in PROGRAMS
        if o.draws_as_elbo and not o.is_elbo and o.least == 1 and o.refuses(p) is None
    ],
)
def test_one_particle_makes_every_bound_the_elbo(objective, program):
    """In value, and in gradient where it is pathwise: the score function's estimators differ from draw to draw."""
    guide = program.guide(program.model)
    loss = objective.make(1)
    value, gradient = value_and_gradient(loss, program.model, guide, program.args)
    expected, slopes = value_and_gradient(Trace_ELBO(), program.model, guide, program.args)
    assert value == pytest.approx(expected)
    sites = loss.terms(program.model, guide, *program.args).sites
    if all(term.score is None for term in sites.values()) and loss.gradient == "auto":
        assert_same((value, gradient), (expected, slopes))


COPIES = 100  # of four rows: a run averages over them


def copied_rows_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", lambda: LOGITS.clone()).repeat(COPIES)))


def exact_rows(bound, particles):
    """The bound of the copied rows: all values of each row's particles, with their probabilities."""
    (logit,) = param("logit")
    log_q = torch.nn.functional.logsigmoid(torch.stack([-logit, logit], -1))
    log_weight = log_joint_rows(X) - log_q
    values = itertools.product((0, 1), repeat=particles)
    pairs = ((log_q[:, z].sum(-1).exp(), bound(log_weight[:, z].T)) for z in map(list, values))
    return COPIES * sum((probability * value).sum() for probability, value in pairs)


@pytest.mark.parametrize(
    ("objective", "particles"),
    [
        pytest.param(o, k, id=f"{o.name}, {k}")
        for o in OBJECTIVES
        for k in (1, 3)
        if o.refuses(DISCRETE) is None and k >= o.least
    ],
)
def test_value_and_gradient_equal_those_of_all_particles_summed_out(objective, particles):
    draws = gradients(objective.make(particles), row_model, copied_rows_guide, (X.repeat(COPIES),))
    expected = exact_rows(objective.bound, particles)
    assert_within_5_se(torch.tensor([-value for value, _ in draws]), expected.detach())
    assert_gradient(draws, {"logit": torch.autograd.grad(expected, param("logit"))[0]})


# --- gradients against finite differences of the exact bound ----------------------------------------------------


PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
LOG_2PI = torch.tensor(2 * torch.pi, dtype=torch.float64).log()


def param(*names):
    return [pyro.param(name) for name in names]


def expected_log_normal(x, mean, variance=0.0):
    """E log N(x; z, 1) over z of this mean and variance."""
    return -0.5 * ((x - mean) ** 2 + variance + LOG_2PI)


def kl_bernoulli(q, p):
    return q * (q.log() - torch.tensor(p).log()) + (1 - q) * ((1 - q).log() - torch.tensor(1 - p).log())


def kl_normal(m, s, m0=0.0, s0=1.0):
    return torch.distributions.kl_divergence(dist.Normal(m, s), dist.Normal(m0, s0))


def kl_prior(q):
    return (q * (q.log() - PRIOR.log())).sum(-1)


def rows(q):
    """Likelihood of row_model by row, z summed out."""
    return q * expected_log_normal(X, 1.0) + (1 - q) * expected_log_normal(X, -1.0)


def exact_global(beta):
    m, s = param("loc", "scale")
    return expected_log_normal(X, m, s**2).sum() - beta * kl_normal(m, s)


def exact_mixture(beta, beta_m=None):
    """The mixture's bound: k summed out, m in closed form; β of k may differ by row."""
    m, s, logits = param("m_loc", "m_scale", "logits")
    q = logits.softmax(-1)
    likelihood = expected_log_normal(X[:, None] - (torch.arange(3.0) - 1.0), m, s**2)
    beta_m = beta if beta_m is None else beta_m
    return (q * likelihood).sum() - (beta * kl_prior(q)).sum() - beta_m * kl_normal(m, s, s0=2.0)


def exact_nested(beta):
    """a and b summed out."""
    qa, qb = (logit.sigmoid() for logit in param("a_logit", "b_logit"))
    total = -beta * kl_bernoulli(qa, 0.4).sum()
    for a, wa in ((0.0, 1 - qa), (1.0, qa)):
        total = total - beta * (wa * kl_bernoulli(qb, 0.2 + 0.5 * a)).sum()
        for b, wb in ((0.0, 1 - qb), (1.0, qb)):
            total = total + (wa * wb * expected_log_normal(X2, a + b)).sum()
    return total


def exact_reversed(beta):
    """E[log p(z1) + log p(z2|z1)] from second moments; the entropies of q(z2) and q(z1|z2)."""
    m, s, slope, s1 = param("loc", "scale", "slope", "scale1")
    z2_squared = m**2 + s**2
    z1_squared = slope**2 * z2_squared + s1**2
    step_squared = (1 - slope) ** 2 * z2_squared + s1**2
    log_p = -0.5 * (z1_squared + step_squared) - LOG_2PI
    log_q = -(s.log() + s1.log() + 1 + LOG_2PI)
    return expected_log_normal(X, m, s**2).sum() - beta * (log_q - log_p)


def exact_mixed(beta):
    logits, m, s = param("logits", "means", "scales")
    q = logits.softmax(-1)
    likelihood = expected_log_normal(X[:, None], m, s**2).sum(0)
    return (q * (likelihood - beta * kl_normal(m, s, torch.arange(3.0) - 1.0))).sum() - beta * kl_prior(q)


def exact_chain(beta):
    a, sa, b, sb = param("a_loc", "a_scale", "b_loc", "b_scale")
    kl_b = kl_normal(b, sb, a) + 0.5 * sa**2
    return (expected_log_normal(X, b, sb**2) - beta * kl_b).sum() - beta * kl_normal(a, sa)


def exact_masked_rows(beta):
    (logit,) = param("logit")
    q = logit.sigmoid()
    return (rows(q) - beta * kl_bernoulli(q, 0.3) * MASK).sum()


def exact_scaled_rows(beta):
    """Scale 3 in the model alone: 3 log p against log q."""
    (logit,) = param("logit")
    q = logit.sigmoid()
    log_q = q * q.log() + (1 - q) * (1 - q).log()
    return (3 * rows(q) - beta * (3 * kl_bernoulli(q, 0.3) - 2 * log_q)).sum()


def exact_auxiliary(beta):
    """b, u and z summed out; log q of b and u count in full."""
    logit_b, logit_u, logit = param("b_logit", "u_logit", "logit")
    qb, qu = logit_b.sigmoid(), logit_u.sigmoid()
    total = -beta * sum((q * q.log() + (1 - q) * (1 - q).log()).sum() for q in (qb, qu))
    for b, u in itertools.product((0.0, 1.0), repeat=2):
        q = (logit + u + b).sigmoid()
        weight = (qb if b else 1 - qb) * (qu if u else 1 - qu)
        total = total + (weight * (rows(q) - beta * kl_bernoulli(q, 0.3))).sum()
    return total


def exact_subsampled(beta):
    """The discrete, subsampled program on all of its data."""
    (logit,) = param("logit")
    q = logit.sigmoid()
    return (rows(q) - beta * kl_bernoulli(q, 0.3)).sum()


EXACT = {
    "global normal": exact_global,
    "mixture": exact_mixture,
    "discrete, nested": exact_nested,
    "reversed order": exact_reversed,
    "discrete and continuous": exact_mixed,
    "without pathwise gradient": exact_chain,
    "discrete, masked": exact_masked_rows,
    "discrete, scale in the model alone": exact_scaled_rows,
    "discrete auxiliary": exact_auxiliary,
}


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


def gradients(loss, model, guide, args, runs=60):
    create_parameters(guide, args)
    return [value_and_gradient(loss, model, guide, args, seed) for seed in range(runs)]


def assert_within_5_se(samples, expected):
    """``|mean - expected| < 5 SE``: with 60 runs a false alarm in 1 of 180 000 (Student's t)."""
    error = (samples.mean(0) - expected).abs()
    assert (error <= 5 * samples.std(0) / len(samples) ** 0.5 + 1e-7).all(), (error, samples.std(0))


def assert_gradient(draws, expected):
    for name, slope in expected.items():
        assert_within_5_se(torch.stack([-gradient[name] for _, gradient in draws]), slope)


@pytest.mark.parametrize("beta", every_other([0.0, 0.5, 4.0, 1.0]))
@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.name in EXACT], ids=lambda p: p.name)
def test_value_and_gradient_equal_the_exact_bound(program, kl, beta):
    loss = pe.TraceBeta_ELBO(beta, kl=kl, num_particles=400, vectorize_particles=True, max_plate_nesting=2)
    draws = gradients(loss, program.model, program.guide(program.model), program.args)
    assert_gradient(draws, finite_differences(EXACT[program.name], beta))
    with torch.no_grad():
        assert_within_5_se(torch.tensor([-value for value, _ in draws]), EXACT[program.name](beta))


PATHWISE = ("global normal", "mixture", "reversed order", "discrete and continuous")


@pytest.mark.parametrize(
    ("name", "gradient"),
    [(name, "stl") for name in PATHWISE]
    + [(name, "rloo") for name in EXACT if name not in ("global normal", "reversed order")]
    + [(name, "vargrad") for name in EXACT],
)
def test_every_estimator_has_the_gradient_of_the_exact_bound(name, gradient):
    program = next(p for p in PROGRAMS if p.name == name)
    options = {"num_particles": 400, "vectorize_particles": True, "max_plate_nesting": 2}
    loss = pe.TraceBeta_ELBO(0.5, gradient=gradient, **options)
    draws = gradients(loss, program.model, program.guide(program.model), program.args)
    assert_gradient(draws, finite_differences(EXACT[name], 0.5))


@pytest.mark.parametrize("gradient", ["stl", "rloo", "vargrad"])
def test_every_estimator_takes_a_beta_per_site_and_per_datum(gradient):
    by_row = torch.tensor([0.0, 0.5, 2.0, 4.0])
    options = {"num_particles": 400, "vectorize_particles": True, "max_plate_nesting": 1}
    loss = pe.TraceBeta_ELBO({"m": 3.0, "k": by_row}, gradient=gradient, **options)
    draws = gradients(loss, mixture_model, mixture_guide, (X,))
    assert_gradient(draws, finite_differences(lambda beta: exact_mixture(by_row, 3.0), None))


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_gradient_with_a_beta_per_site_and_per_datum(kl):
    by_row = torch.tensor([0.0, 0.5, 2.0, 4.0])
    weights = {"m": 3.0, "k": by_row}
    loss = pe.TraceBeta_ELBO(weights, kl=kl, num_particles=400, vectorize_particles=True, max_plate_nesting=1)
    draws = gradients(loss, mixture_model, mixture_guide, (X,))
    assert_gradient(draws, finite_differences(lambda beta: exact_mixture(by_row, 3.0), None))


def test_pyro_leaves_discrete_auxiliary_sites_out_of_the_reward():
    """Trace_ELBO's reward lacks log q of sites that the guide alone has: its gradient is biased, ours is not."""
    loss = Trace_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=2)
    draws = gradients(loss, row_model, discrete_auxiliary_guide, (X,))
    slopes = torch.stack([-gradient["u_logit"] for _, gradient in draws])
    bias = slopes.mean(0) - finite_differences(exact_auxiliary, 1.0)["u_logit"]
    assert (bias.abs() > 5 * slopes.std(0) / len(slopes) ** 0.5).all()


# --- subsampling ----------------------------------------------------------------------------------------------

PAIRS = [torch.tensor(pair) for pair in itertools.combinations(range(4), 2)]


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_unbiased_under_subsampling(beta):
    """Mean over all minibatches of two equals the full data, within 5 SE: t of 14, a false alarm in 5000."""
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


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_gradient_is_unbiased_under_subsampling(kl):
    """Mean of the gradient over all minibatches of two against the exact bound of the full data."""
    model, guide = discrete_subsampled_model, discrete_subsampled_guide
    loss = pe.TraceBeta_ELBO(0.5, kl=kl, num_particles=100, vectorize_particles=True, max_plate_nesting=1)
    create_parameters(guide, (X, torch.arange(4)))
    draws = []
    for seed in range(60):
        parts = [value_and_gradient(loss, model, guide, (X, i), 10 * seed + j) for j, i in enumerate(PAIRS)]
        mean = torch.stack([gradient["logit"] for _, gradient in parts]).mean(0)
        draws.append((None, {"logit": mean}))
    assert_gradient(draws, finite_differences(exact_subsampled, 0.5))


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


def trained(program, steps, compile, loss=None):
    """Losses and parameters of a run on the draws of one seed; SGD, so that parameters are sums of gradients."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = program.guide(program.model)
    create_parameters(guide, program.args)
    optim = pyro.optim.SGD({"lr": 1e-4, "momentum": 0.9})
    svi = pe.SVI(program.model, guide, optim, loss or pe.TraceBeta_ELBO(), compile=compile, fallback_random=True)
    pyro.set_rng_seed(5)
    losses = svi.run(steps, *program.args, progress=False)
    return losses, {name: p.detach().clone() for name, p in leaves().items()}


def assert_compiled_equals_eager(program, steps, make_loss):
    expected, parameters = trained(program, steps, False, make_loss())
    losses, compiled = trained(program, steps, True, make_loss())
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert compiled.keys() == parameters.keys()
    for name, p in parameters.items():
        torch.testing.assert_close(compiled[name], p, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


# Rows whose graph has no operator that another row lacks: `make fuzz` tries them.
ALIKE = {
    "exact posterior",
    "exact posterior, local",
    "exact posterior, discrete",
    "exact posterior, scan",
    "AutoNormal, real",
    "AutoLowRank",
    "AutoGuideList",
    "mask in the guide alone",
    "scale in the model alone",
    "discrete, scale in the guide alone",
    "discrete, subsampled",
}


@pytest.mark.parametrize(
    "program",
    every_other([p for p in PROGRAMS if p.name not in ALIKE]) + [thorough(p) for p in PROGRAMS if p.name in ALIKE],
    ids=lambda p: p.name,
)
def test_compiled_steps_equal_eager_ones(interpreted, program):
    assert_compiled_equals_eager(program, 20, pe.TraceBeta_ELBO)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mixture", "scan", *map(thorough, ("nested plates", "AutoIAFNormal"))],
)
def test_machine_code_equals_eager_steps(name):
    program = next(p for p in PROGRAMS if p.name == name)
    assert_compiled_equals_eager(program, 200, pe.TraceBeta_ELBO)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta": 0.5, "num_particles": 3},
        {"beta": pe.LinearWarmup(0.0, 1.0, steps=7), "num_particles": 3, "vectorize_particles": True},
        {"beta": pe.Capacity(0.0, 2.0, steps=7, gamma=3.0)},
        {"beta": {"mu": pe.Cyclical(0.1, 1.0, steps=12, cycles=3), "z": 0.3}, "free_bits": 0.2},
        {"kl": "sampled", "beta": torch.tensor(0.4)},
    ],
    ids=lambda s: ", ".join(s),
)
def test_compiled_steps_equal_eager_ones_under_every_setting(interpreted, settings):
    program = next(p for p in PROGRAMS if p.name == "nested plates")
    assert_compiled_equals_eager(program, 20, lambda: pe.TraceBeta_ELBO(**settings))


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.name)
def test_compiled_steps_equal_eager_ones_for_every_objective(interpreted, objective):
    program = next(p for p in PROGRAMS if p.name == objective.compiled)
    assert_compiled_equals_eager(program, 10, lambda: objective.make(objective.particles))


ONE_PIECE = ("flow guide", "exact posterior, local")  # densities that do not factorize have no total correlation
PENALIZED_PAIRS = [
    pytest.param(program, kind, id=f"{program.name}, {kind.__name__}")
    for program in PROGRAMS
    for kind in (pe.MutualInformation, pe.TotalCorrelation)
    if program.name in PENALIZED and not (program.name in ONE_PIECE and kind is pe.TotalCorrelation)
]


@pytest.mark.parametrize(("program", "kind"), PENALIZED_PAIRS)
def test_penalties_leave_the_elbo_alone_and_cost_nothing_at_weight_zero(program, kind):
    guide = program.guide(program.model)
    create_parameters(guide, program.args)
    plain = value_and_gradient(pe.TraceBeta_ELBO(), program.model, guide, program.args)
    free = pe.TraceBeta_ELBO(penalties=[kind(PENALIZED[program.name], weight=0.0)])
    assert_same(value_and_gradient(free, program.model, guide, program.args), plain)
    pyro.set_rng_seed(3)
    expected = pe.TraceBeta_ELBO().terms(program.model, guide, *program.args)
    pyro.set_rng_seed(3)
    loss = pe.TraceBeta_ELBO(penalties=[kind(PENALIZED[program.name], weight=2.0)])
    terms = loss.terms(program.model, guide, *program.args)
    assert terms.elbo == expected.elbo
    (penalty,) = terms.penalties.values()
    rows = terms.scale[PENALIZED[program.name]] * terms.plates[PENALIZED[program.name]][0].size
    torch.testing.assert_close(terms.objective, expected.objective - 2.0 * rows * penalty.nats)


@pytest.mark.parametrize("name", ["nested plates", "poutine.mask"])
def test_compiled_steps_equal_eager_ones_with_a_penalty(interpreted, name):
    program = next(p for p in PROGRAMS if p.name == name)
    penalties = [pe.MutualInformation(PENALIZED[name], weight=pe.LinearWarmup(0.0, 2.0, steps=5))]
    assert_compiled_equals_eager(program, 20, lambda: pe.TraceBeta_ELBO(penalties=penalties))
