"""Two processes with the parts of a batch have the gradient of one process with the whole: every objective and penalty.

All cases share one group of processes, which takes seconds to start. A row has the same noise in both computations.
"""

import contextlib
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import multivariate_normal, normal

import pyro_elbo as pe
from pyro_elbo.compile import CompiledSVI, KeptGradients, TorchUpdate
from pyro_elbo.errors import ArgumentError
from pyro_elbo.ranks import gather_rows, in_parts, weighed
from pyro_elbo.training.history import RunningMean
from tests.support.compiled import interpret
from tests.support.processes import in_processes

ROWS, DIMS, SIZE, WORLD = 11, 3, 100, 2  # six rows and five
pytestmark = pytest.mark.slow


def make_data():
    generator = torch.Generator().manual_seed(1)
    s = torch.arange(ROWS) % 2
    x = torch.randn(ROWS, DIMS, generator=generator, dtype=torch.float64) + s[:, None]
    lengths = torch.arange(ROWS) % 4 + 1
    return {"x": x, "s": s, "lengths": lengths, "noise": torch.randn(2, ROWS, DIMS, generator=generator).double()}


def rows_plate(x, lengths, declared, masked):
    plate = pyro.plate("data", SIZE if declared else len(x), subsample_size=len(x))
    return pyro.poutine.mask(mask=lengths > 1) if masked else contextlib.nullcontext(), plate


def model(x, s, lengths, declared=True, masked=False):
    w = pyro.param("w", lambda: torch.ones(DIMS))
    shared = pyro.sample("shared", dist.Normal(0.0, 1.0)) if declared else torch.zeros(())
    mask, plate = rows_plate(x, lengths, declared, masked)
    with plate, mask:
        pyro.sample("s", dist.Bernoulli(0.5), obs=s.to(x))
        z = pyro.sample("z", dist.Normal(torch.zeros(DIMS), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(w * z + shared[..., None], 1.0).to_event(1), obs=x)


def guide(x, s, lengths, declared=True, masked=False, full_rank=False):
    a = pyro.param("a", lambda: torch.full((DIMS,), 0.5))
    scale = pyro.param("scale", lambda: torch.full((DIMS,), 0.4), constraint=constraints.positive)
    if declared:
        pyro.sample("shared", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.3)), 0.2))
    q = dist.Normal(a * x, scale).to_event(1)
    if full_rank:
        q = dist.MultivariateNormal(a * x, scale_tril=torch.diag(scale) + 0.1 * torch.eye(DIMS).roll(1, 0).tril())
    mask, plate = rows_plate(x, lengths, declared, masked)
    with plate, mask:
        pyro.sample("z", q)


def walk(x, s, lengths):
    w = pyro.param("w", lambda: torch.ones(DIMS))

    def step(carry, x_t):
        pyro.sample("x", dist.Normal(w[0] * carry, 1.0), obs=x_t)
        return carry + w[1], None

    with pyro.plate("data", SIZE, subsample_size=len(x)):
        pe.scan(step, torch.zeros(len(x)), torch.cat([x, x[:, :1]], 1).T, lengths=lengths)


def nothing(x, s, lengths):
    pass


def first(x, s, lengths):
    return x[:, 0]


LOCAL = partial(model, declared=False), partial(guide, declared=False)
GLOBAL = model, guide


def penalized(kind, *args, **options):
    return lambda: pe.TraceBeta_ELBO(penalties=[kind(*args, **options)])


