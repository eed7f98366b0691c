"""Bad input of scans: the message names the step and the site, what was expected, and the cure."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.reparam import LocScaleReparam

import pyro_elbo as pe
from pyro_elbo.errors import ArgumentError, NonFiniteError, ProgramError, SiteError
from tests.support.refusing import refusing

N, T = 3, 4
CURE = re.compile(
    r"\b(add|run|look|make|let|put|give|pass|skip|leave|keep|use|choose|remove|return|draw|write|carry|must be|"
    r"expected|integers)\b",
    re.I,
)
refuses = refusing(CURE)


def step(z, x_t):
    z = pyro.sample("z", dist.Normal(z, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x_t)
    return z, z


def guide_step(z, x_t):
    z = pyro.sample("z", dist.Normal(0.5 * z, 1.0))
    return z, z


def sequences(a_step=step, **options):
    """The program that scans a batch of sequences."""

    def program(x, lengths=None):
        with pyro.plate("sequences", N):
            return pe.scan(a_step, torch.zeros(N), x, lengths, **options)

    return program


def at_step(t, before, after):
    """A step that does one thing before step t and another from then on."""
    count = iter(range(1000))
    return lambda carry, x_t: (before if next(count) < t else after)(carry, x_t)


X = torch.zeros(T, N)


# --- lengths, inputs, horizon --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "parts"),
    [
        ([4, 5, 7], ("lengths", "between 1 and T = 4", "[5, 7]", "padded")),
        ([0, 1, 2], ("lengths", "between 1 and T = 4", "[0]", "empty")),
        ([-1, 1, 2], ("between 1 and T = 4", "[-1]")),
        ([1.0, 2.0, 3.0], ("integers", "torch.float32")),
        ([True, True, False], ("integers", "torch.bool")),
        ([1, 2], ("(2,)", "(4, 3)", "dim=1")),
    ],
)
def test_lengths(lengths, parts):
    with refuses(ArgumentError, *parts):
        sequences()(X, torch.tensor(lengths))


def test_lengths_for_inputs_with_batch_first():
    with refuses(ArgumentError, "(4,)", "(4, 3)", "dim=1"):
        pe.scan(lambda c, x: (c, x), None, X, torch.tensor([1, 2, 3, 4]))


@pytest.mark.parametrize("options", [{"length": T}, {"length": T, "reverse": True}])
def test_lengths_are_checked_without_inputs(options):
    with refuses(ArgumentError, "between 1 and T = 4", "[9]"):
        sequences(guide_step, **options)(None, torch.tensor([9, 1, 2]))


@pytest.mark.parametrize(
    ("xs", "options", "parts"),
    [
        (torch.zeros(0, N), {}, ("T >= 1", "[0]", "empty")),
        (torch.zeros(N, 0), {"dim": 1}, ("T >= 1", "dimension 1", "[0]")),
        (None, {}, ("length=T",)),
        (None, {"length": 0}, ("T >= 1", "[0]")),
        ((X, X[:3]), {}, ("one length", "[4, 3]")),
        (X, {"length": 3}, ("one length", "[4, 3]")),
        (X, {"horizon": -4}, ("horizon must be", "got -4")),
        (X, {"dim": 2}, ("(4, 3)", "dimension 2")),
        (X, {"dim": -3}, ("(4, 3)", "dimension -3")),
        (torch.tensor(1.0), {}, ("()", "dimension 0")),
        ([1.0, 2.0], {}, ("tensors", "float", "as_tensor")),
        (X.numpy(), {}, ("tensors", "ndarray", "as_tensor")),
        ({"x": X, "label": "a"}, {}, ("tensors", "str")),
        (X, {"horizon": 2, "reverse": True}, ("horizon", "reverse")),
    ],
)
def test_inputs(xs, options, parts):
    with refuses(ArgumentError, *parts):
        pe.scan(lambda carry, x_t: (carry, None), torch.zeros(N), xs, **options)


# --- the carry and the out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0, 2])
@pytest.mark.parametrize(
    ("carry", "after", "parts"),
    [
        (torch.zeros(3), lambda c: torch.zeros(2), ("part 0", "(3,)", "(2,)")),
        (torch.zeros(3), lambda c: c.sum(), ("part 0", "(3,)", "()")),
        (torch.zeros(3), lambda c: c.double(), ("part 0", "torch.float32", "torch.float64")),
        (torch.zeros(3, dtype=torch.long), lambda c: c + 0.5, ("torch.int64", "torch.float32")),
        ((torch.zeros(3), torch.zeros(2)), lambda c: (c[0], c[1][:1]), ("part 1", "(2,)", "(1,)")),
        ({"a": torch.zeros(3)}, lambda c: {"b": c["a"]}, ("structure", "'a'", "'b'")),
        ((torch.zeros(3),), lambda c: [c[0]], ("structure", "tuple", "list")),
        (None, lambda c: torch.zeros(3), ("part 0", "None", "Make it a tensor")),
        (0.0, lambda c: c + 1.0, ("0.0", "1.0", "Make it a tensor")),
        (np.zeros(2), lambda c: c + 1.0, ("Make it a tensor",)),
    ],
)
def test_a_carry_that_changes(carry, after, parts, t):
    changing = at_step(t, lambda c, x_t: (c, None), lambda c, x_t: (after(c), None))
    with refuses(ArgumentError, f"step {t}", *parts):
        pe.scan(changing, carry, X)


def test_a_carry_that_grows_after_the_first_step():
    growing = at_step(1, lambda c, x_t: (c, None), lambda c, x_t: (c.expand(3), None))
    with refuses(ArgumentError, "step 1", "part 0", "()", "(3,)", "init"):
        pe.scan(growing, torch.tensor(0.0), X)


@pytest.mark.parametrize("result", [torch.zeros(2), (torch.zeros(2),), [torch.zeros(2), None], None])
def test_a_step_that_does_not_return_carry_and_out(result):
    with refuses(ArgumentError, "(carry, out)", type(result).__name__):
        pe.scan(lambda c, x_t: result, torch.zeros(2), X)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.zeros(2), None),
        ((1, 2), (1, 3)),
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}),
        (np.zeros(2), np.ones(2)),
    ],
)
def test_an_out_that_changes(before, after):
    changing = at_step(2, lambda c, x_t: (c, before), lambda c, x_t: (c, after))
    with refuses(ArgumentError, "out of step 2"):
        pe.scan(changing, None, X)


def test_an_out_that_changes_its_shape():
    changing = at_step(2, lambda c, x_t: (c, torch.zeros(2)), lambda c, x_t: (c, torch.zeros(3)))
    with refuses(ArgumentError, "out", "(2,)", "(3,)"):
        pe.scan(changing, None, X)


def test_a_carry_that_does_not_begin_with_the_sequences():
    with refuses(ArgumentError, "part 0", "(2, 3)", "(3,)"), pyro.plate("sequences", N):
        pe.scan(lambda c, x_t: (c, None), torch.zeros(2, N), X, torch.tensor([1, 2, 3]))


# --- sites ---------------------------------------------------------------------------------------------------------


def draw(*names):
    def a_step(carry, x_t):
        for name in names:
            pyro.sample(name, dist.Normal(torch.zeros(N), 1.0))
        return carry, None

    return a_step


def test_a_site_name_twice_in_a_step():
    with refuses(SiteError, "'z'", "twice", "step 0"):
        sequences(draw("z", "y", "z"))(X)
    with refuses(SiteError, "'z'", "twice", "step 2"):
        sequences(at_step(2, draw("z"), draw("z", "z")))(X)


@pytest.mark.parametrize(
    ("before", "after", "names"),
    [(("z",), ("z", "y"), ["y"]), (("z", "y"), ("z",), ["y"]), (("z",), ("y",), ["y", "z"]), ((), ("z",), ["z"])],
)
def test_sites_that_are_not_in_every_step(before, after, names):
    with refuses(SiteError, names, "step 2", "mask"):
        sequences(at_step(2, draw(*before), draw(*after)))(X)


FIRST = dist.Normal(torch.zeros(N), 1.0)
OTHERS = {
    "kind": (dist.StudentT(3.0, torch.zeros(N)), ("StudentT", "Normal")),
    "event": (dist.Normal(torch.zeros(N, 2), 1.0).to_event(1), ("event shape (2,)", "event shape ()")),
    "batch": (dist.Normal(torch.zeros(()), 1.0), ()),
    "a flow": (
        dist.TransformedDistribution(FIRST, [dist.transforms.AffineTransform(torch.zeros(N), 2.0)]),
        ("Normal",),
    ),
}


@pytest.mark.parametrize("other", ["kind", "event", "a flow"])
def test_a_distribution_that_changes(other):
    fn, parts = OTHERS[other]
    changing = at_step(
        2,
        lambda c, x_t: (c, pyro.sample("z", FIRST).sum()),
        lambda c, x_t: (c, pyro.sample("z", fn).sum()),
    )
    with refuses(SiteError, "'z'", "step 2", *parts):
        sequences(changing)(X)


def test_a_batch_shape_that_changes_without_a_plate():
    changing = at_step(
        2,
        lambda c, x_t: (c, pyro.sample("z", FIRST).sum()),
        lambda c, x_t: (c, pyro.sample("z", OTHERS["batch"][0]).sum()),
    )
    with refuses(SiteError, "'z'", "step 2", "batch shape ()", "batch shape (3,)"):
        pe.scan(changing, None, X)


def test_a_mask_or_scale_that_comes_and_goes():
    keep = torch.tensor([True, False, True])
    for handler in (poutine.mask(mask=keep), poutine.scale(scale=2.0)):
        with refuses(SiteError, "'z'", "step 1", "mask"):
            sequences(at_step(1, draw("z"), handler(draw("z"))))(X)


def test_sites_of_a_ragged_scan_without_plate():
    """No plate over the sequences: their lengths have no place in the site's batch."""

    def shared(c, x_t):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        return c, None

    with refuses(SiteError, "'w'", "lengths", "(3,)", "plate"):
        pe.scan(shared, None, X, torch.tensor([1, 2, 3]))
    program = lambda a_step: lambda x: pe.scan(a_step, torch.zeros(N), x, torch.tensor([1, 2, 3]))  # noqa: E731
    with pytest.raises(SiteError, match=r"'[zx]'.*plate"):
        pe.TraceTimestep_ELBO().terms(program(step), program(guide_step), X)


