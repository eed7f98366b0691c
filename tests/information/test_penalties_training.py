"""Penalties in training: gradients, weights, critics, compiled steps, fits, and what is refused."""

import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, CompileError, DataError, SiteError
from pyro_elbo.information import aggregate
from tests.support.compiled import _interpreted  # noqa: F401  (a fixture)
from tests.support.refusing import refusing
from tests.support.rows import every_other, thorough

ROWS, DIMS = 40, 3
CURES = (
    r"Take |Leave out|Name |Give |Draw |Use |[Pp]ass |Penalize|Mask |Number |Observe |Train |is a number|add up|"
    r"expected|must be"
)
refuses = refusing(re.compile(CURES))


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()


def data(rows=ROWS, levels=2):
    s = torch.arange(rows) % levels
    return torch.randn(rows, DIMS) + s[:, None], s


def model(x, s):
    w = pyro.param("w", lambda: torch.ones(DIMS))
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("s", dist.Bernoulli(0.5), obs=s.to(x))
        z = pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w * z, 1.0).to_event(1), obs=x)


def guide(x, s):
    a = pyro.param("a", lambda: torch.full((DIMS,), 0.5))
    scale = pyro.param("scale", lambda: torch.full((DIMS,), 0.4), constraint=constraints.positive)
    with pyro.plate("data", 100, subsample_size=len(x)):
        pyro.sample("z", dist.Normal(a * x, scale).to_event(1))


def first(x, s):
    return x[:, 0]


PENALTIES = {
    "aggregate": lambda weight: pe.MutualInformation("z", "s", weight),
    "conditional": lambda weight: pe.MutualInformation("z", "s", weight, conditional_on=lambda x, s: x[:, 1] > 0),
    "variational": lambda weight: pe.MutualInformation("z", "s", weight, "variational"),
    "club": lambda weight: pe.MutualInformation("z", "s", weight, "club"),
    "adversarial": lambda weight: pe.MutualInformation("z", "s", weight, "adversarial"),
    "adversarial, continuous": lambda weight: pe.MutualInformation("z", first, weight, "adversarial"),
    "hsic": lambda weight: pe.MutualInformation("z", first, weight, "hsic"),
    "datum": lambda weight: pe.MutualInformation("z", weight=weight),
    "total correlation": lambda weight: pe.TotalCorrelation("z", weight),
    "groups": lambda weight: pe.TotalCorrelation("z", weight, groups=((0, 2), (1,))),
}
every = pytest.mark.parametrize("make", PENALTIES.values(), ids=PENALTIES)
PARTICLES = [{}, {"num_particles": 2}, {"num_particles": 2, "vectorize_particles": True}]


@every
@pytest.mark.parametrize("options", PARTICLES, ids=["one", "looped", "vectorized"])
def test_gradient_equals_finite_differences(make, options):
    """At the same noise the penalty is a function of the parameters: every draw's gradient is exact."""
    args, penalty = data(100), make(1.0)
    loss = pe.TraceBeta_ELBO(penalties=[penalty], **options)
    loss.terms(model, guide, *args)
    leaves = list(dict(pyro.get_param_store().named_parameters()).values())

    def value():
        torch.manual_seed(3)
        return loss.terms(model, guide, *args).penalties[penalty.name].nats

    gradients = torch.autograd.grad(value(), leaves, allow_unused=True)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for i in range(leaf.numel()):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    leaf[i] += step
                    ends.append(value())
                    leaf[i] -= step
            difference = (ends[0] - ends[1]) / 2e-5
            found = 0.0 if gradient is None else gradient[i].item()
            assert math.isclose(found, difference.item(), rel_tol=1e-6, abs_tol=1e-7)


def steps(penalties, count=4, *, compile=False, objective=pe.TraceBeta_ELBO, grad_clip=None, **options):
    """Losses, parameters and objective after a few steps."""
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    args = data()
    loss = objective(penalties=penalties, **options)
    optim = pyro.optim.Adam({"lr": 0.01})
    svi = pe.SVI(model, guide, optim, loss, compile=compile, fallback_random=True, grad_clip=grad_clip)
    losses = [svi.step(*args) for _ in range(count)]
    return losses, {n: p.detach().clone() for n, p in pyro.get_param_store().items()}, loss


