"""Programs that need care to become one graph: lazy bits, masks, validation, tied weights, NaN gradients."""

import functools

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoIAFNormal, AutoNormal, AutoNormalizingFlow
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.distributions import constraints

import pyro_elbo as pe
from pyro_elbo.errors import CompileError, NonFiniteError
from tests.support.compiled import X, _double, _interpreted, adam, guide, model, sampled  # noqa: F401
from tests.support.rows import every_other

Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def losses(program, variational, *args, compile, steps=4, loss=None, optimizer=None):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    p = program() if isinstance(program, type) else program
    q = variational(p)
    q(*args)
    pyro.set_rng_seed(1)
    svi = pe.SVI(p, q, optimizer or adam(0.01), loss or sampled(), compile=compile, fallback_random=True)
    return torch.tensor([svi.step(*args) for _ in range(steps)])


def assert_equal(program, variational, *args, **options):
    eager = losses(program, variational, *args, compile=False, **options)
    torch.testing.assert_close(losses(program, variational, *args, compile=True, **options), eager)


# --- lazy bits
def negative(x):
    return torch.complex(torch.zeros_like(x), -x).conj().imag


def test_data_with_the_lazy_negative_bit():
    """-log N(x; 1, 1) at x = (1, -2, 3, 0.5), summed: 4 log sqrt(2 pi) + (0 + 9 + 4 + 0.25) / 2."""
    x = torch.tensor([1.0, -2.0, 3.0, 0.5])
    assert negative(x).is_neg()

    def fixed(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            pyro.sample("x", dist.Normal(1.0, 1.0), obs=x)

    def exact(x):
        pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))

    svi = pe.SVI(fixed, exact, pyro.optim.SGD({"lr": 0.0}), pe.TraceBeta_ELBO(), compile=True)
    found = [svi.step(negative(x)) for _ in range(3)]
    assert found == pytest.approx([2 * torch.log(torch.tensor(2 * torch.pi)).item() + 6.625] * 3)


@pytest.mark.parametrize("kind", ["closure", "buffer", "parameter"])
def test_memory_with_a_lazy_bit_is_refused(interpreted, kind):
    module = nn.Module()
    held = negative(X)
    if kind == "buffer":
        module.register_buffer("held", held)
    elif kind == "parameter":
        module.held = nn.Parameter(held)
    else:
        module.held = held

    def shifted(x):
        pyro.sample("y", dist.Normal(module.held, 1.0).to_event(1), obs=x)
        model(x)

    svi = pe.SVI(shifted, guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(CompileError, match=r"shape \(4,\).*lazy negative.*resolve_neg"):
        svi.step(X)


# --- validation
class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](3, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, y):
        mean = self.linear(y).squeeze(-1)
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y.sum(-1))


class Prebuilt:
    def __init__(self):
        self.prior = dist.Normal(0.0, 1.0).expand([3]).to_event(1)

    def __call__(self, y):
        w = pyro.sample("w", self.prior)
        pyro.factor("direct", self.prior.log_prob(w))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(y @ w, 1.0), obs=y.sum(-1))


@pytest.mark.parametrize("program", [Regression, Prebuilt])
def test_priors_made_outside_the_program(interpreted, program):
    assert_equal(program, AutoNormal, Y)


def pixels(x, **options):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Bernoulli(logits=z, **options), obs=x)


def pixels_guide(x, **options):
    a = pyro.param("a", torch.tensor(0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(a * x, 1.0))


@pytest.mark.parametrize("event", [False, True])
def test_unvalidated_observations_are_taken(interpreted, event):
    x = torch.tensor([0.2, 0.7, 1.0, 0.0])

    def images(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pixel = dist.Bernoulli(logits=z.unsqueeze(-1).expand(-1, 2), validate_args=False)
            pyro.sample("x", pixel.to_event(1), obs=x.unsqueeze(-1).expand(-1, 2))

    program = images if event else functools.partial(pixels, validate_args=False)
    assert_equal(program, lambda _: pixels_guide, x)


def test_validated_observations_are_checked_at_every_step(interpreted):
    svi = pe.SVI(pixels, pixels_guide, adam(), sampled(), compile=True)
    x = torch.tensor([1.0, 0.0])
    for _ in range(3):
        svi.step(x)
    with pytest.raises(ValueError, match="support"):
        svi.step(torch.tensor([0.5, 0.0]))


# --- masks
def correlated(y):
    scale = pyro.sample("L", dist.LKJCholesky(3, 2.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale), obs=y)


def located(y):
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0).to_event(1), obs=y)


