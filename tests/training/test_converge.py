"""Training to a stated distance from the optimum: the decisions on exact processes, then real programs."""

import math
from unittest.mock import MagicMock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal

import pyro_elbo as pe
from pyro_elbo.compile import Course, Snapshots
from pyro_elbo.errors import ArgumentError, DataError, GuideError, NonFiniteError, ProgramError
from pyro_elbo.posterior import SymmetrizedKL
from pyro_elbo.training import comparable, converge
from pyro_elbo.training.comparable import first_runs
from pyro_elbo.training.converge import Convergence, Goal, Plan
from pyro_elbo.training.convergence import ConvergenceReport, Window
from pyro_elbo.training.iterates import Iterates
from pyro_elbo.training.stationarity import is_level, is_worse, predict_distance, split_r_hat
from tests.support.compiled import X, _as_captured, _graphs, adam, guide, model  # noqa: F401

MEAN, SPREAD = X.sum().item() / 5, 5**-0.5  # the posterior of the model of tests.support.compiled


# --- decisions on arrays ----------------------------------------------------------------------------------------


def ar1(rho, n, columns, rng):
    """A stationary process of variance 1 with autocorrelation rho."""
    noise, x = rng.normal(size=(n, columns)), rng.normal(size=columns)
    return np.stack([x := rho * x + (1 - rho**2) ** 0.5 * e for e in noise])


def test_r_hat_is_the_formula_of_two_halves():
    window = np.array([[0.0], [2.0], [5.0], [9.0]])  # means 1 and 7, variances 2 and 8
    assert split_r_hat(window) == pytest.approx(math.sqrt(1 / 2 + 18 / 5))
    constant = np.full((4, 1), 0.1)
    assert split_r_hat(constant) == 1.0
    assert split_r_hat(np.hstack([window, constant])) == split_r_hat(window)
    assert split_r_hat(np.array([[0.0], [0.0], [1.0], [1.0]])) == math.inf


def test_r_hat_tells_stationary_from_drifting_iterates():
    """Fifty parameters; of a hundred windows each, none is taken for the other kind."""
    rng = np.random.default_rng(0)
    noise = [ar1(0.2, 256, 50, rng) for _ in range(100)]
    assert max(map(split_r_hat, noise)) < 1.1
    trend = np.linspace(0, 3, 256)[:, None] * (np.arange(50) == 7)  # one parameter drifts by three standard deviations
    assert min(split_r_hat(x + trend) for x in noise) > 1.1
    assert min(split_r_hat(ar1(0.99, 128, 50, rng)) for _ in range(100)) > 1.1  # a hundred steps to forget the start


@pytest.mark.parametrize("kappa", [0.5, 1.0])
def test_distance_follows_the_power_law(kappa):
    sizes = [0.1 * 0.5**i for i in range(1, 7)]
    distances = [3 * size**kappa for size in sizes]
    moves, exact = [d * (2**kappa - 1) for d in distances], [1e-6] * 6
    found = predict_distance(sizes, moves, exact)
    assert 0.95 * distances[-1] < found < 1.4 * distances[-1]
    assert predict_distance(sizes[:1], moves[:1], exact[:1]) > 1.5 * moves[0]  # the order may still be low
    assert predict_distance(sizes, [10 * m for m in moves], [1e-5] * 6) == pytest.approx(10 * found)


def test_moves_by_noise_alone_predict_a_distance_below_the_noise():
    sizes = [0.1 * 0.5**i for i in range(1, 7)]
    assert predict_distance(sizes, [0.05] * 6, [0.05] * 6) < 0.05
    assert predict_distance(sizes, [0.05] * 6, [1e-6] * 6) > 0.1  # moves that do not shrink have far to go


def test_a_step_size_that_ends_below_its_start_is_too_large():
    rng = np.random.default_rng(0)
    assert not is_worse(rng.normal(size=1000), -1.0)
    assert is_worse(rng.normal(size=1000) - 1e4, -1.0)
    assert not is_worse(np.concatenate([np.full(500, -1e4), rng.normal(size=500)]), -1.0)  # it has recovered


