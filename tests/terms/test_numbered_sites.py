"""TraceTimestep_ELBO: loops over z_0, z_1, ... and scans have the same terms, which add up over time."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, SiteError
from tests.support.scanned import BOTH, Numbered, loss_and_gradients

N, T = 3, 4
LENGTHS = torch.tensor([4, 1, 3])
VECTORIZED = {"num_particles": 3, "vectorize_particles": True, "max_plate_nesting": 1}
PARTICLES = {"one": {}, "looped": {"num_particles": 3}, "vectorized": VECTORIZED}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def frames():
    return torch.randn(T, N, generator=torch.Generator().manual_seed(1))


def number(name, value=0.3):
    return pyro.param(name, lambda: torch.tensor(value))


def step(z, x_t):
    """Two latents, the first with an event of two elements."""
    z = pyro.sample("z", dist.Normal(number("a") * z.unsqueeze(-1).expand(*z.shape, 2), 0.8).to_event(1)).sum(-1)
    w = pyro.sample("w", dist.Normal(z, 0.7))
    pyro.sample("x", dist.Normal(w, 0.5), obs=x_t)
    return z, None


def guide_step(z, x_t):
    loc = torch.stack(torch.broadcast_tensors(number("b") * z, number("c") * x_t), -1)
    z = pyro.sample("z", dist.Normal(loc, number("s", 0.7).exp()).to_event(1)).sum(-1)
    pyro.sample("w", dist.Normal(number("d") * x_t + z, 0.6))
    return z, None


def program(a_step, way, **options):
    def run(x, lengths=None):
        with pyro.plate("sequences", N, dim=-1):
            way(a_step, torch.zeros(N), x, lengths, length=T, **options)

    return run


def pair(way):
    return program(step, way), program(guide_step, way)


def markov(a_step):
    """The loop with pyro.markov around its steps."""

    def run(x):
        z = torch.zeros(N)
        with pyro.plate("sequences", N, dim=-1):
            for t in pyro.markov(range(T)):
                z = Numbered(t)(a_step)(z, x[t])[0]

    return run


def terms_of(way, objective, *args, seed=3):
    pyro.set_rng_seed(seed)
    return objective.terms(*pair(way), *args)


# --- terms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_terms_of_a_loop_are_those_of_the_scan(kl, particles):
    objective = pe.TraceTimestep_ELBO(kl=kl, **PARTICLES[particles])
    ours, theirs = (terms_of(way, objective, frames()) for way in BOTH)
    for part in ("kl", "kl_per_dim", "log_likelihood", "kl_total", "log_likelihood_total", "is_analytic", "scale"):
        torch.testing.assert_close(getattr(theirs, part), getattr(ours, part), rtol=1e-12, atol=1e-12, msg=part)
    assert ours.kl["z"].shape == ours.log_likelihood["x"].shape == (N, T)
    assert ours.kl_per_dim["z"].shape == (N, T, 2)
    assert ours.is_analytic == {"z": kl == "auto", "w": kl == "auto"}
    for terms in (ours, theirs):
        torch.testing.assert_close(terms.kl["z"].sum() + terms.kl["w"].sum(), terms.rate)
        torch.testing.assert_close(terms.kl_per_dim["z"].sum(-1), terms.kl["z"])
        torch.testing.assert_close(-terms.log_likelihood["x"].sum(), terms.distortion)
        torch.testing.assert_close(terms.objective, terms.elbo)


@pytest.mark.parametrize("particles", PARTICLES)
def test_the_total_is_that_of_the_unjoined_loop(particles):
    model, guide = pair(BOTH[1])
    for kl in ("auto", "sampled"):
        found = [
            loss_and_gradients(objective(kl=kl, **PARTICLES[particles]), model, guide, frames())
            for objective in (pe.TraceTimestep_ELBO, pe.TraceBeta_ELBO)
        ]
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_markov_loops():
    objective = pe.TraceTimestep_ELBO()
    pyro.set_rng_seed(3)
    found = objective.terms(markov(step), markov(guide_step), frames())
    expected = terms_of(BOTH[0], objective, frames())
    torch.testing.assert_close((found.kl, found.elbo), (expected.kl, expected.elbo))


@pytest.mark.parametrize("way", BOTH)
def test_dataset_has_a_dimension_of_time(way):
    data = terms_of(way, pe.TraceTimestep_ELBO(**VECTORIZED), frames()).to_dataset()
    assert data["kl_z"].dims == data["kl_w"].dims == data["log_likelihood_x"].dims == ("sequences", "time")
    assert data["kl_per_dim_z"].dims == ("sequences", "time", "z_dim_0")
    assert data.sizes["time"] == T
    per_step = data["log_likelihood_x"] - data["kl_z"] - data["kl_w"]
    assert per_step.sum().item() == pytest.approx(data["elbo"].item())
    assert data["kl_z"].attrs["units"] == "nats"


def test_steps_are_in_the_order_of_their_numbers():
    """z_10 comes after z_9, whatever order the program has."""

    def model(order):
        for t in order:
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=torch.tensor(float(t)))

    for order in (range(12), reversed(range(12))):
        found = pe.TraceTimestep_ELBO().terms(model, lambda order: None, list(order)).log_likelihood["x"]
        torch.testing.assert_close(found, dist.Normal(0.0, 1.0).log_prob(torch.arange(12.0)))


def test_only_loops_are_joined():
    """A single numbered site, a site that has the loop's name already, and what carries no number stay."""

    def model():
        pyro.sample("z_0", dist.Normal(0.0, 1.0))
        for name in ("y", "y_0", "y_1", "w_a", "w_b", "v0", "v1"):
            pyro.sample(name, dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
        for t in range(3):
            pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    terms = pe.TraceTimestep_ELBO().terms(model, lambda: pyro.sample("z_0", dist.Normal(0.0, 1.0)))
    assert set(terms.kl) == {"z_0"}
    assert set(terms.log_likelihood) == {"y", "y_0", "y_1", "w_a", "w_b", "v0", "v1", "x"}
    assert terms.kl["z_0"].shape == ()


def loop_with_an_odd_step(other):
    """Three steps, the last of which has another number of rows, event, scale, or an observation."""

    def run(is_model):
        plates = {size: pyro.plate(f"rows_{size}", size) for size in (3, 4)}
        for t in range(3):
            odd = other if t == 2 else None
            size, event = (4 if odd == "plate" else 3), (5 if odd == "event" else 2)
            fn = dist.Normal(torch.zeros(size, event), 1.0).to_event(1)
            with plates[size], poutine.scale(scale=2.0 if odd == "scale" else 1.0):
                if odd != "kind":
                    pyro.sample(f"z_{t}", fn)
                elif is_model:
                    pyro.sample(f"z_{t}", fn, obs=torch.zeros(size, event))

    return lambda: run(True), lambda: run(False)


@pytest.mark.parametrize("other", ["plate", "event", "scale", "kind"])
def test_loops_whose_steps_differ(other):
    with pytest.raises(SiteError, match=r"'z_2' differs from 'z_0'.*pe.scan"):
        pe.TraceTimestep_ELBO().terms(*loop_with_an_odd_step(other))
    assert pe.TraceTimestep_ELBO().terms(*loop_with_an_odd_step(None)).kl["z"].shape == (3, 3)


def test_masks_of_steps_are_joined():
    """Steps without mask, with a row of them, and masked as a whole."""
    keep = torch.tensor([True, False, True])
    masks = {0: True, 1: keep, 2: False}

    def model():
        with pyro.plate("rows", 3):
            for t, mask in masks.items():
                with poutine.mask(mask=mask):
                    pyro.sample(f"x_{t}", dist.Normal(0.0, 1.0), obs=torch.ones(3))

    terms = pe.TraceTimestep_ELBO().terms(model, lambda: None)
    expected = torch.stack([torch.ones(3, dtype=torch.bool), keep, torch.zeros(3, dtype=torch.bool)], -1)
    assert torch.equal(terms.log_likelihood["x"] != 0, expected)
    assert terms.num_frames == 5


# --- weights -------------------------------------------------------------------------------------------------------

BETAS = {
    "per step": torch.tensor([0.0, 0.5, 1.0, 3.0]),
    "per sequence": torch.tensor([[0.5], [1.0], [2.0]]),
    "both": torch.arange(12.0).reshape(N, T) / 7,
    "a number": torch.tensor(0.3),
}


@pytest.mark.parametrize("kl", ["auto", "sampled"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("way", BOTH)
def test_beta_per_step(way, beta, kl):
    weight = BETAS[beta].double()
    terms = terms_of(way, pe.TraceTimestep_ELBO(weight, kl=kl), frames())
    charge = (weight * (terms.kl["z"] + terms.kl["w"])).sum()
    torch.testing.assert_close(terms.objective, terms.log_likelihood["x"].sum() - charge)
    torch.testing.assert_close(terms.elbo, terms_of(way, pe.TraceTimestep_ELBO(kl=kl), frames()).elbo)


@pytest.mark.parametrize("way", BOTH)
def test_beta_per_site_and_step(way):
    weights = {"z": torch.tensor([0.0, 1.0, 2.0, 3.0]), "w": pe.LinearWarmup(0.25, 1.0, steps=10)}
    terms = terms_of(way, pe.TraceTimestep_ELBO(weights), frames())
    charge = (weights["z"] * terms.kl["z"]).sum() + 0.25 * terms.kl["w"].sum()
    torch.testing.assert_close(terms.objective, terms.log_likelihood["x"].sum() - charge)


@pytest.mark.parametrize("particles", PARTICLES)
def test_weights_are_the_same_for_loop_and_scan(particles):
    """Value and gradient of β per step, free bits and capacity."""
    for options in (
        {"beta": BETAS["per step"].double(), "free_bits": 0.1},
        {"beta": pe.Capacity(0.0, 2.0, steps=9, gamma=3.0)},
        {"free_bits": 0.4, "normalize": "frame"},
        {"beta": 0.0, "kl": "sampled"},
    ):
        found, expected = (
            loss_and_gradients(pe.TraceTimestep_ELBO(**options, **PARTICLES[particles]), *pair(way), frames())
            for way in BOTH
        )
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_free_bits_have_a_floor_per_dimension_and_not_per_step():
    """KL of dimension i and step t in nats; the mean over data and steps is compared with the floor."""
    nats = torch.tensor([[0.1, 0.9], [0.5, 2.0]])  # step, dimension; means 0.3 and 1.45

    def model():
        pe.scan(lambda c, m: (c, pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))), None, nats)

    def guide():
        pe.scan(lambda c, m: (c, pyro.sample("z", dist.Normal((2 * m).sqrt(), 1.0).to_event(1))), None, nats)

    terms = pe.TraceTimestep_ELBO(free_bits=0.4).terms(model, guide)
    torch.testing.assert_close(terms.kl_per_dim["z"], nats)
    assert terms.objective.item() == pytest.approx(-(2 * 0.4 + 0.9 + 2.0))


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize("shape", [(T + 1,), (N, 1, T), (2, T)])
def test_beta_that_does_not_fit(way, shape):
    with pytest.raises(ArgumentError, match=r"'z'.*'sequences': 3, 'time': 4"):
        terms_of(way, pe.TraceTimestep_ELBO(torch.ones(shape)), frames())


def test_schedules_advance_once_a_step():
    model, guide = pair(BOTH[0])
    objective = pe.TraceTimestep_ELBO(pe.LinearWarmup(0.0, 1.0, steps=4))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), objective)
    for t in range(6):
        assert objective.beta_at(objective.step, ["z"])["z"] == pytest.approx(min(t / 4, 1.0))
        svi.step(frames())
        svi.evaluate_loss(frames())
    assert objective.step == 6