def test_a_scan_inside_of_a_step():
    with refuses(SiteError, "'z'", "within the step of another"):
        sequences(lambda c, x_t: (c, pe.scan(guide_step, c, None, length=2)[1]))(X)


def test_a_scan_without_sites_inside_of_a_step_is_a_function():
    """Nothing to state: it may stand anywhere."""

    def outer(total, x_t):
        total = total + pe.scan(lambda c, y: (c + y, None), torch.tensor(0.0), x_t)[0]
        return total, total

    assert pe.scan(outer, torch.tensor(0.0), torch.ones(4, 3))[1].tolist() == [3, 6, 9, 12]


def test_a_plate_that_takes_its_own_rows_at_every_step():
    def subsampled(c, x_t):
        with pyro.plate("rows", 10, subsample_size=2):
            pyro.sample("z", dist.Normal(0.0, 1.0))
        return c, None

    with refuses(SiteError, "'rows'", "subsample", "around"):
        pe.scan(subsampled, None, X)


def test_handlers_around_that_replace_a_site():
    model = sequences()
    for handler, kind in (
        (poutine.do(model, {"z": torch.zeros(N)}), "poutine.do"),
        (poutine.reparam(model, {"z": LocScaleReparam(0.0)}), "poutine.reparam"),
        (poutine.reparam(model, lambda site: LocScaleReparam(0.0) if site["name"] == "z" else None), "poutine.reparam"),
    ):
        with refuses(SiteError, "'z'", kind, "within"):
            handler(X)
    for others in (poutine.do(model, {"y": torch.zeros(N)}), poutine.reparam(model, {"y": LocScaleReparam(0.0)})):
        assert others(X)[1].shape == (T, N)