def correlated_guide(program):
    def guide(y):
        scale = pyro.param("L", torch.eye(3), constraint=constraints.corr_cholesky)
        pyro.sample("m", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale))

    return guide


def batch_norm(dim):
    return T.ComposeTransformModule([T.affine_autoregressive(dim, hidden_dims=[8]), T.batchnorm(dim)])


FLOWS = {
    "spline": functools.partial(T.iterated, 1, T.spline),
    "block autoregressive": functools.partial(T.iterated, 1, T.block_autoregressive),
    "batch norm": batch_norm,
}


@pytest.mark.parametrize("name", every_other(FLOWS))
def test_flows(interpreted, name):
    assert_equal(located, lambda p: AutoNormalizingFlow(p, FLOWS[name]), Y)


def test_cholesky_factors_of_correlations(interpreted):
    assert_equal(correlated, AutoNormal, Y)
    assert_equal(located, correlated_guide, Y)


def test_masks_in_buffers_follow_their_values(interpreted):
    """A graph holds which elements a mask selects; another mask gets another graph."""
    mask = torch.tensor([True, False, True, True])

    def some(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[mask].mean())

    def run(compile):
        mask.copy_(torch.tensor([True, False, True, True]))
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(some, guide, adam(), sampled(), compile=compile, fallback_random=True)
        first = [svi.step(X) for _ in range(3)]
        mask[0] = False
        return first + [svi.step(X) for _ in range(3)]

    assert run(True) == pytest.approx(run(False))


BUFFER_READS = {
    "a branch": lambda b: 1.0 if b + 0 > 1 else 2.0,
    "a number": lambda b: (b * 1).item(),
    "membership": lambda b: 1.0 if b in (torch.tensor(2.0),) else 2.0,
}


@pytest.mark.parametrize("read", BUFFER_READS.values(), ids=BUFFER_READS)
def test_numbers_read_from_buffers_follow_their_values(interpreted, read):
    """A graph holds the value that Python read; another value gets another graph."""
    buffer = torch.tensor(2.0)

    def shifted(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z + read(buffer), 1.0), obs=x)

    def run(compile):
        buffer.fill_(2.0)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pe.SVI(shifted, guide, adam(), sampled(), compile=compile, fallback_random=True)
        first = [svi.step(X) for _ in range(3)]
        buffer.fill_(0.5)
        return first + [svi.step(X) for _ in range(3)]

    assert run(True) == pytest.approx(run(False))


def test_elements_selected_by_data_are_refused_with_their_line(interpreted):
    def positive(x):
        model(x[x > 0])

    svi = pe.SVI(positive, guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(CompileError, match="value that only a run knows"):
        svi.step(X)


# --- formulas that read values
@pytest.mark.parametrize("family", ["Weibull", "Kumaraswamy"])
def test_divergences_that_compare_parameters(interpreted, family):
    def prior():
        pyro.sample("w", getattr(dist, family)(torch.tensor(1.0), torch.tensor(1.0)))

    def posterior():
        a = pyro.param("a", torch.tensor(1.3), constraint=constraints.positive)
        pyro.sample("w", getattr(dist, family)(a, torch.tensor(1.0)))

    assert_equal(prior, lambda _: posterior, loss=pe.TraceBeta_ELBO())


# --- tied weights
def tied():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    nn.init.constant_(a.weight, 0.5)
    b.weight = a.weight

    def program(x):
        pyro.module("a", a)
        pyro.module("b", b)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Normal(b(a(x[:, None]))[:, 0], 0.5))

    def target(x):
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    return target, program, a.weight


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("clip", [None, 0.01])  # far below the norm of every gradient
def test_tied_weights_are_stepped_and_clipped_once(interpreted, compile, clip):
    """Pyro steps a parameter of two names once, and clips its gradient alone."""

    def moved(svi_of, optimizer):
        pyro.clear_param_store()
        target, program, weight = tied()
        before = weight.item()
        pyro.set_rng_seed(0)
        svi = svi_of(target, program, optimizer(weight))
        for _ in range(3):
            svi.step(X)
        return weight.item() - before

    def ours(target, program, optimizer):
        return pe.SVI(
            target,
            program,
            optimizer,
            sampled(),
            compile=compile,
            fallback_random=True,
            **({"grad_clip": clip} if clip else {}),
        )

    found = moved(ours, lambda _: pyro.optim.SGD({"lr": 1e-3}))
    clipped = {"clip_norm": clip} if clip else None  # each parameter alone, and there is one
    expected = moved(lambda *a: SVI(*a, Trace_ELBO()), lambda _: pyro.optim.SGD({"lr": 1e-3}, clipped))
    assert found == pytest.approx(expected, abs=1e-9)
    assert moved(ours, lambda w: torch.optim.SGD([w], 1e-3)) == pytest.approx(expected, abs=1e-9)