def test_a_bound_is_level_unless_it_rises_by_more_than_its_errors():
    rng = np.random.default_rng(0)
    noise = [ar1(0.9, 2048, 1, rng)[:, 0] for _ in range(100)]
    assert np.mean([is_level(x) for x in noise]) > 0.9  # 2.5 % of the windows rise by two standard errors
    assert not any(is_level(x + np.linspace(0, 4, 2048)) for x in noise)
    assert is_level(noise[0] - np.linspace(0, 4, 2048))


def test_plans():
    plan = Plan(1.0, 8)
    assert plan.after("drifts") == plan.after("weights move") == Plan(1.0, 16)
    assert plan.after("stationary") == plan.after("level") == Plan(0.5, 16)
    assert plan.after("too large") == Plan(0.25, 8)


# --- the whole run on an exact process --------------------------------------------------------------------------


class Process:
    """Steps whose iterates are an Ornstein-Uhlenbeck process: of a gradient with noise, on a quadratic objective.

    The location relaxes to ``optimum + bias * step size`` at the rate ``speed * step size``; its stationary variance is
    proportional to the step size.
    """

    def __init__(self, optimum=1.0, bias=0.0, speed=1.0, lr=0.1, start=0.0, noise=0.1):
        self.loc = pyro.param("loc", torch.tensor(start, dtype=torch.float64)).unconstrained()
        self.optimizer = torch.optim.SGD([self.loc], lr=lr)
        self.optimum, self.bias, self.speed, self.noise = optimum, bias, speed, noise

    def optimizers(self, parameters):
        return [self.optimizer]

    def take(self, steps):
        lr = self.optimizer.param_groups[0]["lr"]
        target, kept = self.optimum + self.bias * lr, math.exp(-steps * self.speed * lr)
        spread = self.noise * (lr * (1 - kept**2)) ** 0.5
        with torch.no_grad():
            self.loc.copy_(target + kept * (self.loc - target) + spread * torch.randn((), dtype=torch.float64))
        return np.zeros(steps)

    def run(self, accuracy=0.1, max_steps=100_000):
        def unit_guide(x):
            pyro.sample("z", dist.Normal(pyro.param("loc"), 1.0))

        goal = Goal(accuracy, max_steps)
        run = Convergence(model, unit_guide, pe.TraceBeta_ELBO(), ((X,), {}), self.optimizers, goal)
        while run.due:
            run.observe(self.take(run.due))
        return run.report()


class Shift:
    """The exact distance between normal guides of unit variance."""

    def __init__(self, *args):
        pass

    def __call__(self, first, second):
        return (first - second).abs().item()


@pytest.fixture
def exact_distance(monkeypatch):
    monkeypatch.setattr(converge, "SymmetrizedKL", Shift)


def test_an_unbiased_process_converges_to_its_optimum():
    process = Process()
    report = process.run()
    assert report.converged
    assert abs(process.loc.item() - 1.0) < 0.1
    assert process.optimizer.param_groups[0]["lr"] == 0.1
    assert report.steps == 1 + sum(w.steps for w in report.windows) <= 100_000


def test_a_biased_process_goes_on_until_the_predicted_bias_is_small(exact_distance):
    """The distance is 20 γ: 2 at the first step size, and below 0.1 from γ = 0.1 / 32 on."""
    process = Process(bias=20.0, noise=0.2)
    report = process.run(max_steps=10**7)
    assert report.converged
    assert abs(process.loc.item() - 1.0) < 0.1
    by_size = {w.step_size: w for w in report.windows if w.verdict == "stationary"}
    assert min(by_size) <= 0.1 / 16
    for size, window in list(by_size.items())[3:]:
        assert 20 * size < window.distance < 2 * 20 * size


def test_a_slow_process_is_called_unconverged():
    """After 20 000 steps it has come a tenth of the way."""
    report = Process(speed=5e-5, noise=0.01).run(max_steps=20_000)
    assert not report.converged
    assert math.isnan(report.distance)
    assert "still drift" in report.reason