def switch(k, x_t):
    k = pyro.sample("k", dist.Bernoulli(0.3 + 0.2 * k))
    pyro.sample("x", dist.Normal(k, 1.0), obs=x_t)
    return k, k


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_enumeration(kind):
    """Enumerated values are no values over time."""
    model = config_enumerate(sequences(switch), kind)
    with refuses(SiteError, "'k'", "enumerated"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda x: None, X)
    inside = sequences(config_enumerate(switch, kind))
    with refuses(SiteError, "'k'", "enumerated"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(inside, lambda x: None, X)


@pytest.mark.parametrize("shape", [(N, T + 2), ()])
def test_values_that_do_not_fit_in_time(shape):
    conditioned = poutine.condition(sequences(draw("z")), {"z": torch.zeros(shape)})
    with refuses(SiteError, "'z'", shape, "4 steps"):
        poutine.trace(conditioned).get_trace(X)


def test_other_draws_of_a_site():
    fn = poutine.trace(sequences()).get_trace(X).nodes["z"]["fn"]
    with refuses(SiteError, "Run the program again"):
        fn.sample(torch.Size([2]))


def test_a_flow_knows_its_own_draws_only():
    def flow(c, x_t):
        base = dist.Normal(torch.zeros(N), 1.0)
        return c, pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.AffineTransform(x_t, 2.0)]))

    fn = poutine.trace(sequences(flow)).get_trace(X).nodes["z"]["fn"]
    assert fn.log_prob(fn.value).shape == (N,)
    with refuses(SiteError, "TransformedDistribution", "its own draws"):
        fn.log_prob(fn.value + 1)