# --- what the objective is divided by ------------------------------------------------------------------------------


@pytest.mark.parametrize("way", BOTH)
@pytest.mark.parametrize(
    ("lengths", "divisors"),
    [(None, (1, N, N * T, T)), (LENGTHS, (1, N, int(LENGTHS.sum()), T))],
    ids=["full", "ragged"],
)
def test_normalization(way, lengths, divisors):
    total = terms_of(way, pe.TraceTimestep_ELBO(), frames(), lengths)
    for normalize, divisor in zip(("total", "sequence", "frame", "step"), divisors, strict=True):
        terms = terms_of(way, pe.TraceTimestep_ELBO(normalize=normalize), frames(), lengths)
        torch.testing.assert_close(terms.objective, total.objective / divisor)
        torch.testing.assert_close((terms.elbo, terms.rate, terms.kl), (total.elbo, total.rate, total.kl))


def test_normalization_scales_gradients_too():
    found = loss_and_gradients(pe.TraceTimestep_ELBO(normalize="frame"), *pair(BOTH[0]), frames(), LENGTHS)
    expected = loss_and_gradients(pe.TraceTimestep_ELBO(), *pair(BOTH[0]), frames(), LENGTHS)
    torch.testing.assert_close(found[1], {n: g / LENGTHS.sum() for n, g in expected[1].items()})