@every
def test_weight_zero_changes_nothing(make):
    plain, penalized = steps([]), steps([make(0.0)])
    assert plain[0] == penalized[0]
    assert all(torch.equal(plain[1][n], penalized[1][n]) for n in plain[1])


@every
def test_elbo_is_that_without_penalty(make):
    args = data()
    values = []
    for penalties in ([], [make(7.0)]):
        torch.manual_seed(0)
        terms = pe.TraceBeta_ELBO(penalties=penalties).terms(model, guide, *args)
        values.append(terms.elbo.item())
    assert values[0] == values[1]
    (penalty,) = terms.penalties.values()
    assert terms.objective.item() == pytest.approx(terms.elbo.item() - 7.0 * 100 * penalty.nats.item())
    assert penalty.cost.item() == pytest.approx(700 * penalty.nats.item())


@pytest.mark.parametrize("make", every_other(PENALTIES.values()), ids=PENALTIES)
@pytest.mark.parametrize("block", [aggregate.BLOCK, thorough(700)])
def test_captured_equals_eager(make, block, interpreted, monkeypatch):
    monkeypatch.setattr(aggregate, "BLOCK", block)
    assert_compiled_equals_eager(make)


@pytest.mark.parametrize("name", every_other(["adversarial", "aggregate"]))
def test_compiled_equals_eager(name):
    assert_compiled_equals_eager(PENALTIES[name])


def assert_compiled_equals_eager(make):
    eager, compiled = steps([make(3.0)], grad_clip=5.0), steps([make(3.0)], compile=True, grad_clip=5.0)
    assert eager[0] == pytest.approx(compiled[0], rel=1e-12)
    assert all(torch.allclose(eager[1][n], compiled[1][n], rtol=1e-9, atol=1e-12) for n in eager[1])
    critics = [list(loss.critics.values()) for *_, loss in (eager, compiled)]
    for ours, theirs in zip(*critics, strict=True):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-9, atol=1e-12)


def test_too_many_blocks_for_a_graph_are_refused(interpreted, monkeypatch):
    monkeypatch.setattr(aggregate, "BLOCK", 100)
    with refuses(CompileError, "compares 40 rows by 0 million numbers"):
        steps([pe.TotalCorrelation("z", 3.0)], compile=True)
    steps([pe.TotalCorrelation("z", 3.0)])


def test_schedules_of_weights_act_alike():
    def penalties():
        return [pe.MutualInformation("z", "s", pe.LinearWarmup(0.0, 3.0, steps=4))]

    eager, compiled = steps(penalties(), 6), steps(penalties(), 6, compile=True)
    assert eager[0] == pytest.approx(compiled[0], rel=1e-12)
    assert eager[2].settled == 4
    assert eager[0] != pytest.approx(steps([pe.MutualInformation("z", "s", 3.0)], 6)[0])


def test_named_objective_is_the_penalty_and_others_take_it_too():
    named = pe.TraceMI_ELBO(latent="z", attribute="s", weight=3.0, estimator="aggregate", beta=1.0)
    assert named.penalties == (pe.MutualInformation("z", "s", 3.0),)
    first_loss = steps([pe.MutualInformation("z", "s", 3.0)], 1)[0]
    for objective in (pe.TraceTimestep_ELBO, pe.TraceIW_ELBO):
        options = {"num_particles": 1} if objective is pe.TraceIW_ELBO else {}
        assert steps([pe.MutualInformation("z", "s", 3.0)], 1, objective=objective, **options)[0] == pytest.approx(
            first_loss, rel=0.2
        )