# --- numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["auto", "sampled"])
def test_nan_inside_the_real_part(kl):
    """The place is (sequence, step)."""
    x = X.clone()
    x[2, 1] = torch.nan
    x[3, 0] = torch.nan  # padding
    lengths = torch.tensor([2, 4, 3])
    with refuses(NonFiniteError, "'x'", "1 nan", "(1, 2)", "mask"):
        pe.TraceTimestep_ELBO(kl=kl).terms(sequences(), sequences(guide_step), x, lengths)


def test_nan_that_reaches_the_guide():
    def seeing(z, x_t):
        z = pyro.sample("z", dist.Normal(x_t, 1.0))
        return z, z

    x = X.clone()
    x[2, 1] = torch.nan
    with refuses(NonFiniteError, "Argument 0", "1 nan", "(2, 1)"):
        pe.TraceTimestep_ELBO().terms(sequences(), sequences(seeing), x)


def test_infinite_log_density_names_the_step():
    def hard(z, x_t):
        z = pyro.sample("z", dist.Normal(z, 1.0))
        pyro.factor("wall", torch.where(x_t > 0, -torch.inf, 0.0))
        return z, z

    x = X.clone()
    x[3, 2] = 1.0
    with refuses(NonFiniteError, "'wall'", "(2, 3)", "sequences, time"):
        pe.TraceTimestep_ELBO().terms(sequences(hard), sequences(guide_step), x)


def test_data_outside_of_the_support():
    def counts(z, x_t):
        z = pyro.sample("z", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x_t)
        return z, z

    with refuses(SiteError, "'x'", "support", "Poisson"):
        pe.TraceTimestep_ELBO().terms(sequences(counts), sequences(guide_step), X - 1)


# --- model and guide -----------------------------------------------------------------------------------------------


def test_model_and_guide_of_different_length():
    short = sequences(guide_step, length=T - 1)
    with pytest.raises(SiteError, match="'z'.*event shape"):
        pe.TraceTimestep_ELBO().terms(sequences(), lambda x: short(None), X)


def test_a_latent_that_the_guide_lacks():
    with refuses(SiteError, "'z'", "guide"):
        pe.TraceTimestep_ELBO().terms(sequences(), lambda x: None, X)


def test_a_forecast_has_no_bound():
    """What is drawn behind the data is no observation, and no guide draws it."""
    with refuses(SiteError, "'x'", "guide"):
        pe.TraceTimestep_ELBO().terms(sequences(observe, horizon=2), lambda x: None, X)


def observe(c, x_t):
    pyro.sample("x", dist.Normal(torch.zeros(N), 1.0), obs=x_t)
    return c, None


# --- a scan on its own, outside of an objective --------------------------------------------------------------------


def fails_at(t):
    return at_step(t, lambda c, x: (c, c), lambda c, x: (c.no_such_attribute, c))


@pytest.mark.parametrize(
    ("a_step", "init", "parts"),
    [
        (fails_at(2), torch.zeros(N), ("Step 2 of pe.scan", "no_such_attribute", "tensor of shape (3,)")),
        (lambda c: (c, c), torch.zeros(N), ("Step 0 of pe.scan", "TypeError", "takes 1 positional argument")),
        (step, "one", ("Step 0 of pe.scan", "Site 'z'", "called with (str, tensor of shape (3,))")),
        (lambda c, x: step(c * float("nan"), x), torch.zeros(N), ("Step 0 of pe.scan", "Expected parameter loc")),
    ],
)
def test_a_step_that_fails_alone_is_named(a_step, init, parts):
    with refuses(ProgramError, *parts):
        pe.scan(a_step, init, X)


def test_the_error_of_a_step_is_that_of_the_program_around_it():
    """Which knows the arguments, and tells NaN in the data from a program that is wrong."""
    with refuses(NonFiniteError, "Argument 0 of the program"):
        pe.TraceBeta_ELBO().terms(sequences(lambda c, x: step(x, x)), sequences(guide_step), X * float("nan"))
    with refuses(ProgramError, "The program was called with (tensor of shape (4, 3))"):
        pe.TraceBeta_ELBO().terms(sequences(lambda c, x: (c.no_such_attribute, c)), sequences(guide_step), X)
