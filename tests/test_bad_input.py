"""Bad input, every way of drawing particles: one error type, the site, what was expected, what came, the cure."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList, AutoMultivariateNormal, AutoNormal

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, DataError, GuideError, NonFiniteError, PyroElboError, SiteError
from tests.support.refusing import refusing
from tests.support.untyped import _untyped  # noqa: F401  (a fixture)

X = torch.tensor([0.3, -1.2, 0.8, 1.9])
CURE = re.compile(
    r"\b(add|remove|mark|put|use|give|skip|call|fill|look|sample|declare|choose|train|must be|expected a beta)\b", re.I
)
refuses = refusing(CURE)


def model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide(x):
    pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.4)), 1.0))


def local_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def local_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.5 * x, 1.0))


SETTINGS = {
    "auto": {},
    "sampled": {"kl": "sampled"},
    "loop": {"num_particles": 2},
    "vectorized": {"num_particles": 2, "vectorize_particles": True},
    "nesting given": {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 2},
}


@pytest.fixture(params=SETTINGS)
def loss(request):
    return pe.TraceBeta_ELBO(**SETTINGS[request.param])


def test_every_way_into_the_objective_refuses_alike():
    def empty(x):
        pass

    loss = pe.TraceBeta_ELBO()
    svi = pyro.infer.SVI(model, empty, pyro.optim.Adam({"lr": 0.01}), loss=loss)
    for call in (
        lambda: loss.terms(model, empty, X),
        lambda: loss.loss(model, empty, X),
        lambda: loss.differentiable_loss(model, empty, X),
        lambda: loss.loss_and_grads(model, empty, X),
        lambda: loss(model, empty)(X),
        lambda: loss(model, empty).terms(X),
        lambda: svi.step(X),
        lambda: svi.evaluate_loss(X),
    ):
        with refuses(SiteError, "'z'", "guide"):
            call()
    assert loss.step == 0


# --- sites and shapes ---------------------------------------------------------------------------------------------


def test_a_latent_without_a_guide_site(loss):
    def other(x):
        pyro.sample("y", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})

    with refuses(SiteError, "'z'", "guide", "['y']"):
        loss.terms(model, other, X)


def test_a_guide_site_that_the_model_lacks(loss):
    def other(x):
        guide(x)
        pyro.sample("typo", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "'typo'", "guide", "model", "is_auxiliary"):
        loss.terms(model, other, X)


def test_a_site_observed_in_the_model_and_sampled_in_the_guide(loss):
    def other(x):
        guide(x)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "'x'", "observed", "guide"):
        loss.terms(model, other, X)


def test_data_that_does_not_fit_its_plate(loss):
    def other(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:3])

    with refuses(SiteError, "'x'", "4", "3"):
        loss.terms(other, guide, X)


def test_an_event_of_the_wrong_size(loss):
    def other(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1), obs=torch.zeros(4, 2))

    with refuses(SiteError, "'x'", "3", "2"):
        loss.terms(other, guide, X)


def test_a_batch_dimension_that_no_plate_declares(loss):
    def other(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0), obs=x)

    with refuses(SiteError, "'x'", "4", "pyro.plate", "to_event"):
        loss.terms(other, guide, X)


def test_a_batch_dimension_in_the_guide_that_no_plate_declares(loss):
    def other(x):
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    with refuses(SiteError, "'z'", "4", "pyro.plate", "to_event"):
        loss.terms(local_model, other, X)


def test_an_outer_product_of_two_data_dimensions(loss):
    """A column of values against a row of locations: 16 terms for 4 rows, unless refused."""

    def other(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.unsqueeze(-1))

    with refuses(SiteError, "'x'", "4"):
        loss.terms(other, local_guide, X)


def test_event_dimensions_that_differ_between_model_and_guide(loss):
    def vector_model(x):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def scalar_guide(x):
        with pyro.plate("dims", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    with refuses(SiteError, "'z'"):
        loss.terms(vector_model, scalar_guide, X)


def test_event_sizes_that_differ_between_model_and_guide(loss):
    def three(x):
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def two(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with refuses(SiteError, "'z'", "3", "2"):
        loss.terms(three, two, X)


def test_a_guide_that_shares_one_latent_among_all_rows(loss):
    """One draw for four rows of the model: its log q would count once and log p four times."""

    def shared(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "'z'", "4"):
        loss.terms(local_model, shared, X)


# --- plates -------------------------------------------------------------------------------------------------------


def test_a_plate_without_rows(loss):
    with refuses(PyroElboError, "data"):
        loss.terms(local_model, local_guide, X[:0])


def test_a_plate_of_another_size_in_the_guide(loss):
    def smaller(x):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "data", "4", "3"):
        loss.terms(local_model, smaller, X)


def test_a_subsample_of_another_size_in_the_guide(loss):
    def rows(number):
        with pyro.plate("data", 4, subsample_size=number):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "data", "3", "2"):
        loss.terms(lambda x: rows(3), lambda x: rows(2), X)


def test_a_full_size_that_differs_between_model_and_guide(loss):
    """Equal minibatches of unequal data: the KL would be scaled by 50 in one program and by 25 in the other."""

    def rows(size):
        with pyro.plate("data", size, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "data", "100", "50"):
        loss.terms(lambda x: rows(100), lambda x: rows(50), X)


def test_a_nesting_that_is_too_small_for_the_plates():
    small = pe.TraceBeta_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
    with refuses(SiteError, "plate", "max_plate_nesting"):
        small.terms(local_model, local_guide, X)


# --- NaN and infinity -----------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["validated", "unvalidated"])
def validate(request):
    pyro.enable_validation(request.param)
    return request.param


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_data_that_are_not_finite(loss, value, validate):
    x = X.clone()
    x[2] = value
    with refuses(NonFiniteError, "'x'", "1 of 4"):
        loss.terms(model, guide, x)


def test_data_that_are_not_finite_are_counted_and_located(validate):
    x = torch.tensor([0.0, math.nan, math.nan, math.inf, 1.0])
    with refuses(NonFiniteError, "'x'", "3 of 5", "(1,)"):
        pe.TraceBeta_ELBO().terms(model, guide, x)


def test_nan_data_that_reach_the_guide_first(loss, validate):
    x = X.clone()
    x[1] = math.nan
    with refuses(NonFiniteError, "1 of 4"):
        loss.terms(local_model, local_guide, x)


def test_a_factor_that_is_not_finite(loss, validate):
    """The data are fine; one row of a factor is not."""

    def other(x):
        model(x)
        with pyro.plate("rows", len(x)):
            pyro.factor("penalty", torch.tensor([0.0, -math.inf, 0.0, 0.0]))

    with refuses(NonFiniteError, "'penalty'", "1 of 4"):
        loss.terms(other, guide, X)


def test_the_first_bad_term_in_program_order_is_named(loss):
    def other(x):
        model(x)
        pyro.factor("first", torch.tensor(math.nan))
        pyro.factor("second", torch.tensor(math.nan))

    with refuses(NonFiniteError, "'first'"):
        loss.terms(other, guide, X)


def test_infinities_that_cancel_are_still_refused(loss):
    def other(x):
        model(x)
        pyro.factor("up", torch.tensor(math.inf))
        pyro.factor("down", torch.tensor(-math.inf))

    with refuses(NonFiniteError, "'up'"):
        loss.terms(other, guide, X)


@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_a_kl_that_is_not_finite(beta):
    """The guide puts mass where the model has none; β = 0 must not hide it."""
    pyro.enable_validation(False)
    for options in SETTINGS.values():
        with refuses(NonFiniteError, "'z'"):
            pe.TraceBeta_ELBO(beta, **options).terms(
                lambda: pyro.sample("z", dist.Uniform(0.0, 1.0)), lambda: pyro.sample("z", dist.Uniform(5.0, 6.0))
            )


def test_a_parameter_that_diverged(validate):
    pyro.param("loc", torch.tensor(math.nan))
    with refuses(PyroElboError, "z"):
        pe.TraceBeta_ELBO().terms(model, guide, X)


def test_a_refused_step_moves_no_parameter():
    loss = pe.TraceBeta_ELBO()
    svi = pyro.infer.SVI(local_model, AutoNormal(local_model), pyro.optim.Adam({"lr": 0.1}), loss)
    svi.step(X)
    before = {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}
    x = X.clone()
    x[0] = math.nan
    with refuses(NonFiniteError, "'x'"):
        svi.step(x)
    for name, p in pyro.get_param_store().named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0)
    assert loss.step == 1


def test_an_observation_outside_of_the_support():
    def other(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(2.0), obs=x)

    with refuses(SiteError, "'x'", "Poisson"):
        pe.TraceBeta_ELBO().terms(other, guide, X)


# --- arguments of the objective ---------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [-1.0, -1e-9, math.nan, math.inf, torch.tensor([1.0, -1.0]), torch.tensor(math.nan)])
def test_a_beta_that_is_negative_or_not_finite(beta):
    with refuses(ArgumentError, "beta", ">= 0"):
        pe.TraceBeta_ELBO(beta)
    with refuses(ArgumentError, "beta", "'z'", ">= 0"):
        pe.TraceBeta_ELBO({"z": beta})


@pytest.mark.parametrize("name", ["zz", "x"])
def test_a_beta_for_a_site_that_is_no_latent(name):
    for options in SETTINGS.values():
        with pytest.raises(ArgumentError, match=rf"'{name}'.*\['z'\]"):
            pe.TraceBeta_ELBO({name: 2.0}, **options).terms(model, guide, X)


@pytest.mark.parametrize("shape", [(3,), (4, 4), (2, 4), (5, 1), (4, 1)])
def test_a_beta_tensor_that_does_not_broadcast_against_the_plates(shape):
    for options in SETTINGS.values():
        with refuses(ArgumentError, "'z'", "4", tuple(shape), "beta"):
            pe.TraceBeta_ELBO(torch.ones(shape), **options).terms(local_model, local_guide, X)


def test_a_beta_per_datum_for_a_global_site():
    with refuses(ArgumentError, "'z'", "(4,)", "beta"):
        pe.TraceBeta_ELBO(torch.ones(4)).terms(model, guide, X)


@pytest.mark.parametrize("free_bits", [-0.5, math.nan, math.inf])
def test_free_bits_that_are_negative_or_not_finite(free_bits):
    with refuses(ArgumentError, "free_bits", free_bits, ">= 0"):
        pe.TraceBeta_ELBO(free_bits=free_bits)


# --- guides without parameters ------------------------------------------------------------------------------------


def guide_list(program):
    guides = AutoGuideList(program)
    guides.append(AutoNormal(poutine.block(program, expose=["z"])))
    return guides


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal, guide_list], ids=lambda k: k.__name__)
def test_an_autoguide_without_parameters(kind):
    module = pe.TraceBeta_ELBO()(model, kind(model))
    with refuses(GuideError, "Auto", "guide", "initialized"):
        list(module.parameters())
    with refuses(GuideError, "Auto", "guide"):
        torch.optim.Adam(module.parameters())
    module(X)
    assert len(list(module.parameters())) >= 2


def test_a_beta_per_site_of_a_joint_guide():
    guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
    with pytest.raises(ArgumentError, match="auxiliary site '_AutoMultivariateNormal_latent'.*Give it a weight"):
        pe.TraceBeta_ELBO({"z": 2.0}).terms(model, guide, X)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 0}, "num_particles must be a whole number >= 1, got 0"),
        ({"num_particles": 2.5}, "num_particles must be a whole number >= 1, got 2.5"),
        ({"num_particles": True}, r"num_particles must be a whole number >= 1, got True \(bool\)"),
        ({"max_plate_nesting": -1}, "max_plate_nesting must be a whole number >= 0, got -1"),
        ({"max_plate_nesting": "2"}, r"max_plate_nesting must be a whole number >= 0, got '2' \(str\)"),
        ({"kl": True}, "kl must be 'auto' or 'sampled', got True"),
        ({"free_bits": "a"}, r"free_bits \(nats\) must be a finite number >= 0, got 'a' \(str\)"),
        ({"free_bits": None}, r"free_bits .* got None \(NoneType\)"),
        ({"beta": "linear"}, r"beta must be a number, a tensor or a schedule such as .*, got 'linear' \(str\)"),
        ({"beta": True}, r"beta must be a number.* got True \(bool\)"),
        ({"beta": None}, r"beta must be a number.* got None \(NoneType\)"),
        ({"beta": [1.0, 2.0]}, r"beta must be a number.* got \[1.0, 2.0\] \(list\)"),
        ({"beta": {"z": pe.LinearWarmup}}, r"beta\['z'\] must .* class LinearWarmup; .* LinearWarmup\(...\)"),
        ({"penalties": pe.MutualInformation("z")}, r"penalties must be a list .* got MutualInformation\(.* \("),
        ({"penalties": [pe.TotalCorrelation]}, r"penalties must be a list .* the class TotalCorrelation"),
        ({"penalties": "z"}, r"penalties must be a list .* got 'z' \(str\)"),
        ({"penalties": 3.0}, r"penalties must be a list .* got 3.0"),
        ({"penalties": [pe.TotalCorrelation("z")] * 2}, r"\['TC\(z\)', 'TC\(z\)'\]: pass name=..."),
        ({"free_bits": 0.1, "beta": pe.Capacity(0.0, 1.0, steps=2)}, "Capacity"),
    ],
)
def test_arguments_out_of_range(options, match, untyped):
    with pytest.raises(ArgumentError, match=match):
        pe.TraceBeta_ELBO(**options)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: pe.LinearWarmup("0", 1.0, steps=3),
            r"LinearWarmup: start must be a finite number >= 0, got '0' \(str",
        ),
        (lambda: pe.LinearWarmup(0.0, 1.0, steps=2.5), r"LinearWarmup: steps must be a whole number >= 1, got 2.5"),
        (lambda: pe.Cyclical(0.0, 1.0, steps=9, cycles=1.5), r"Cyclical: cycles must be a whole number >= 1, got 1.5"),
        (lambda: pe.Constant(torch.tensor(1.0)), r"Constant: value must be a finite number >= 0, got tensor\(1.\)"),
        (lambda: pe.MutualInformation(3), r"MutualInformation: latent must be the name of a site, got 3"),
        (
            lambda: pe.MutualInformation("z", attribute=["s"]),
            r"attribute must .* a tuple of these, got \['s'\] \(list\)",
        ),
        (lambda: pe.MutualInformation("z", attribute=()), r"attribute must .* got \(\) \(tuple\)"),
        (lambda: pe.MutualInformation("z", weight="10"), r"weight .* must be a finite number, got '10' \(str\)"),
        (lambda: pe.MutualInformation("z", weight=-math.inf), r"weight .* must be a finite number, got -inf"),
        (lambda: pe.TotalCorrelation("z", weight=pe.LinearWarmup), r"weight .* got the class LinearWarmup"),
        (lambda: pe.TraceIW_ELBO(4, kl="auto"), r"The importance bound needs kl='sampled', got 'auto'. Leave kl out"),
        (lambda: pe.TraceTimestep_ELBO(bound=3), r"bound must be one of .* got 3"),
        (lambda: pe.TraceTimestep_ELBO(resample="x"), r"resample must be between 0 and 1, got 'x'"),
        (lambda: pe.TraceBeta_ELBO(gradient="reinforce"), r"gradient must be one of .* got 'reinforce'"),
        (lambda: pe.TraceBeta_ELBO(gradient="dreg"), r"no weights over particles. Use gradient='stl'"),
        (lambda: pe.TraceIW_ELBO(4, gradient="stl"), r"does not vanish under normalized weights. Use gradient='dreg'"),
        (lambda: pe.TraceIW_ELBO(4, gradient="vargrad"), r"Use gradient='rloo'"),
        (lambda: pe.TraceIW_ELBO(4, beta=0.5, gradient="dreg"), r"weight must be one. Use beta=1"),
        (lambda: pe.TraceBeta_ELBO(gradient="rloo"), r"needs num_particles >= 2, got 1"),
        (lambda: pe.TraceBeta_ELBO(gradient="vargrad"), r"needs num_particles >= 2, got 1"),
        (
            lambda: pe.TraceTimestep_ELBO(bound="filtering", num_particles=3, gradient="dreg"),
            r"no gradient of the filtering bound.* Use gradient='auto'",
        ),
        (lambda: pe.TraceIW_ELBO(4, alpha=-1.0), r"alpha must be a finite number >= 0, got -1.0"),
        (
            lambda: pe.TraceTimestep_ELBO(bound="filtering", num_particles=3, vectorize_particles=False),
            r"The filtering bound needs vectorize_particles=True, got False",
        ),
    ],
)
def test_arguments_of_a_wrong_type(make, match, untyped):
    with pytest.raises(ArgumentError, match=match):
        make()


def test_an_attribute_of_the_wrong_arity():
    for attribute in (lambda: X, lambda x, s: s):
        loss = pe.TraceMI_ELBO("z", attribute=attribute)
        with refuses(ArgumentError, "Attribute 's'", "1 positional", "Give it the parameters of the model"):
            loss.terms(local_model, local_guide, X)


def test_two_penalties_on_functions_are_told_apart_by_name():
    sign, size = (lambda x: (x > 0).long()), (lambda x: (x.abs() > 1).long())
    with pytest.raises(ArgumentError, match=r"name of its own, got \['I\(z; s\)', 'I\(z; s\)'\]: pass name="):
        pe.TraceBeta_ELBO(penalties=[pe.MutualInformation("z", sign), pe.MutualInformation("z", size)])
    named = [pe.MutualInformation("z", sign, name="sign"), pe.MutualInformation("z", size, weight=2.0, name="size")]
    pyro.set_rng_seed(0)
    terms = pe.TraceBeta_ELBO(penalties=named).terms(local_model, local_guide, X)
    assert list(terms.penalties) == ["sign", "size"]
    for penalty, weight in zip(named, (1.0, 2.0), strict=True):
        pyro.set_rng_seed(0)
        alone = pe.TraceBeta_ELBO(penalties=[penalty]).terms(local_model, local_guide, X)
        torch.testing.assert_close(alone.penalties[penalty.name].nats, terms.penalties[penalty.name].nats)
        torch.testing.assert_close(alone.elbo - alone.objective, weight * 4 * alone.penalties[penalty.name].nats)


# --- the reason that is given ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_observations_of_a_dtype_that_the_distribution_does_not_take(dtype):
    class Subtracting(dist.Normal):
        def log_prob(self, value):
            if not value.is_floating_point():
                raise RuntimeError("result type Float can't be cast to the desired output type")
            return super().log_prob(value)

    def subtracting(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", Subtracting(torch.zeros(4), 1.0), obs=x)

    x = torch.tensor([1, 0, 1, 1], dtype=dtype)
    with refuses(SiteError, "'x'", dtype, "floating-point", ".float()"):
        pe.TraceBeta_ELBO().terms(subtracting, lambda x: None, x)


def test_nan_in_padding_is_not_blamed_for_a_negative_scale():
    def other(x):
        with pyro.plate("data", len(x)), poutine.mask(mask=~x.isnan()):
            pyro.sample("x", dist.Normal(0.0, torch.tensor(-1.0)), obs=x)

    x = torch.tensor([0.3, math.nan])
    with pytest.raises(ValueError, match="Expected parameter scale") as caught:
        pe.TraceBeta_ELBO().terms(other, lambda x: None, x)
    assert not isinstance(caught.value, NonFiniteError)


def test_data_with_fewer_rows_than_their_plate():
    def program(x):
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(torch.zeros(4), 1.0), obs=x)

    with pytest.raises(SiteError, match=r"expected batch shape \(4,\) .* got \(3,\)\. Give the data and the plate the"):
        pe.TraceBeta_ELBO().terms(program, lambda x: None, X[:3])


@pytest.mark.parametrize("call", [pe.TraceBeta_ELBO().terms, pe.pareto_k, pe.to_arviz], ids=lambda f: f.__name__)
def test_a_class_in_place_of_a_guide(call, untyped):
    with pytest.raises(ArgumentError, match=r"guide must be a program, got the class AutoNormal. Make one: AutoNormal"):
        call(model, AutoNormal, X)


def test_a_step_with_too_few_arguments():
    svi = pe.SVI(lambda x, y: model(x), lambda x, y: guide(x), pyro.optim.Adam({}), pe.TraceBeta_ELBO())
    with pytest.raises(DataError, match=r"calls the model as model\(tensor of shape \(4,\)\), but it takes"):
        svi.step(X)


CALLS = [pe.pareto_k, pe.to_arviz, pe.log_evidence, pe.linear_response, pe.TraceBeta_ELBO().terms]


@pytest.mark.parametrize("call", CALLS, ids=lambda f: f.__name__)
def test_a_call_without_data(call):
    with pytest.raises(DataError, match=r"called with \(\)|calls the model as model\(\)"):
        call(model, guide)


def test_a_list_in_place_of_an_array():
    """Where a program takes it, it is an array; a fit cannot tell rows from arguments."""
    found, expected = (pe.pareto_k(model, guide, x, num_samples=40) for x in ([1.0] * 4, torch.ones(4)))
    assert repr(found) == repr(expected)
    for rows in ([1.0, 2.0], [[1.0], [2.0]]):
        with pytest.raises(DataError, match="train: expected a tensor or an array, got a list of 2 rows"):
            pe.fit(model, guide, rows, progress=False)


def test_leave_one_out_of_something_else(untyped):
    with pytest.raises(ArgumentError, match="loo takes the result of pe.to_arviz, got dict"):
        pe.loo({"a": 1})


def test_a_batch_of_one_row_under_batch_norm():
    norm = torch.nn.BatchNorm1d(2)

    def other(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(norm(x), 1.0).to_event(1), obs=x)

    with pytest.raises(PyroElboError, match="batch norm"):
        pe.TraceBeta_ELBO().differentiable_loss(other, lambda x: None, torch.zeros(1, 2))


@pytest.mark.parametrize("folder", ["pyro", "torch"])
def test_a_line_of_the_user_in_a_folder_named_like_a_library(folder, tmp_path):
    from pyro_elbo.failures import failed_line

    path = tmp_path / folder / "mine.py"
    path.parent.mkdir()
    path.write_text("import torch\n\ndef f():\n    return torch.zeros(2) + torch.zeros(3)\n")
    names: dict = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    with pytest.raises(RuntimeError) as caught:
        names["f"]()
    assert failed_line(caught.value) == "Line 'return torch.zeros(2) + torch.zeros(3)'"


def test_code_without_a_file_is_named_by_its_function():
    from pyro_elbo.failures import failed_line

    names: dict = {}
    exec("import torch\ndef f():\n    return torch.zeros(2) + torch.zeros(3)\n", names)
    with pytest.raises(RuntimeError) as caught:
        names["f"]()
    assert failed_line(caught.value).startswith("Function 'f'")


@pytest.mark.parametrize("objective", [pe.TraceBeta_ELBO, pe.TraceIW_ELBO, pe.TraceTimestep_ELBO])
def test_unknown_options_name_the_class_that_was_called(objective):
    with pytest.raises(
        ArgumentError, match=rf"^{objective.__name__} has no option foo=. Its options are beta, kl, .*\.$"
    ):
        objective(foo=1)
    with pytest.raises(
        ArgumentError, match=rf"^{objective.__name__} has no option gradients=. Did you mean gradient=\?"
    ):
        objective(gradients="auto")


def test_a_message_that_ends_in_a_colon_becomes_a_sentence():
    def encoder(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(NonFiniteError, match=r"Real\(\)\. Argument 0 of the program holds such values: 1 of 2"):
        pe.TraceBeta_ELBO().loss(local_model, encoder, torch.tensor([0.0, math.nan]))


def test_numpy_arrays_are_data_everywhere():
    x = X.numpy()
    pyro.set_rng_seed(0)
    expected = pe.TraceBeta_ELBO().terms(model, guide, X).elbo.item()
    pyro.set_rng_seed(0)
    assert pe.TraceBeta_ELBO().terms(model, guide, x).elbo.item() == pytest.approx(expected, rel=1e-6)
    assert pe.pareto_k(model, guide, x, num_samples=100).k.shape == ()
    assert pe.to_arviz(model, guide, x, num_samples=10)["observed_data"]["x"].shape == (4,)
    assert SVI(model, guide, pyro.optim.Adam({}), pe.TraceBeta_ELBO()).step(x) > 0


def test_pyros_svi_with_too_few_arguments():
    svi = SVI(lambda x, y: model(x), lambda x, y: guide(x), pyro.optim.Adam({}), pe.TraceBeta_ELBO())
    with pytest.raises(DataError, match=r"calls the model as model\(tensor of shape \(4,\)\), but it takes"):
        svi.step(X)