@pytest.mark.parametrize("way", BOTH)
def test_frames_of_a_subsample_stand_for_all(way):
    """Two of six sequences: twelve frames of the six, and the objective per frame is that of the two."""
    rows = torch.tensor([0, 1])

    def subsampled(a_step, size):
        def run(x, lengths):
            with pyro.plate("sequences", size, subsample=rows[:2]):
                way(a_step, torch.zeros(2), x, lengths, length=T)

        return run

    lengths, per_frame = torch.tensor([3, 1]), []
    for size in (2, 6):
        objective = pe.TraceTimestep_ELBO(normalize="frame")
        pyro.set_rng_seed(3)
        terms = objective.terms(subsampled(step, size), subsampled(guide_step, size), frames()[:, :2], lengths)
        assert terms.num_frames == 4 * size / 2
        per_frame.append(terms.objective)
    torch.testing.assert_close(*per_frame)


def test_there_are_no_frames_without_an_observed_site_over_time():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0))

    with pytest.raises(ArgumentError, match="no frames"):
        pe.TraceTimestep_ELBO(normalize="frame").terms(model, lambda: None)
    assert pe.TraceTimestep_ELBO(normalize="step").terms(model, lambda: None).objective < 0


@pytest.mark.parametrize("resample", [-0.1, 1.5, math.nan])
def test_resample_is_a_part_of_the_particles(resample):
    with pytest.raises(ArgumentError, match="resample must be between 0 and 1"):
        pe.TraceTimestep_ELBO(num_particles=2, bound="filtering", resample=resample)