information = partial(pe.MutualInformation, "z", weight=7.0)
CASES = {
    "rows": (pe.TraceBeta_ELBO, LOCAL),
    "a latent of all rows": (lambda: pe.TraceBeta_ELBO(beta=3.0), GLOBAL),
    "frames": (lambda: pe.TraceTimestep_ELBO(normalize="frame"), (walk, nothing)),
    "importance weights": (lambda: pe.TraceIW_ELBO(num_particles=2), LOCAL),
    "free bits": (lambda: pe.TraceBeta_ELBO(free_bits=0.95), GLOBAL),
    "capacity": (lambda: pe.TraceBeta_ELBO(pe.Capacity(0.0, 3.0, steps=1, gamma=10.0)), LOCAL),
    "aggregate": (penalized(information, "s"), GLOBAL),
    "aggregate, undeclared": (penalized(information, "s"), LOCAL),
    "conditional": (penalized(information, "s", conditional_on=lambda x, s, lengths: lengths > 2), GLOBAL),
    "a density of no product": (penalized(information, "s"), (model, partial(guide, full_rank=True))),
    "masked rows": (penalized(information, "s"), (partial(model, masked=True), partial(guide, masked=True))),
    "data": (penalized(information), GLOBAL),
    "variational": (penalized(information, "s", estimator="variational"), GLOBAL),
    "hsic": (penalized(information, first, estimator="hsic"), GLOBAL),
    "club": (penalized(information, "s", estimator="club", levels=2), GLOBAL),
    "club of numbers": (penalized(information, first, estimator="club"), GLOBAL),
    "adversarial": (penalized(information, "s", estimator="adversarial", levels=2), GLOBAL),
    "total correlation": (penalized(pe.TotalCorrelation, "z", 7.0), GLOBAL),
    "groups": (penalized(pe.TotalCorrelation, "z", 7.0, groups=((0, 1), (2,))), LOCAL),
    "two particles": (
        lambda: pe.TraceBeta_ELBO(
            num_particles=2, vectorize_particles=True, max_plate_nesting=1, penalties=[information("s")]
        ),
        GLOBAL,
    ),
}

CAPTURED = ["frames", "club"]  # two processes capture each


def rows_of(rank, world):
    return {name: x[rank::world] for name, x in make_data().items() if name != "noise"}


def share_noise(patch, rank, world):
    """Replace torch's standard normal draws: a row gets the same numbers whichever process holds it."""
    own = make_data()["noise"][:, rank::world]

    def draw(shape, dtype, device):
        if len(shape) < 2 or shape[-1] != DIMS:
            return torch.full(shape, 0.7, dtype=dtype)
        return (own if len(shape) > 2 else own[0]).expand(shape)

    patch.setattr(normal, "_standard_normal", draw)
    patch.setattr(multivariate_normal, "_standard_normal", draw)


@contextlib.contextmanager
def prepared(case, rank, world):
    """Give the objective and the programs of a case, parameters and critics made, under the noise of a process."""
    make, programs = CASES[case]
    pyro.clear_param_store()
    loss = make()
    with pytest.MonkeyPatch.context() as patch:
        share_noise(patch, 0, 1)
        loss.terms(*programs, **rows_of(0, 1))  # makes parameters and critics
        loss.step = 1
        share_noise(patch, rank, world)
        yield loss, programs


def errors_of_mean(whole, parts):
    """Return by name how far the mean of the parts of all processes is from the whole."""
    means = {}
    for name, x in parts.items():
        torch.distributed.all_reduce(x)
        means[name] = x / WORLD
    return {name: (means[name] - x).abs().max().item() for name, x in whole.items()}


def gradients(case, rank, world):
    """Return the gradients of programs and critics for the rows of one process, and the penalty."""
    with prepared(case, rank, world) as (loss, programs):
        batch = rows_of(rank, world)
        with in_parts() if world > 1 else contextlib.nullcontext():
            terms = loss.checked_terms(*programs, (), batch)
            count = len(batch["x"]) * terms.per_datum.totals().get("divisor", 1)
            loss.count_step(weighed(-terms.per_datum.objective, count), terms).backward()
            values = {f"value {name}": weighed(p.nats.detach(), count) for name, p in terms.penalties.items()}
    found = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    for critic in loss.critics.values():
        found |= {f"critic {name}": p.grad for name, p in critic.network.named_parameters()}
    return found | values


