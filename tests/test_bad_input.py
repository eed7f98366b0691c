"""Programs that do not fit: one error type, with the site, what was expected, what came, and the cure."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError, PyroElboError, SiteError
from tests.programs import X, global_guide, global_model, local_guide, local_model


def expect(error, match, model, guide, *args, **options):
    assert issubclass(error, PyroElboError)
    with pytest.raises(error, match=match):
        pe.TraceBeta_ELBO(**options).terms(model, guide, *args)


def normal(name="z", shape=()):
    return pyro.sample(name, dist.Normal(torch.zeros(shape), 1.0))


def test_latent_without_guide():
    expect(SiteError, r"Latent site 'z'.*Add pyro.sample\('z'", lambda: normal(), lambda: None)


def test_guide_site_that_the_model_lacks():
    expect(SiteError, r"'y' is in the guide but not in the model.*is_auxiliary", lambda: normal(), lambda: normal("y"))


def test_guide_site_that_the_model_observes():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    expect(SiteError, r"'z' is observed in the model and sampled in the guide", model, lambda: normal())


def test_event_shapes_differ():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    expect(SiteError, r"'z'.*event shape \(3,\).*\(2,\).*to_event", model, guide)


def test_batch_dimension_outside_of_plates():
    expect(
        SiteError,
        r"'z'.*expected batch shape \(\).*got \(3,\).*plate",
        lambda: normal(shape=3),
        lambda: normal(shape=3),
    )


def test_observed_value_with_a_dimension_of_its_own():
    def model(x):
        normal()
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    expect(SiteError, r"'x'.*got \(4,\).*plate", model, lambda x: normal(), X)


def test_value_that_does_not_broadcast():
    def model(x):
        normal()
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(torch.zeros(4, 3), 1.0).to_event(1), obs=torch.zeros(4, 2))

    expect(SiteError, r"'x'.*\(4, 3\).*\(4, 2\)", model, lambda x: normal(), X)


def test_plate_of_the_wrong_size():
    def model(x):
        normal()
        with pyro.plate("data", 5):
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0), obs=x)

    expect(SiteError, r"plates do not fit.*data.*'?x'?", model, lambda x: normal(), X)


def test_plate_that_changes_size_between_model_and_guide():
    def program(size):
        def run():
            with pyro.plate("data", size):
                normal()

        return run

    expect(SiteError, r"'z': plate 'data' has 4 rows in the model and 3 in the guide", program(4), program(3))


def test_empty_plate():
    def program(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    expect(SiteError, r"plate.*is empty.*Skip empty", program, program, torch.zeros(0))


def test_value_outside_the_support():
    def model():
        normal()
        pyro.sample("k", dist.Poisson(2.0), obs=torch.tensor(-1.0))

    expect(SiteError, r"'k'.*support of Poisson", model, lambda: normal())


def test_nan_in_data():
    bad = X.clone()
    bad[2] = float("nan")
    expect(
        NonFiniteError,
        r"'x': 1 of 4 values are not finite \(1 nan.*index \(2,\).*mask",
        global_model,
        global_guide,
        bad,
    )
    bad[1] = float("inf")
    with pyro.validation_enabled(False):
        expect(NonFiniteError, r"'x'.*2 of 4 values", global_model, global_guide, bad)


def test_nan_that_reaches_an_encoder():
    bad = X.clone()
    bad[0] = float("nan")
    expect(NonFiniteError, r"Argument 0.*1 of 4 values.*encoder", local_model, local_guide, bad)


def test_nan_in_a_kl():
    def model():
        pyro.sample("z", dist.Uniform(0.0, 1.0))

    with pyro.validation_enabled(False):
        expect(NonFiniteError, r"'z': log q - log p.*1 inf", model, lambda: pyro.sample("z", dist.Normal(5.0, 0.1)))


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf"), torch.tensor([1.0, -2.0]), {"z": -0.5}])
def test_beta_negative_or_not_finite(beta):
    with pytest.raises(ArgumentError, match=r"beta.*finite and >= 0"):
        pe.TraceBeta_ELBO(beta)


def test_beta_of_an_unknown_site_or_wrong_shape():
    expect(ArgumentError, r"'w'.*\['z'\]", global_model, global_guide, X, beta={"w": 2.0})
    expect(ArgumentError, r"'z'.*'data': 4.*\(3,\)", local_model, local_guide, X, beta=torch.ones(3))


def test_beta_per_site_of_a_joint_guide():
    guide = pyro.infer.autoguide.AutoMultivariateNormal(global_model)
    expect(ArgumentError, r"auxiliary site '_AutoMultivariateNormal_latent'", global_model, guide, X, beta={"z": 2.0})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 0}, "num_particles"),
        ({"free_bits": -0.1}, "free_bits"),
        ({"free_bits": float("nan")}, "free_bits"),
        ({"free_bits": 0.1, "beta": pe.Capacity(0.0, 1.0, steps=2)}, "Capacity"),
    ],
)
def test_arguments_out_of_range(options, match):
    with pytest.raises(ArgumentError, match=match):
        pe.TraceBeta_ELBO(**options)
