"""Parts of a step that fail beside the programs: the backward pass, the optimizer, the scheduler."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.errors import CompileError, ProgramError

X = torch.ones(24, 4)


class Failing(torch.autograd.Function):
    """The identity, whose backward fails from its third run on."""

    runs = 0

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Failing.runs += 1
        return gradient if Failing.runs < 3 else gradient.no_such_attribute


def written_in_place(loc):
    y = loc.exp()
    squared = y * y
    y.add_(1.0)
    return squared


def with_hook(loc):
    loc = loc.clone()
    if loc.requires_grad:
        loc.register_hook(lambda gradient: {}["missing"])
    return loc


class Breaking(torch.optim.SGD):
    def step(self, closure=None):
        if closure is not None:
            closure()
        raise AttributeError("no state")


def steps(program, optimizer, **options):
    made = pyro.optim.PyroOptim(optimizer, {"lr": 0.1})
    return pe.SVI(program, no_latents, made, pe.TraceBeta_ELBO(), **options).run(4, X, progress=False)


def epochs(program, optimizer, **options):
    settings = {"batch_size": 12, "max_epochs": 4, "progress": False, "optimizer": lambda p: optimizer(p, lr=0.1)}
    return pe.fit(program, no_latents, X, **settings | options)


def no_latents(x):
    pass


def of(spoil):
    """A program that spoils its parameter."""
    pyro.clear_param_store()
    Failing.runs = 0

    def program(x):
        loc = spoil(pyro.param("loc", torch.zeros(4)))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x)

    return program


@pytest.mark.parametrize(
    ("train", "options", "place"),
    [
        (steps, {}, "It failed after 2 steps."),
        (epochs, {}, "This was batch 0 of epoch 1. The parameters are those after 2 steps."),
        (epochs, {"batch_size": None}, "This was epoch 2. The parameters are those after 2 steps."),
    ],
)
def test_a_backward_pass_that_fails_later_is_named_with_its_place(train, options, place):
    with pytest.raises(ProgramError, match="The backward pass fails. Line 'return gradient if .*AttributeE") as error:
        train(of(Failing.apply), torch.optim.SGD, **options)
    assert str(error.value).endswith(place)
    assert isinstance(error.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    ("spoil", "optimizer", "words"),
    [
        (written_in_place, torch.optim.SGD, "The backward pass fails.*modified by an inplace operation"),
        (with_hook, torch.optim.SGD, "The backward pass fails. Line 'loc.register_hook.*KeyError: 'missing'"),
        (torch.clone, Breaking, "The optimizer fails. Line 'raise Attr.*AttributeError: no state.*may have moved"),
    ],
)
@pytest.mark.parametrize(
    ("train", "options"),
    [
        (steps, {}),
        (steps, {"compile": True}),
        (epochs, {}),
        (epochs, {"compile": True}),
        (epochs, {"batch_size": None}),
    ],
)
def test_a_part_that_fails_is_named(spoil, optimizer, words, train, options):
    with pytest.raises(ProgramError, match=f"{words}.*after 0 steps"):
        train(of(spoil), optimizer, **options)
    left = pyro.param("loc").grad
    assert left is None or not left.any(), "a later step would add to it"


def test_a_backward_pass_that_fails_is_named_under_svi_of_pyro():
    svi = pyro.infer.SVI(of(with_hook), no_latents, pyro.optim.Adam({"lr": 0.1}), pe.TraceBeta_ELBO())
    with pytest.raises(ProgramError, match="The backward pass fails. Line 'loc.register_hook"):
        svi.step(X)


@pytest.mark.parametrize("options", [{}, {"compile": True}])
def test_a_scheduler_that_fails_is_named(options):
    def scheduler(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 - epoch))

    with pytest.raises(ProgramError, match="The scheduler fails. Line.*ZeroDivisionError.* of epoch 0"):
        epochs(of(torch.clone), torch.optim.SGD, scheduler=scheduler, **options)


class Skipping(torch.optim.SGD):
    def step(self, closure=None):
        pass


@pytest.mark.parametrize("options", [{}, {"batch_size": None}, {"valid": X}, {"accumulate_grad_batches": 2}])
def test_an_optimizer_that_does_not_call_its_closure_is_named(options):
    with pytest.raises(ProgramError, match="The step of Skipping did not call its closure.*This was .*epoch 0"):
        epochs(of(torch.clone), Skipping, **options)


class Counting(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("options", [{"batch_size": None}, {}, {"valid": X}])
def test_a_compiled_fit_judges_an_optimizer_alike_on_every_path(options):
    with pytest.raises(CompileError, match="Counting keeps its counts as Python numbers"):
        epochs(of(torch.clone), Counting, compile=True, **options)


class FromScratch(torch.optim.Optimizer):
    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr, "taken": 0})

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            with torch.enable_grad():
                closure()
        self.param_groups[0]["taken"] += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_the_librarys_steps_call_an_optimizer_once_each():
    made = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Steps run in Python")
        epochs(of(torch.clone), lambda p, lr: made.append(FromScratch(p, lr)) or made[0], compile="auto", valid=X)
    assert made[0].param_groups[0]["taken"] == 8


def test_errors_of_a_class_of_ones_own_pass():
    class OwnError(Exception):
        pass

    def spoil(loc):
        loc = loc.clone()
        if loc.requires_grad:
            loc.register_hook(refuse)
        return loc

    def refuse(gradient):
        raise OwnError

    for train in (steps, epochs):
        with pytest.raises(OwnError):
            train(of(spoil), torch.optim.SGD)