# --- gradients
def test_a_gradient_that_is_not_finite_changes_nothing(interpreted):
    """sqrt(0) behind torch.where: the objective is finite, its gradient is NaN."""

    def rooted(x):
        b = pyro.param("b", torch.tensor(1.0))
        root = torch.where(x > 0, (x * b).sqrt(), 0.0)
        pyro.sample("z", dist.Normal(root.sum(), 1.0))

    target = lambda x: pyro.sample("z", dist.Normal(0.0, 1.0))  # noqa: E731
    svi = pe.SVI(target, rooted, adam(), sampled(), compile=True)
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
    for _ in range(3):
        svi.step(good)
    before = pyro.param("b").item()
    with pytest.raises(NonFiniteError, match="gradient is not finite for 'b'"):
        svi.step(bad)
    assert pyro.param("b").item() == before
    svi.step(good)
    assert pyro.param("b").item() != before


# --- random streams
def unused(x):
    z = pyro.sample("z", dist.Normal(pyro.param("a", torch.tensor(0.1)), 1.0))
    torch.randn(3)
    torch.rand(20)
    return z


def assorted(x):
    """Normal, uniform, exponential, Bernoulli and Categorical draws in turn, some of them unused."""
    k = dist.Categorical(torch.tensor([0.2, 0.3, 0.5])).sample()
    torch.rand(7)
    loc = pyro.param("a", torch.tensor(0.1))
    b = dist.Bernoulli(torch.tensor([0.3, 0.6])).sample()
    e = dist.Exponential(torch.tensor(2.0)).rsample((2,))
    torch.empty(3).exponential_(0.5)
    return pyro.sample("z", dist.Laplace(loc + 0.1 * k + b.sum() + e.sum(), 1.0))


TURNED = torch.linspace(0.1, 0.9, 24).reshape(2, 4, 3).transpose(1, 2)  # dense memory in another order of dimensions


def permuted(x):
    """Elements are drawn in the order of the memory."""
    drawn = [torch.rand_like(TURNED), torch.empty_like(TURNED).exponential_(0.5)]
    drawn += [
        torch.bernoulli(TURNED),
        dist.Categorical(TURNED).sample()[..., None],
        torch.empty_like(TURNED).uniform_(),
    ]
    loc = pyro.param("a", torch.tensor(0.1)) + (torch.cat(drawn, -1).cumsum(1).cumsum(0) ** 2).sum(0).mean()
    return pyro.sample("z", dist.Normal(0.001 * loc, 1.0))


def permuted_normal(x):
    """Torch draws normals of such memory by another method, so that no row of noise has them."""
    loc = pyro.param("a", torch.tensor(0.1)) + 0.01 * (torch.randn_like(TURNED).cumsum(1) ** 2).sum()
    return pyro.sample("z", dist.Normal(loc, 1.0))


def dropped(x):
    """Dropout, which draws within the graph."""
    loc = pyro.param("a", torch.tensor(0.1)) + torch.dropout(TURNED.contiguous(), 0.3, True).sum()
    return pyro.sample("z", dist.Normal(0.1 * loc, 1.0))


def scanned(x):
    torch.rand(5)
    loc = pyro.param("a", torch.tensor(0.1))

    def step(carry, x_t):
        torch.randn(2)
        h = pyro.sample("h", dist.Normal(loc + carry, 1.0))
        u = pyro.sample("u", dist.Uniform(0.0, 1.0))
        return h, u

    pe.scan(step, torch.tensor(0.0), x)
    torch.randn(1)


def scanned_target(x):
    def step(carry, x_t):
        h = pyro.sample("h", dist.Normal(carry, 1.0))
        pyro.sample("u", dist.Uniform(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0), obs=x_t)
        return h, h

    pe.scan(step, torch.tensor(0.0), x)