@pytest.mark.parametrize("estimator", ["club", "adversarial"])
def test_critics_train_under_every_driver(estimator):
    """pyro.infer.SVI, a torch loop over the module, pe.SVI and pe.fit give critics the same steps."""
    args = data()

    def objective():
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        return pe.TraceMI_ELBO("z", "s", 2.0, estimator)

    def first_weights(loss):
        (critic,) = loss.critics.values()
        return next(critic.parameters()).detach().clone()

    ours = objective()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), ours)
    start = []
    for _ in range(3):
        svi.step(*args)
        start.append(first_weights(ours))
    assert not torch.equal(start[0], start[2])
    theirs = objective()
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), theirs)
    for _ in range(3):
        svi.step(*args)
    assert torch.allclose(first_weights(theirs), start[2], rtol=1e-12)
    module = (loop := objective())(model, guide)
    module(*args)
    pyro.set_rng_seed(1)
    loop.critics.clear()
    optim = torch.optim.Adam(
        [p.unconstrained() if hasattr(p, "unconstrained") else p for p in pyro.get_param_store()._params.values()],
        lr=0.01,
    )
    for _ in range(3):
        optim.zero_grad()
        module(*args).backward()
        optim.step()
    assert torch.allclose(first_weights(loop), start[2], rtol=1e-6)


@pytest.mark.parametrize("compile", [False, True])
def test_fit_records_penalties_and_resumes_critics(interpreted, tmp_path, compile):
    x, s = data(80)

    def local(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def encoder(x, s):
        a = pyro.param("a", lambda: torch.full((DIMS,), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x, 0.5).to_event(1))

    def fitted(epochs, **options):
        pyro.clear_param_store()
        loss = pe.TraceMI_ELBO("z", lambda x, s: s, 2.0, "club", max_plate_nesting=1)
        options = {"batch_size": 40, "dir": tmp_path / "run", "progress": False, "compile": compile} | options
        return pe.fit(local, encoder, (x, s), (x, s), loss=loss, max_epochs=epochs, **options)

    whole = fitted(4, dir=tmp_path / "whole")
    fitted(2)
    resumed = fitted(4, resume=True)
    assert whole.history.penalty.dims == ("epoch", "split", "penalty_name")
    assert list(whole.history.penalty_name.values) == ["I(z; s)"]
    assert bool(whole.history.penalty.notnull().all())
    assert whole.history.penalty.values == pytest.approx(resumed.history.penalty.values, rel=1e-9)
    critics = [next(iter(result.loss.critics.values())) for result in (whole, resumed)]
    for p, q in zip(critics[0].parameters(), critics[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-9)


def test_terms_show_penalties():
    loss = pe.TraceMI_ELBO("z", "s", 2.0, penalties=[pe.TotalCorrelation("z", 1.0)])
    dataset = loss.terms(model, guide, *data()).to_dataset()
    assert list(dataset.penalty_name.values) == ["I(z; s)", "TC(z)"]
    assert dataset.penalty.shape == (2,)


def test_masked_rows_do_not_count():
    x, s = data(60)
    keep = torch.arange(60) < 45

    def masked(program):
        def run(x, s):
            with pyro.poutine.mask(mask=keep):
                return program(x, s)

        return run

    def local(x, s):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def encoder(x, s):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.5).to_event(1))

    for kind in ("aggregate", "hsic"):
        loss = pe.TraceMI_ELBO("z", lambda x, s: s, 1.0, kind)
        found = []
        for other in (0.0, 5.0):
            torch.manual_seed(0)
            args = x + other * ~keep[:, None], torch.where(keep, s, int(other > 0))
            found.append(loss.terms(masked(local), masked(encoder), *args).penalties["I(z; s)"].nats.item())
        torch.manual_seed(0)
        everything = loss.terms(local, encoder, *args).penalties["I(z; s)"].nats.item()
        assert found[0] == pytest.approx(found[1], rel=1e-9)
        assert everything != pytest.approx(found[0], rel=0.01)


def refused(error, penalty, *parts, args=None, programs=(model, guide), **options):
    with refuses(error, *parts):
        pe.TraceBeta_ELBO(penalties=[penalty], **options).terms(*programs, *(args or data()))