def test_a_distance_that_is_not_known_is_not_shown_as_a_number(monkeypatch):
    """A single window is stationary, from which no distance can be predicted."""
    report = ConvergenceReport(0.1, 4000, (Window(0.1, 1024, "stationary", 1.01, -3.25, 0.05),))
    assert "how far their average is from the optimum cannot be said" in report.reason
    assert "nan" not in str(report)
    bar = MagicMock()
    bar.__enter__.return_value = bar
    monkeypatch.setattr("pyro_elbo.training.svi.progress_bar", lambda *args, **options: bar)
    pyro.clear_param_store()
    svi = pe.SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    assert svi.converge(X, max_steps=3073).windows
    shown = [call.args[0] for call in bar.set_postfix.call_args_list]
    assert "distance" not in shown[0]
    assert not any(math.isnan(x) for figures in shown for x in figures.values())


def test_data_that_run_out_inside_a_program_are_an_error_of_the_program():
    rows = iter([X] * 3)

    def exhausted():
        model(next(rows))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    svi = pe.SVI(exhausted, guide, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    with pytest.raises(ProgramError, match="StopIteration"):
        svi.converge(progress=False)


@pytest.mark.thorough
def test_false_claims_of_runs_that_are_stopped_early_are_rare(exact_distance):
    """Of 100 processes with random speeds, biases and budgets, fewer than 5 claim an accuracy that they miss."""
    rng, claims, false = np.random.default_rng(0), 0, 0
    for seed in range(100):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        process = Process(bias=rng.uniform(0, 5), speed=10 ** rng.uniform(-2, 0), noise=rng.uniform(0.1, 1))
        report = process.run(max_steps=int(10 ** rng.uniform(3.5, 5.5)))
        claims += report.converged
        false += report.converged and abs(process.loc.item() - 1.0) > 0.1
    assert claims > 30
    assert false < 5


# --- distances between guides -------------------------------------------------------------------------------------


def symmetrized_kl(model, guide, iterates):
    return SymmetrizedKL(guide, (X,), {}, first_runs(model, guide, ((X,), {}))[1], iterates.write)


def test_symmetrized_kl_of_a_shift_is_exact_and_of_a_scale_close():
    def wide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1), obs=x)

    auto = AutoNormal(wide, init_scale=0.5)
    auto(X)
    iterates = Iterates(auto.parameters())
    distance = symmetrized_kl(wide, auto, iterates)
    state = torch.get_rng_state()
    start = iterates.read()
    shift = start + torch.tensor([0.3, 0.4, 0.0, 0.0])
    assert distance(start, shift) == pytest.approx(0.5 / 0.5, rel=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    wider = start.clone()
    wider[2:] = 0.9
    iterates.write(wider)
    ratio = (auto.scales.z[0].item() / 0.5) ** 2
    exact = math.sqrt(ratio + 1 / ratio - 2)  # of two latents, each half of it
    assert exact * 0.95 < distance(start, wider) < exact * 1.2  # two standard errors on top
    assert distance(start, start) == 0.0


def test_symmetrized_kl_takes_the_row_that_moved_most():
    def rows(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    auto = AutoNormal(rows, init_scale=0.5)
    auto(X)
    iterates = Iterates(auto.parameters())
    start = iterates.read()
    moved = start + torch.tensor([0.1, 0.2, 0.3, -0.1] + [0.0] * 4)
    for _ in range(2):
        distance = symmetrized_kl(rows, auto, iterates)
        assert distance(start, moved) == pytest.approx(0.3 / 0.5, rel=1e-6)


def test_symmetrized_kl_of_a_guide_that_does_not_vectorize():
    def stubborn(x):
        loc = pyro.param("loc", torch.zeros(()))
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        float(z.detach())  # one draw at a time

    stubborn(X)
    iterates = Iterates([pyro.param("loc").unconstrained()])
    distance = symmetrized_kl(model, stubborn, iterates)
    assert distance(torch.zeros(1), torch.full((1,), 0.3)) == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize(("chained", "runs"), [(False, [2, 1]), (True, [4, 4])])
def test_a_guide_runs_again_only_where_its_distributions_depend_on_its_draws(chained, runs):
    """The second latent has the first, or nothing of it, as its mean: a shift of the first moves it by as much."""
    calls = []

    def pair(x):
        calls.append(None)
        first = pyro.sample("first", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
        pyro.sample("second", dist.Normal(first if chained else 0.0 * pyro.param("loc"), 1.0))

    def latents(x):
        first = pyro.sample("first", dist.Normal(0.0, 1.0))
        pyro.sample(
            "x", dist.Normal(pyro.sample("second", dist.Normal(first, 1.0)), 1.0).expand([4]).to_event(1), obs=x
        )

    pair(X)
    iterates = Iterates([pyro.param("loc").unconstrained()])
    distance = symmetrized_kl(latents, pair, iterates)
    points = [torch.full((1,), x) for x in (0.0, 0.3, 0.7)]
    for one, two, expected, count in zip(points, points[1:], (0.3, 0.4), runs, strict=False):
        calls.clear()
        assert distance(one, two) == pytest.approx(expected, rel=1e-5)
        assert len(calls) == count


# --- parameters -------------------------------------------------------------------------------------------------


def test_constrained_parameters_are_averaged_unconstrained():
    """Of a positive parameter this is the geometric mean."""
    pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    iterates = Iterates([pyro.param("scale").unconstrained()])
    low = iterates.read()
    iterates.write(low + math.log(4))
    assert pyro.param("scale").item() == pytest.approx(8.0)
    iterates.write((low + iterates.read()) / 2)
    assert pyro.param("scale").item() == pytest.approx(4.0)


def test_many_parameters_are_watched_in_part_and_averaged_in_full():
    iterates = Iterates([torch.zeros(100), torch.zeros(30, 40)])
    assert iterates.watched(iterates.read()[None]).shape == (1, 256)
    x = torch.arange(1300.0)
    iterates.write(x)
    assert torch.equal(iterates.read(), x)


# --- programs ---------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch):
    """Shorter windows: an uncompiled step takes most of a millisecond."""
    for room, name, value in ((converge, "RECORDS", 32), (converge, "THIN", 1), (comparable, "LEAST_STEPS", 60)):
        monkeypatch.setattr(room, name, value)


def run(lr=0.1, seed=1, max_steps=3000, **options):
    """Converge from an empty store; return the report and the guide's location and scale."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": lr}), pe.TraceBeta_ELBO(), **options)
    report = svi.converge(X, accuracy=0.4, max_steps=max_steps, progress=False)
    return report, pyro.param("loc").item(), pyro.param("scale").item()


@pytest.mark.thorough
def test_a_conjugate_model_converges_to_its_exact_posterior(brief):
    report, loc, scale = run()
    assert report.converged
    assert report.distance <= 0.4
    assert abs(loc - MEAN) < 0.4 * SPREAD
    assert abs(math.log(scale / SPREAD)) < 0.4


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(5))
def test_the_conjugate_model_to_a_tenth_in_machine_code(seed):
    pyro.set_rng_seed(seed)
    svi = pe.SVI(model, guide, adam(), pe.TraceBeta_ELBO(), compile=True)
    report = svi.converge(X, progress=False)
    assert report.converged
    assert abs(pyro.param("loc").item() - MEAN) < 0.1 * SPREAD
    assert abs(math.log(pyro.param("scale").item() / SPREAD)) < 0.1


def test_seeds_repeat_a_run(brief):
    first = run(max_steps=60)
    assert run(max_steps=60) == first
    assert run(max_steps=60, seed=2)[1:] != first[1:]


@pytest.mark.parametrize("options", [{}, {"compile": True, "fallback_random": True}], ids=["python", "graph"])
def test_iterates_of_blocks_are_those_of_single_looks(options, brief, interpreted, monkeypatch):
    blocks = run(max_steps=160, **options)
    monkeypatch.setattr(converge, "BLOCK", 1)
    assert run(max_steps=160, **options) == blocks


def test_machine_code_keeps_the_iterates_on_its_way():
    """Three copies among twelve steps, the first of them in Python, are those of three runs of four."""

    def train(*parts):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(model, guide, adam(), pe.TraceBeta_ELBO(), compile=True, fallback_random=True)
        guide(X)
        tensors = [pyro.param(name).unconstrained() for name in ("loc", "scale")]
        found = []
        for steps in parts:
            snapshots = Snapshots(tensors, 4, steps // 4)
            svi._steps.train((X,), {}, Course(steps, snapshots))
            assert torch.equal(snapshots.rows[-1], torch.stack(tensors).detach())
            found.append(snapshots.rows)
        return torch.cat(found)

    assert torch.equal(train(12), train(4, 4, 4))


def test_a_step_size_that_is_far_too_large_is_lowered(brief):
    """The scale leaves the floating-point numbers, or the bound gets worse than at the start."""
    report, loc, _ = run(lr=1e3, max_steps=400)
    verdicts = [w.verdict for w in report.windows]
    assert verdicts[:3] == ["too large"] * 3
    assert verdicts[-1] != "too large"
    assert abs(loc - MEAN) < SPREAD


def test_a_program_without_finite_gradients_is_an_error(brief):
    def broken(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("root", (z - z).sqrt() if torch.is_grad_enabled() else z * 0)

    svi = pe.SVI(broken, guide, adam(), pe.TraceBeta_ELBO())
    with pytest.raises(NonFiniteError, match="gradient"):
        svi.converge(X, progress=False)
    assert (pyro.param("loc").item(), pyro.param("scale").item()) == pytest.approx((0.1, 0.5))


def test_a_gradient_that_was_not_finite_is_forgotten(brief):
    """The first step of this rate leaves the region where the gradient is finite; a smaller one does not."""

    def bounded(x):
        root = (3.0 - pyro.param("loc", lambda: torch.tensor(0.1))).clamp(min=0.0).sqrt()
        pyro.factor("root", 0.0 * root)
        model(x)

    svi = pe.SVI(bounded, guide, adam(lr=10.0), pe.TraceBeta_ELBO())
    report = svi.converge(X, accuracy=0.4, max_steps=400, progress=False)
    verdicts = [w.verdict for w in report.windows]
    assert verdicts[0] == "too large"
    assert verdicts[-1] != "too large"
    assert math.isfinite(pyro.param("loc").item())


def test_parameters_that_leave_their_domain_lower_the_step_size(brief):
    """A negative scale is a ValueError of Pyro, and one of the data stays an error."""

    def loose(x):
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.1)), pyro.param("raw", torch.tensor(0.5))))

    report = pe.SVI(model, loose, adam(lr=10.0), pe.TraceBeta_ELBO()).converge(X, max_steps=400, progress=False)
    assert report.windows[0].verdict == "too large"
    assert pyro.param("raw").item() > 0


def test_compiled_steps_follow_the_step_size_without_a_new_graph(brief, interpreted, graphs):
    report, _, _ = run(max_steps=160, compile=True)
    assert len(graphs) == 1
    assert len({w.step_size for w in report.windows}) > 1


def test_averages_are_left_and_the_learning_rate_returns(brief):
    optim = adam(lr=0.1)
    svi = pe.SVI(model, guide, optim, pe.TraceBeta_ELBO())
    report = svi.converge(X, accuracy=1e-6, max_steps=200, progress=False)
    assert not report.converged
    assert "Ended by max_steps, which the next window would pass: " in str(report)
    assert [o.param_groups[0]["lr"] for o in optim.optim_objs.values()] == [0.1, 0.1]
    sizes = [w.step_size for w in report.windows]
    assert sizes == sorted(sizes, reverse=True)
    html = report._repr_html_()
    assert "Not converged" in html
    assert f"{report.windows[0].steps}" in str(report)


def test_weights_that_move_are_waited_for(brief):
    pyro.set_rng_seed(0)
    loss = pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=50))
    svi = pe.SVI(model, guide, adam(), loss)
    with pytest.raises(ArgumentError, match="max_steps must be at least 160"):
        svi.converge(X, max_steps=159, progress=False)
    report = svi.converge(X, max_steps=200, progress=False)
    assert [w.verdict for w in report.windows][:2] == ["weights move"] * 2
    assert "weights move" not in [w.verdict for w in report.windows[2:]]


def test_minibatches_are_taken_one_after_the_other(brief):
    """Both halves of the data, scaled to all of them, have the posterior of all."""

    def half(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample=x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    seen = []

    def watching(x):
        seen.append(tuple(x.tolist()))
        guide(x)

    svi = pe.SVI(half, watching, adam(), pe.TraceBeta_ELBO())
    report = svi.converge(batches=[X[:2], (X[2:],)], accuracy=1e-6, max_steps=200, progress=False)
    first, second = tuple(X[:2].tolist()), tuple(X[2:].tolist())
    assert seen.count(second) == (report.steps + 1) // 2  # checks and distances are on the first batch
    assert seen.count(first) > report.steps // 2
    assert abs(pyro.param("loc").item() - MEAN) < SPREAD


# --- bad input --------------------------------------------------------------------------------------------------


def forgetful(values):
    """A model that takes its data from a list, once."""

    def program(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=values.pop())

    return program


def point_guide(x):
    pyro.sample("z", dist.Delta(pyro.param("loc", lambda: torch.tensor(0.1))))


BAD = {
    "accuracy 0": (
        {},
        {"accuracy": 0},
        ArgumentError,
        "accuracy must be a finite number > 0, got 0. It is the distance",
    ),
    "accuracy negative": ({}, {"accuracy": -0.1}, ArgumentError, "accuracy must be a finite number"),
    "max_steps": ({}, {"max_steps": 3000}, ArgumentError, "max_steps must be at least 3073, got 3000"),
    "data used up": ({"model": forgetful([*X[:2]])}, {}, ArgumentError, "once on the same data, and then no more"),
    "data change": ({"model": forgetful([*X] * 9)}, {}, ArgumentError, "Two runs of the programs on the same data"),
    "point": ({"guide": point_guide}, {}, GuideError, "KL between guides.*point estimate in 'z'"),
    "decay": ({"optim": pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.9})}, {}, ArgumentError, "without decay"),
    "generator": ({}, {"batches": (x for x in [X])}, ArgumentError, "batches must be an iterable that starts again"),
    "no batch": ({}, {"batches": []}, DataError, "the loader yields nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_changes(case):
    parts, options, error, match = BAD[case]
    parts = {"model": model, "guide": guide, "optim": adam()} | parts
    svi = pe.SVI(**parts, loss=pe.TraceBeta_ELBO())
    args = () if "batches" in options else (X,)
    with pytest.raises(error, match=match):
        svi.converge(*args, progress=False, **options)
    for name, p in pyro.get_param_store().items():
        assert p.item() == pytest.approx({"loc": 0.1, "scale": 0.5}[name])


def test_data_are_arguments_or_batches():
    svi = pe.SVI(model, guide, adam(), pe.TraceBeta_ELBO())
    with pytest.raises(ArgumentError, match="not both"):
        svi.converge(X, batches=[X])


def test_a_guide_without_latents_or_parameters_has_nothing_to_converge():
    def fixed(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ArgumentError, match="nothing to train"):
        pe.SVI(model, fixed, adam(), pe.TraceBeta_ELBO()).converge(X)

    def likelihood(x):
        pyro.sample("x", dist.Normal(pyro.param("mean", torch.zeros(())), 1.0).expand([len(x)]).to_event(1), obs=x)

    def empty(x):
        pass

    with pytest.raises(GuideError, match="draws no latent"):
        pe.SVI(likelihood, empty, adam(), pe.TraceBeta_ELBO()).converge(X)


def test_the_distance_is_measured_where_the_model_sums_sites_out():
    def mixture(x):
        mu = pyro.sample("mu", dist.Normal(torch.tensor([-2.0, 2.0]), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(mu[k], 1.0), obs=x)

    auto = AutoNormal(pyro.poutine.block(mixture, hide=["k"]), init_scale=0.5)
    auto(X)
    iterates = Iterates(auto.parameters())
    distance = symmetrized_kl(mixture, auto, iterates)
    start = iterates.read()
    shift = start + torch.tensor([0.3, 0.4, 0.0, 0.0])
    assert distance(start, shift) == pytest.approx(0.5 / 0.5, rel=1e-6)