@pytest.mark.parametrize("program", [unused, assorted, permuted, permuted_normal, scanned])
def test_fallback_random_draws_the_stream_of_an_uncompiled_run(interpreted, program):
    """The losses agree, and so does the next number of torch's generator."""

    assert drawn(program, True) == pytest.approx(drawn(program, False), rel=1e-9)


@pytest.mark.parametrize("program", [assorted, dropped])
def test_machine_code_draws_the_stream_of_an_uncompiled_run(program):
    assert drawn(program, True) == pytest.approx(drawn(program, False), rel=1e-6)


def drawn(program, compile):
    """The losses of a few steps, and the next number of torch's generator."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    target = scanned_target if program is scanned else model
    svi = pe.SVI(target, program, adam(), sampled(), compile=compile, fallback_random=True)
    return [svi.step(X) for _ in range(4)] + [torch.rand(()).item()]


# --- errors
def test_user_code_in_a_folder_named_pyro_is_named(interpreted, tmp_path, monkeypatch):
    folder = tmp_path / "pyro" / "torch"
    folder.mkdir(parents=True)
    (folder / "my_programs.py").write_text(
        "import pyro, pyro.distributions as dist\n"
        "def model(x):\n"
        "    z = pyro.sample('z', dist.Normal(0.0, 1.0))\n"
        "    shift = 1.0 if z > 0 else 0.0\n"
        "    pyro.sample('x', dist.Normal(z + shift, 1.0), obs=x.mean())\n"
    )
    monkeypatch.syspath_prepend(folder)
    import my_programs  # pyright: ignore[reportMissingImports]

    svi = pe.SVI(my_programs.model, guide, adam(), sampled(), compile=True)
    svi.step(X)
    with pytest.raises(CompileError, match="Line 'shift = 1.0 if z > 0 else 0.0'"):
        svi.step(X)


def test_flow_guides_move_like_pyro(interpreted):
    """AutoIAFNormal registers its first weight twice."""

    def moved(svi_of):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        q = AutoIAFNormal(located, hidden_dim=[4])
        q(Y)
        before = [p.detach().clone() for p in q.parameters()]
        pyro.set_rng_seed(1)
        svi = svi_of(located, q, pyro.optim.SGD({"lr": 1e-4}))
        for _ in range(3):
            svi.step(Y)
        return [p.detach() - old for p, old in zip(q.parameters(), before, strict=True)]

    ours = moved(lambda *a: pe.SVI(*a, sampled(), compile=True, fallback_random=True))
    torch.testing.assert_close(ours, moved(lambda *a: SVI(*a, Trace_ELBO())))


CONSTANT = {
    "StudentT": lambda: dist.StudentT(torch.tensor(4.0)),
    "Gamma": lambda: dist.Gamma(torch.tensor(2.0), 1.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(3)),
    "Poisson": lambda: dist.Poisson(torch.tensor(3.0)),
    "Binomial": lambda: dist.Binomial(5, torch.tensor(0.4)),
}


@pytest.mark.parametrize("family", CONSTANT)
def test_draws_with_constant_parameters_are_new_at_every_step(interpreted, family):
    """What can be computed once from constants is; a draw is no such thing."""

    def program(x):
        z = pyro.sample("z", CONSTANT[family]())
        pyro.sample("x", dist.Normal(z.sum() + z[..., :1].sum() if z.dim() else z, 1.0), obs=x)

    def variational(_):
        def run(x):
            pyro.param("unused", torch.tensor(1.0))
            pyro.sample("z", CONSTANT[family]())

        return run

    x = torch.tensor(0.5)
    assert_equal(program, variational, x)
    assert len(losses(program, variational, x, compile=True, steps=12).unique()) >= 4


@pytest.mark.parametrize(("parts", "shares"), [((slice(0, 1), slice(1, 3)), False), ((slice(0, 2), slice(1, 3)), True)])
def test_parameters_that_are_parts_of_one_tensor(interpreted, parts, shares):
    """They train where they do not overlap, as what init_to_value takes from one vector."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.tensor([0.1, 0.2, 0.3])
            self.first, self.second = (nn.Parameter(whole[part]) for part in parts)

    def variational(_):
        net = Parts()

        def run(x):
            pyro.module("net", net)
            pyro.sample("z", dist.Normal(net.first.sum() + net.second.sum(), 0.5))

        return run

    if shares:
        with pytest.raises(CompileError, match="share memory"):
            losses(model, variational, X, compile=True)
    else:
        assert_equal(model, variational, X)