def test_attributes_that_cannot_be_used():
    x, s = data()
    mi = pe.MutualInformation
    refused(DataError, mi("z", "s"), "'s'", "one level only", args=(x, torch.zeros(ROWS)))
    missing = torch.where(s == 0, math.nan, 1.0)
    refused(DataError, mi("z", lambda x, s: missing), "20 of 40 values are not finite")
    refused(DataError, mi("z", lambda x, s: s[:-1]), "expected 40 rows", "(39,)")
    refused(DataError, mi("z", lambda x, s: 3), "got int")
    refused(DataError, mi("z", first), "looks continuous")
    refused(SiteError, mi("z", "t"), "attribute='t'", "['s', 'x']")
    refused(SiteError, mi("z", "z"), "attribute='z'")
    loss = pe.TraceMI_ELBO("z", lambda x, s: s, 1.0, "club")

    def unobserved(x, s):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))

    loss.terms(unobserved, unobserved, x, s)
    with refuses(DataError, "has not seen", "(2,)"):
        loss.terms(unobserved, unobserved, x, 2 * s)


def test_latents_that_cannot_be_penalized():
    def shared(x, s):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def shared_guide(x, s):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def of(make):
        def latent(x, s):
            with pyro.plate("data", len(x)):
                pyro.sample("z", make(x))

        return latent

    flow = dist.transforms.planar(DIMS)
    normal = of(lambda x: dist.Normal(x, 0.1).to_event(1))
    cases = {
        "no latent": (model, guide, "y", "['z']"),
        "no plate": (shared, shared_guide, "z", "lies in no plate"),
        "point": (normal, of(lambda x: dist.Delta(x, event_dim=1)), "z", "no density"),
        "discrete": (of(lambda x: dist.Bernoulli(x * 0 + 0.5).to_event(1)),) * 2 + ("z", "no pathwise gradient"),
        "flow": (
            normal,
            of(lambda x: dist.TransformedDistribution(dist.Normal(x, 0.1).to_event(1), [flow])),
            "z",
            "whose inverse is known",
        ),
    }
    for first_program, second, latent, words in cases.values():
        refused(
            SiteError, pe.MutualInformation(latent, lambda x, s: s), words, programs=(first_program, second),
            kl="sampled",
        )  # fmt: skip


def test_latents_over_time_and_masks_inside_of_rows():
    def steps_of(x, s):
        with pyro.plate("data", len(x)):
            for t in range(2):
                pyro.sample(f"z_{t}", dist.Normal(0.0, 1.0))

    with refuses(SiteError, "joined from the steps of a loop"):
        penalty = pe.MutualInformation("z", lambda x, s: s)
        pe.TraceTimestep_ELBO(penalties=[penalty]).terms(steps_of, steps_of, *data())

    def scanned(x, s):
        with pyro.plate("data", len(x)):
            pe.scan(lambda c, x_t: (pyro.sample("z", dist.Normal(c, 1.0)), None), x[:, 0], x.T, dim=0)

    with refuses(SiteError, "drawn step by step"):
        penalty = pe.MutualInformation("z", lambda x, s: s)
        pe.TraceBeta_ELBO(penalties=[penalty]).terms(scanned, scanned, *data())

    def inner(x, s):
        rows, columns = pyro.plate("data", len(x), dim=-2), pyro.plate("columns", DIMS, dim=-1)
        with rows, columns, pyro.poutine.mask(mask=x > 0):
            pyro.sample("z", dist.Normal(x, 1.0))

    refused(SiteError, pe.MutualInformation("z", lambda x, s: s), "masked within", programs=(inner, inner))


def test_settings_out_of_range():
    mi, tc = pe.MutualInformation, pe.TotalCorrelation
    for make, words in (
        (lambda: mi("z", estimator="club"), "I(z; x)"),
        (lambda: mi("z", conditional_on="y"), "I(z; x)"),
        (lambda: mi("z", "s", estimator="variational", conditional_on="y"), "bounds I(z; s) alone"),
        (lambda: mi("z", "s", math.nan), "nan"),
        (lambda: mi("z", "s", pe.Capacity(0.0, 1.0, 10)), "Capacity"),
        (lambda: mi("z", "s", critic_lr=0.0), "critic_lr"),
        (lambda: pe.TraceBeta_ELBO(penalties=[mi("z", "s"), mi("z", "s")]), "I(z; s)"),
    ):
        with refuses(ArgumentError, words):
            make()
    refused(ArgumentError, tc("z", groups=((0, 1),)), "each of the 3 dimensions")