# --- guides that run backward --------------------------------------------------------------------------------------


def walk(way):
    def a_step(z, x_t):
        z = pyro.sample("z", dist.Normal(z, 1.0))
        return z, z

    return lambda: way(a_step, torch.tensor(0.0), None, length=2)


def backward(way):
    """The walk itself, taken from its end: q(z_1) q(z_0 | z_1)."""
    first = (torch.tensor(0.0), torch.tensor(2.0).sqrt())
    later = (torch.tensor(0.5), torch.tensor(0.5).sqrt())
    gains, scales = (torch.stack(pair) for pair in zip(later, first, strict=True))

    def a_step(z, x_t):
        z = pyro.sample("z", dist.Normal(x_t["gain"] * z, x_t["scale"]))
        return z, z

    return lambda: way(a_step, torch.tensor(0.0), {"gain": gains, "scale": scales}, length=2, reverse=True)


def test_a_guide_that_runs_backward_has_sampled_terms():
    """Model and guide are equal: the bound is 0 for every draw. Site by site in closed form its mean would be 1."""
    for way in BOTH:
        terms = pe.TraceTimestep_ELBO(num_particles=3).terms(walk(way), backward(way))
        assert terms.is_analytic == {"z": False}
        assert terms.kl["z"].shape == (2,)
        assert abs(pe.TraceTimestep_ELBO(kl="sampled").terms(walk(way), backward(way)).elbo) < 1e-12
    assert abs(pe.TraceTimestep_ELBO(num_particles=3).terms(walk(BOTH[0]), backward(BOTH[0])).elbo) < 1e-12
    objective = pe.TraceTimestep_ELBO(num_particles=400, vectorize_particles=True, max_plate_nesting=0)
    # In the loop z_0 has no parent in the model and takes the closed form, which adds noise.
    bounds = torch.stack([objective.terms(walk(BOTH[1]), backward(BOTH[1])).elbo for _ in range(20)])
    values = torch.tensor([wrong(400) for _ in range(20)])
    for found, expected in ((bounds, 0.0), (values, 1.0)):
        assert abs(found.mean() - expected) < 5 * found.std() / 20**0.5  # t of 19: a false alarm in 10 000


def wrong(n):
    """Pyro's form of the loop, which only warns that the order of the sites matters."""
    loss = TraceMeanField_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)
    with pytest.warns(UserWarning, match="order"):
        return loss.loss(walk(BOTH[1]), backward(BOTH[1]))


def test_pyros_mean_field_elbo_samples_a_scan_that_runs_backward():
    assert abs(TraceMeanField_ELBO().loss(walk(BOTH[0]), backward(BOTH[0]))) < 1e-12


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_several_latents_a_step_in_another_order(direction):
    """The guide draws w before z at every step: z's parents in the model come first all the same, w's do not."""

    def model_step(c, x_t):
        z = pyro.sample("z", dist.Normal(c, 1.0))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        return w, None

    def swapped(c, x_t):
        w = pyro.sample("w", dist.Normal(c, 1.0))
        z = pyro.sample("z", dist.Normal(w, 1.0))
        return z, None

    reverse = direction == "backward"
    model = lambda: pe.scan(model_step, torch.tensor(0.0), None, length=3, reverse=reverse)  # noqa: E731
    same = lambda: pe.scan(model_step, torch.tensor(0.0), None, length=3, reverse=reverse)  # noqa: E731
    guide = lambda: pe.scan(swapped, torch.tensor(0.0), None, length=3, reverse=reverse)  # noqa: E731
    assert pe.TraceTimestep_ELBO().terms(model, same).is_analytic == {"z": True, "w": True}
    assert not pe.TraceTimestep_ELBO().terms(model, guide).is_analytic["w"]
    other = lambda: pe.scan(model_step, torch.tensor(0.0), None, length=3, reverse=not reverse)  # noqa: E731
    assert pe.TraceTimestep_ELBO().terms(model, other).is_analytic == {"z": False, "w": False}


