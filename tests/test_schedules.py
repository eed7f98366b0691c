"""Schedules as functions of the step, and the counting of optimization steps."""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, GuideError

X = torch.tensor([0.3, -1.2, 0.8])


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    loc = pyro.param("loc", torch.tensor(0.5))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=dist.constraints.positive)
    pyro.sample("z", dist.Normal(loc, scale))


@pytest.mark.parametrize(
    ("schedule", "start", "end"),
    [
        (pe.Constant(2.0), 2.0, 2.0),
        (pe.LinearWarmup(0.0, 1.0, steps=10), 0.0, 1.0),
        (pe.LinearWarmup(4.0, 1.0, steps=10), 4.0, 1.0),
        (pe.SigmoidWarmup(0.0, 1.0, steps=10), 0.0, 1.0),
        (pe.Cyclical(0.0, 1.0, steps=10, cycles=2), 0.0, 1.0),
        (pe.Capacity(0.0, 25.0, steps=10), 0.0, 25.0),
    ],
)
def test_schedule_starts_ends_and_settles(schedule, start, end):
    assert schedule(0) == pytest.approx(start)
    assert schedule(schedule.settled) == pytest.approx(end)
    assert schedule(10 * schedule.settled + 7) == schedule(schedule.settled)
    low, high = sorted((start, end))
    assert all(low - 1e-12 <= schedule(step) <= high + 1e-12 for step in range(15))


@pytest.mark.parametrize(
    "make",
    [
        lambda: pe.Constant(-1.0),
        lambda: pe.Constant(float("nan")),
        lambda: pe.LinearWarmup(0.0, float("inf"), steps=3),
        lambda: pe.LinearWarmup(0.0, 1.0, steps=0),
        lambda: pe.SigmoidWarmup(0.0, 1.0, steps=3, steepness=0.0),
        lambda: pe.Cyclical(0.0, 1.0, steps=3, cycles=0),
        lambda: pe.Cyclical(0.0, 1.0, steps=3, ratio=1.5),
        lambda: pe.Capacity(0.0, 5.0, steps=3, gamma=-2.0),
    ],
)
def test_bad_schedule_names_itself(make):
    with pytest.raises(ArgumentError, match="Constant|Warmup|Cyclical|Capacity"):
        make()


@dataclass
class Jump(pe.Schedule):
    """A user's schedule, neither frozen nor hashable by itself."""

    at: int

    def __call__(self, step):
        return float(step >= self.at)

    @property
    def settled(self):
        return self.at


def test_a_dataclass_that_is_not_frozen_is_a_schedule():
    loss = pe.TraceBeta_ELBO(beta={"z": Jump(2)})
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), loss)
    rates = []
    for _ in range(4):
        terms = loss.terms(model, guide, X)
        rates.append(((-terms.distortion - terms.objective) / terms.rate).item())
        svi.step(X)
    assert rates == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-5)
    assert len(pe.TraceBeta_ELBO(beta={"z": Jump(2), "w": Jump(2), "v": Jump(3)}).schedules) == 2


def test_svi_step_advances_and_evaluation_does_not():
    loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=10))
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss)
    for _ in range(4):
        svi.step(X)
        svi.evaluate_loss(X)
        loss.terms(model, guide, X)
    assert loss.step == 4
    assert loss.beta_at(loss.step, ["z"]) == {"z": pytest.approx(0.4)}


def test_torch_loop_advances_once_per_optimizer_step_and_not_per_backward():
    loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=10))
    auto = AutoNormal(model)
    module = loss(model, auto)
    module(X)  # data-dependent initialization: no backward, no step
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    other = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        module(X).backward()
        module(X).backward()  # gradient accumulation
        optimizer.step()
        other.step()
    assert loss.step == 3


def test_step_count_is_saved_and_restored_with_the_module():
    loss = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=10))
    auto = AutoNormal(model)
    module = loss(model, auto)
    module(X)
    loss.step = 7
    state = module.state_dict()
    fresh = pe.TraceBeta_ELBO(beta=pe.LinearWarmup(0.0, 1.0, steps=10))
    fresh(model, auto).load_state_dict(state)
    assert fresh.step == 7
    again = pe.TraceBeta_ELBO()
    again.load_state_dict(loss.state_dict())
    assert again.step == 7


def test_module_refuses_to_list_parameters_before_the_guide_has_any():
    module = pe.TraceBeta_ELBO()(model, AutoNormal(model))
    with pytest.raises(GuideError, match=r"guide \(AutoNormal\).*call guide"):
        torch.optim.Adam(module.parameters())


def test_scheduled_objective_is_the_weighted_bound():
    loss = pe.TraceBeta_ELBO(beta={"z": pe.LinearWarmup(0.0, 4.0, steps=8)})
    loss.step = 2
    terms = loss.terms(model, guide, X)
    torch.testing.assert_close(terms.objective, -terms.distortion - 1.0 * terms.rate)
    loss.step = 8
    terms = loss.terms(model, guide, X)
    torch.testing.assert_close(terms.objective, -terms.distortion - 4.0 * terms.rate)


def test_capacity_charges_the_distance_to_its_target_and_pulls_towards_it():
    capacity = pe.Capacity(0.0, 2.0, steps=4, gamma=10.0)
    loss = pe.TraceBeta_ELBO(beta=capacity)
    for step, pull in ((0, 1.0), (4, -1.0)):  # KL of q(z) is 0.2367 nats, per datum 0.0789: above 0, below 2
        loss.step = step
        terms = loss.terms(model, guide, X)
        expected = -terms.distortion - 10.0 * (terms.rate - capacity(step) * 3).abs()
        torch.testing.assert_close(terms.objective, expected)
        (gradient,) = torch.autograd.grad(terms.objective + terms.distortion, pyro.get_param_store()._params["loc"])
        assert torch.sign(gradient) == -pull


def test_free_bits_floor_every_dimension_and_stop_its_gradient():
    def local_model(x):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    loc = torch.tensor([0.1, 2.0], requires_grad=True)  # KL 0.005 and 2.0 nats per datum

    def local_guide(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    terms = pe.TraceBeta_ELBO(free_bits=0.5).terms(local_model, local_guide, X)
    torch.testing.assert_close(terms.objective, -terms.distortion - 3 * (0.5 + 2.0))
    (gradient,) = torch.autograd.grad(terms.objective + terms.distortion, loc)
    torch.testing.assert_close(gradient, torch.tensor([0.0, -6.0]))
    torch.testing.assert_close(terms.rate, torch.tensor(3 * 2.005))