def compare(rank):
    """Return, by case, the largest gradient of the whole batch, and how far the mean of the parts is from it."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for case in CASES:
        whole = gradients(case, 0, 1)
        parts = gradients(case, rank, WORLD)
        size = max(x.abs().max().item() for n, x in whole.items() if not n.startswith("value"))
        found[case] = size, errors_of_mean(whole, parts)
    mean = RunningMean()
    mean.add({"elbo": torch.tensor(float(rank)), "loss": torch.tensor(1.0)}, 6 - rank)
    found["mean"], found["SVI"] = mean.reduce()["elbo"], refusals()
    return found


def refusals():
    found = []
    for make in (pe.SVI, pyro.infer.SVI):
        svi = make(*LOCAL, pyro.optim.Adam({"lr": 0.1}), loss=pe.TraceBeta_ELBO())
        with pytest.raises(ArgumentError) as error:
            svi.step(**rows_of(0, 1))
        found.append(str(error.value))
    return found


def after_steps(case, rank, world):
    """Return the gradients of the third step, and the critics after it; steps in a group are captured as graphs."""
    with prepared(case, rank, world) as (loss, programs):
        kept = KeptGradients([p for _, p in pyro.get_param_store().named_parameters()])
        options = {"compile": False} if world == 1 else {"rows": lambda args, kwargs: len(kwargs["x"])}
        svi = CompiledSVI(*programs, loss, TorchUpdate(kept), per_datum=True, fallback_random=True, **options)
        for _ in range(3):
            svi.train((), rows_of(rank, world))
    held = {n: kept.state[p] for n, p in pyro.get_param_store().named_parameters()}
    found = {name: state["gradient"] for name, state in held.items() if state}
    for critic in loss.critics.values():
        found |= {f"critic {name}": p.detach().clone() for name, p in critic.network.named_parameters()}
    return found


def compare_captured(cases, rank):
    """Return, by case, the largest gradient of the whole batch, and how far the mean of the captured parts is off."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for case in cases:
        whole, parts = after_steps(case, 0, 1), after_steps(case, rank, WORLD)
        size = max(x.abs().max().item() for n, x in whole.items() if not n.startswith("critic"))
        found[case] = size, errors_of_mean(whole, parts)
    return found


@pytest.mark.parametrize(
    "cases", [CAPTURED, pytest.param([c for c in CASES if c not in CAPTURED], marks=pytest.mark.thorough)]
)
def test_captured_steps_have_the_gradient_of_the_whole(monkeypatch, cases):
    """With parts of six and of five rows: bounds, penalties, and critics that take steps of their own."""
    interpret(monkeypatch)
    for of_rank in in_processes(partial(compare_captured, cases), WORLD):
        for case, (size, errors) in of_rank.items():
            assert size > 0.1, case
            assert max(errors.values()) < 1e-9 * size, (case, errors)


@pytest.fixture(scope="module")
def compared():
    return in_processes(compare, WORLD)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_batch_have_the_gradient_of_the_whole(compared, case):
    """Parts of six and of five rows; the penalties' values and the critics' gradients agree as well."""
    for rank in range(WORLD):
        size, errors = compared[rank][case]
        assert size > 0.1
        assert max(errors.values()) < 1e-9 * size, errors


def test_steps_of_svi_in_a_group_are_refused(compared):
    for message in compared[0]["SVI"]:
        assert "one of 2" in message
        assert "pe.fit(..., devices=n)" in message


def test_means_of_an_epoch_weigh_the_rows_of_all_processes(compared):
    assert [of_rank["mean"] for of_rank in compared] == pytest.approx([5 / 11, 5 / 11])


def test_without_a_group_a_batch_has_one_part():
    x = torch.arange(3.0)
    with in_parts():
        assert gather_rows(x, 0) is x
        assert weighed(x, 3) is x