def test_a_latent_before_the_scan():
    """Drawn first in the model and last in the guide, it takes the closed form from the scan's sites."""

    def scan_z(level):
        pe.scan(lambda c, x: (c, pyro.sample("z", dist.Normal(c, 1.0))), level, None, length=3)

    def model():
        scan_z(pyro.sample("level", dist.Normal(0.0, 1.0)))

    def late():
        scan_z(torch.tensor(0.0))
        pyro.sample("level", dist.Normal(0.0, 1.0))

    assert pe.TraceTimestep_ELBO().terms(model, model).is_analytic == {"level": True, "z": True}
    assert pe.TraceTimestep_ELBO().terms(model, late).is_analytic == {"level": True, "z": False}


def test_expected_terms_of_a_smoother_and_a_filter():
    """q(z_t | z_{t-1}, x) that looks ahead or not: both bounds lie below log p(x), the exact smoother's on it."""
    x = torch.tensor([0.5, -1.0, 2.0])
    cov = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 2.0], [1.0, 2.0, 3.0]]) + torch.eye(3)
    evidence = dist.MultivariateNormal(torch.zeros(3), cov).log_prob(x)

    def model():
        def a_step(z, x_t):
            z = pyro.sample("z", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
            return z, z

        pe.scan(a_step, torch.tensor(0.0), x)

    def guide(ahead):
        def run():
            precision, shift = torch.tensor(0.0), torch.tensor(0.0)
            rows = []
            for t in (2, 1, 0):  # p(x_{t:T} | z_t) ∝ exp(-½ j z² + h z)
                j, h = (precision, shift) if ahead else (torch.tensor(0.0), torch.tensor(0.0))
                precision, shift = 1 + j / (1 + j), x[t] + h / (1 + j)
                rows.insert(0, torch.stack([precision, shift]))
            rows = torch.stack(rows)

            def a_step(z, row):
                variance = 1 / (1 + row[0])
                z = pyro.sample("z", dist.Normal(variance * (z + row[1]), variance.sqrt()))
                return z, z

            pe.scan(a_step, torch.tensor(0.0), rows)

        return run

    for seed in range(3):
        pyro.set_rng_seed(seed)
        terms = pe.TraceTimestep_ELBO(kl="sampled").terms(model, guide(ahead=True))
        torch.testing.assert_close(terms.elbo, evidence, rtol=0, atol=1e-10)
    objective = pe.TraceTimestep_ELBO(num_particles=4000, vectorize_particles=True, max_plate_nesting=0)
    filtered = objective.terms(model, guide(ahead=False)).elbo
    assert filtered < evidence - 0.05
    assert math.isfinite(filtered)


@pytest.mark.parametrize("particles", PARTICLES.values(), ids=PARTICLES)
def test_a_loop_of_pathwise_and_score_function_steps_keeps_the_gradient(particles):
    """z_0 Normal, z_1 Bernoulli: the gradient of Pyro's Trace_ELBO on the same draws."""

    def model():
        a = pyro.sample("z_0", dist.Normal(0.0, 1.0))
        b = pyro.sample("z_1", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(a + 3 * b, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("z_0", dist.Normal(number("a"), 1.0))
        pyro.sample("z_1", dist.Bernoulli(logits=number("b")))

    gradients = []
    for loss in (Trace_ELBO(**particles), pe.TraceTimestep_ELBO(kl="sampled", **particles)):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        loss.loss_and_grads(model, guide)
        gradients.append([pyro.get_param_store()._params[name].grad for name in ("a", "b")])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_importance_weights_refuse_a_scale_of_the_guide_alone_in_a_loop():
    def model():
        for t in range(2):
            pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    with pytest.raises(SiteError, match="'z in the guide': 2.0"):
        pe.TraceTimestep_ELBO(bound="importance", num_particles=2).terms(model, poutine.scale(model, 2.0))
