"""The public callables, as docs/api.md lists them, each with a valid call."""

import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
import xarray

import pyro_elbo as pe
from pyro_elbo.representation.probes import Estimate, ProbeScore, Readout
from tests.support.doors import Door, Later
from tests.support.kinds import (
    BY_NAME,
    DATA,
    FLAG,
    FUNCTION,
    JUNK,
    LIKE_DATA,
    NAME,
    PATH,
    PROGRAM,
    SAVED,
    SEED,
    TERMS,
    TRAIN,
    Kind,
    X,
    choice,
    count,
    fails,
    number,
)
from tests.support.made import (
    FIT,
    GUIDE,
    MEAN,
    QUIET,
    audited,
    calibrated,
    exact,
    exported,
    fitted,
    responded,
    saved,
    terms,
)
from tests.support.small_programs import Guide, discrete, model, shared, step, walk

API = Path(__file__).parents[2] / "docs" / "api.md"
PROGRAMS = {"model": model, "guide": GUIDE, "args": (X,)}
_FIGURE = Estimate(0.5, 0.4, 0.6)
AN_AUDIT = pe.Audit(48, 2, Readout("s", ("0", "1"), "0", 0.5, 0.7, (ProbeScore("logistic", *[_FIGURE] * 3, True),)))
S = (torch.arange(24) % 2).float()
Z, S2 = torch.randn(48, 1, generator=torch.Generator().manual_seed(0)), torch.arange(48) % 2


def history() -> Any:
    """The history of a fit."""
    return fitted().history


def svi() -> pe.SVI:
    """An SVI of its own."""
    return pe.SVI(model, Guide(), pyro.optim.Adam({"lr": 0.01}), pe.TraceBeta_ELBO())


def noisy(beta: float) -> pe.Terms:
    """Return terms in place of a fit."""
    return terms(float(beta))


def used(make: Any) -> Any:
    """Return a function that makes an objective, or a penalty of one, and evaluates its terms."""

    @functools.wraps(make)
    def call(*args: Any, **options: Any) -> pe.Terms:
        made = make(*args, **options)
        loss = made if isinstance(made, pe.TraceBeta_ELBO) else pe.TraceBeta_ELBO(penalties=[made])
        torch.manual_seed(0)
        return loss.terms(model, GUIDE, X)

    call.__signature__ = inspect.signature(make)
    return call


@functools.wraps(pe.SVI)
def stepped(*args: Any, **options: Any) -> float:
    """Make an SVI and take a step."""
    return pe.SVI(*args, **options).step(X)


@functools.wraps(pe.scan)
def scanned(*args: Any, **options: Any) -> torch.Tensor:
    """Evaluate a model that scans."""
    loss = pe.TraceBeta_ELBO(kl="sampled")
    return loss.terms(lambda: pe.scan(*args, **options), lambda: pe.scan(walk, torch.tensor(0.0), X)).elbo


OPTIMIZERS = Kind(
    (None, True, 3, "adam", torch.optim.Adam, pyro.optim.Adam, *JUNK),
    odd=(torch.optim.Adam([torch.zeros(1, requires_grad=True)]),),
)
LOSSES = Kind(
    (None, True, 3, "elbo", pe.TraceBeta_ELBO, pyro.infer.Trace_ELBO(), pe.Constant(1.0), *JUNK),
)
LOADED_LOSSES = LOSSES.or_none()
AXES = Kind((True, 3, "axes", [None], [3], [], {}, (), np.array([3, 4]), [3, 4, 5, 6], object()), same=())
HISTORIES = Kind(
    (None, True, 3, "history", X, xarray.Dataset(), xarray.Dataset({"elbo": ("epoch", [1.0, 2.0])}), *JUNK), odd=()
)
ATTRIBUTES = Kind(
    (
        True,
        3,
        "",
        "zz",
        "z",
        int,
        lambda: S,
        lambda x, y: S,
        lambda x: None,
        lambda x: "s",
        lambda x: S[:3],
        lambda x: X[:0],
    )
    + tuple(x for x in JUNK if not callable(x))
)
SIZES = Kind((True, "3", 0, -1, 2.5, (2.5,), ("3",), (0,), (True,), [None], 3j, b"", {}, torch.zeros(2), object()))
PENALTY = {
    "attribute": ATTRIBUTES,
    "conditional_on": ATTRIBUTES,
    "estimator": choice("aggregate", "variational", "club", "adversarial", "hsic"),
    "levels": SIZES,
    "hidden": SIZES,
    "critic_lr": number(0.0, above=True),
}
SAMPLES = {"num_samples": count(2)}
NEW_DATA = DATA.but(DATA.wrong[0], BY_NAME)
OF_FIT = {"seed": SEED.or_none(), "args": NEW_DATA}
LABELS = Kind(
    (
        None,
        True,
        3,
        "s",
        Z[:, 0],
        S2[:3],
        S2[:0],
        torch.zeros(48),
        S2 / 0,
        S2[:, None, None],
        object(),
        {},
        int,
        3j,
        {3},
        [[1], [2, 3]],
    ),
    odd=(S2 + 1j, S2.tolist(), S2[:, None], S2.half(), S2.bool().numpy(), np.array(["a", None] * 24, dtype=object)),
)
OPTIONS = Kind(({"zz": 3}, {"betas": 1.0}, {"random_seed": 3}, {"kl": "x"}))
LENGTHS = Kind(
    (
        True,
        "3",
        3.5,
        math_nan := float("nan"),
        [0],
        [99],
        [-1],
        [1.5],
        ["a"],
        {},
        X,
        torch.zeros(0),
        [[3, 3]],
        torch.tensor([3j]),
        object(),
        int,
    )
)
XS = Kind(
    (
        None,
        True,
        3,
        "x",
        [3, 4],
        np.zeros(3),
        torch.zeros(0),
        {},
        (),
        [X, X[:3]],
        object(),
        int,
        torch.tensor(3.0),
        {"x": "y"},
    )
)
LISTS = Kind(
    (None, True, 3, "logistic", [], ["zz"], [3], [None], {}, object(), X, ["logistic", 3], [["logistic"]], int)
)
MAPPINGS = Kind(
    (True, 3, "z", [3], object(), X, {"zz": ["a"]}, {3: ["a"]}, {"z": 3}, {"data": [1]}, {"data": None}, int)
)
RESULTS = Kind(
    (None, True, 3, "fits", [3], [], {}, {1.0: 3}, {"a": terms}, {-1.0: 3}, {float("nan"): 3}, object(), X, int)
)
BETAS = Kind(
    (None, True, "1", [], ["1"], [1.0, 1.0], [-1.0], [float("nan")], {}, object(), int, [[1.0]], torch.tensor([1j]))
)
DATASETS = HISTORIES
FITTED = {n: p.default for n, p in inspect.signature(pe.fit).parameters.items()}

DOORS: dict[str, Door] = {
    "TraceBeta_ELBO": Door(lambda: used(pe.TraceBeta_ELBO), {"max_plate_nesting": 1}),
    "TraceBeta_ELBO.terms": Door(lambda: pe.TraceBeta_ELBO().terms, PROGRAMS),
    "TraceBeta_ELBO.loss": Door(lambda: pe.TraceBeta_ELBO().loss, PROGRAMS),
    "TraceBeta_ELBO.differentiable_loss": Door(lambda: pe.TraceBeta_ELBO().differentiable_loss, PROGRAMS),
    "TraceBeta_ELBO.loss_and_grads": Door(lambda: pe.TraceBeta_ELBO().loss_and_grads, PROGRAMS),
    "TraceBeta_ELBO.beta_at": Door(
        lambda: pe.TraceBeta_ELBO(pe.LinearWarmup(0.0, 1.0, steps=9)).beta_at,
        {"step": 3, "sites": ["z"]},
        {"sites": Kind((None, True, 3, object(), int, [3], [None]), odd=("z", [], ["zz"]))},
    ),
    "TraceBeta_ELBO.load_state_dict": Door(
        lambda: pe.TraceBeta_ELBO().load_state_dict,
        {"state": {"step": 3}},
        {
            "state": Kind(
                (
                    None,
                    True,
                    3,
                    "step",
                    [],
                    {},
                    {"step": "x"},
                    {"step": -1},
                    {"step": None},
                    {"step": 2.5},
                    {"step": 3, "critics": 3},
                    {"step": 3, "critics": {"c": {}}},
                    {"step": 3, "averages": {"z": 3}},
                    {"step": 3, "zz": 3},
                    object(),
                    X,
                    int,
                )
            )
        },
    ),
    "TraceIW_ELBO": Door(lambda: used(pe.TraceIW_ELBO), {}, {"alpha": number(0.0), "options": OPTIONS}),
    "TraceTimestep_ELBO": Door(
        lambda: used(pe.TraceTimestep_ELBO),
        {},
        {
            "normalize": choice("total", "sequence", "frame", "step"),
            "bound": choice("elbo", "importance", "filtering"),
            "resample": number(0.0, most=1.0),
            "options": OPTIONS,
        },
    ),
    "TraceMI_ELBO": Door(
        lambda: used(pe.TraceMI_ELBO), {"latent": "z", "attribute": lambda x: S}, PENALTY | {"options": OPTIONS}
    ),
    "Terms.to_dataset": Door(lambda: terms().to_dataset, {}, {"per_datum": FLAG}),
    "Constant": Door(lambda: pe.Constant, {"value": 1.0}, {"value": number(0.0)}),
    "Schedule.__call__": Door(lambda: pe.LinearWarmup(0.0, 1.0, steps=9).__call__, {"step": 3}),
    "LinearWarmup": Door(lambda: pe.LinearWarmup, {"start": 0.0, "end": 1.0, "steps": 9}),
    "SigmoidWarmup": Door(
        lambda: pe.SigmoidWarmup,
        {"start": 0.0, "end": 1.0, "steps": 9},
        {"steepness": number(0.0, above=True)},
    ),
    "Cyclical": Door(
        lambda: pe.Cyclical,
        {"start": 0.0, "end": 1.0, "steps": 9},
        {"cycles": count(), "ratio": number(0.0, above=True, most=1.0)},
    ),
    "Capacity": Door(lambda: pe.Capacity, {"start": 0.0, "end": 1.0, "steps": 9}, {"gamma": number(0.0)}),
    "fit": Door(
        lambda: pe.fit,
        FIT | {"guide": GUIDE},
        {
            "train": TRAIN,
            "valid": TRAIN.or_none(),
            "loss": LOADED_LOSSES,
            "lr": number(0.0),
            "accuracy": number(0.0, above=True).or_none(),
            "optimizer": FUNCTION,
            "scheduler": FUNCTION,
            "max_epochs": count().or_none(),
            "max_steps": count().or_none(),
            "batch_size": count().or_none(),
            "accumulate_grad_batches": count(),
            "patience": count().or_none(),
            "restore_best": FLAG.or_none(),
            "resume": FLAG,
            "save_every": count().or_none(),
            "devices": count(),
            "num_nodes": count(),
            "accelerator": choice("auto", "cpu"),
            "precision": choice("32-true"),
            "grad_clip": number(0.0, above=True).or_none(),
            "compile": FLAG,
            "logger": Kind((True, 3, "csv", [3], object(), {"a": 3}, int)),
            "callbacks": Kind((True, 3, "cb", [3], object(), {"a": 3}, int)),
        },
        is_slow=True,
    ),
    "FitResult.sample": Door(lambda: fitted().sample, {"args": (X,), "num_samples": 8}, OF_FIT),
    "FitResult.predict": Door(
        lambda: fitted().predict, {"args": (X,), "num_samples": 8}, OF_FIT | {"horizon": count(0)}
    ),
    "FitResult.terms": Door(lambda: fitted().terms, {"args": (X,)}, OF_FIT),
    "FitResult.to_arviz": Door(
        lambda: fitted().to_arviz, {"args": (X,), "options": {"num_samples": 8}}, OF_FIT | {"options": OPTIONS}
    ),
    "FitResult.pareto_k": Door(lambda: fitted().pareto_k, {"args": (X,), "num_samples": 40}, OF_FIT),
    "FitResult.plot": Door(lambda: fitted().plot, {}, {"axes": AXES}),
    "FitResult.summary": Door(
        lambda: fitted().summary, {"args": (X,), "num_samples": 40}, OF_FIT | SAMPLES, is_slow=True
    ),
    "FitResult.save": Door(lambda: fitted().save, {"path": Later(saved)}, {"path": PATH, "data": FLAG}),
    "load": Door(
        lambda: pe.load,
        {"path": Later(saved), "model": model, "guide": GUIDE, "args": (X,)},
        {"path": SAVED, "loss": LOADED_LOSSES, "args": DATA.but(DATA.wrong[0])},
    ),
    "SVI": Door(
        lambda: stepped,
        {"model": model, "guide": GUIDE, "optim": pyro.optim.Adam({"lr": 0.01}), "loss": pe.TraceBeta_ELBO()},
        {
            "optim": OPTIMIZERS,
            "loss": LOSSES,
            "compile": FLAG,
            "grad_clip": number(0.0, above=True).or_none(),
            "fallback_random": FLAG,
        },
    ),
    "SVI.converge": Door(
        lambda: svi().converge,
        {"args": (X,), "max_steps": 3073, "accuracy": 5.0, **QUIET},
        {
            "args": replace(DATA, odd=(), same=()),
            "batches": Kind((True, 3, "x", object(), [], [None], ["x"], [X[:0]], int, {}), odd=(X,)),
            "accuracy": number(0.0, above=True),
            "max_steps": count(),
        },
        is_slow=True,
    ),
    "SVI.evaluate_loss": Door(lambda: svi().evaluate_loss, {"args": (X,)}),
    "SVI.run": Door(lambda: svi().run, {"num_steps": 2, "args": (X,), **QUIET}, {"num_steps": count()}),
    "SVI.step": Door(lambda: svi().step, {"args": (X,)}),
    "plot_history": Door(
        lambda: pe.plot_history, {"history": Later(lambda: fitted().history)}, {"history": HISTORIES, "axes": AXES}
    ),
    "diagnose": Door(lambda: pe.diagnose, {"history": Later(history)}, {"history": HISTORIES}),
    "active_units": Door(lambda: pe.active_units, PROGRAMS | {"num_samples": 8}, SAMPLES | {"seed": SEED.or_none()}),
    "watch": Door(lambda: pe.watch, {}, {"stop": FLAG, "patience": count()}),
    "compare_splits": Door(
        lambda: pe.compare_splits,
        {"train_terms": Later(terms), "valid_terms": Later(terms)},
        {"train_terms": TERMS, "valid_terms": TERMS},
    ),
    "scan": Door(
        lambda: scanned,
        {"step": step, "init": torch.tensor(0.0), "xs": X},
        {
            "step": Kind(
                (
                    None,
                    True,
                    3,
                    "s",
                    lambda: None,
                    lambda c, x: None,
                    lambda c, x: (None, None),
                    lambda c, x: 3,
                    fails,
                    int,
                    object(),
                    X,
                )
            ),
            "init": Kind(
                (None, "x", torch.zeros(2, 3), [3], {}, (), object(), "0", np.zeros(3), int, 3j),
                odd=(0.0, 0, torch.tensor(0)),
            ),
            "xs": XS,
            "lengths": LENGTHS,
            "length": count().or_none(),
            "horizon": count(0),
            "reverse": FLAG,
            "dim": Kind((None, "0", 2.5, 1, 9, -9, True, *JUNK)),
        },
    ),
    "MutualInformation": Door(lambda: used(pe.MutualInformation), {"latent": "z", "attribute": lambda x: S}, PENALTY),
    "TotalCorrelation": Door(
        lambda: used(pe.TotalCorrelation),
        {"latent": "z"},
        {"groups": Kind((True, 3, "z", [3], ((0, "a"),), ((0.5,),), ((-1,),), (None,), object(), X, int, {}))},
    ),
    "PenaltyContext.values_of": Door(lambda: values_of, {"attribute": lambda x: S}, {"attribute": ATTRIBUTES}),
    "audit": Door(
        lambda: pe.audit,
        {"z": Z, "s": S2, "probes": ["logistic"], "folds": 2},
        {
            "z": Kind(
                (
                    None,
                    True,
                    3,
                    "z",
                    X,
                    X[:0],
                    Z / 0,
                    torch.zeros(48, 0),
                    Z[:3],
                    object(),
                    {},
                    int,
                    3j,
                    {3},
                    [[1], [2, 3]],
                    [["a"]] * 24,
                ),
                odd=(Z + 1j, Z.half(), Z.tolist()),
            ),
            "s": LABELS,
            "y": LABELS.or_none(),
            "test": Kind(
                (True, 3, "z", (), (X[:, None],), (X[:, None], S[:3]), (X, S), (None, None), object(), int, {}, X)
            ),
            "probes": LISTS,
            "folds": count(2),
            "name_s": NAME,
            "name_y": NAME,
        },
    ),
    "plot_tradeoff": Door(
        lambda: pe.plot_tradeoff,
        {"curves": Later(lambda: {"a": {0.0: audited(), 1.0: audited()}})},
        {
            "axes": AXES,
            "curves": Kind(
                (
                    None,
                    True,
                    3,
                    "a",
                    {},
                    {"a": {}},
                    {"a": 3},
                    {"a": {0.0: 3}},
                    {"a": {"b": AN_AUDIT}},
                    {"a": {-1.0: AN_AUDIT}},
                    {"a": {float("nan"): AN_AUDIT}},
                    {3: {0.0: 3}},
                    [AN_AUDIT],
                    object(),
                    X,
                    int,
                )
            ),
        },
    ),
    "kl_decomposition": Door(lambda: pe.kl_decomposition, PROGRAMS, {"latent": NAME.or_none(), "seed": SEED.or_none()}),
    "to_arviz": Door(
        lambda: pe.to_arviz,
        PROGRAMS | {"num_samples": 8},
        {
            "resample": choice("psis").or_none(),
            "predictive": FLAG,
            "prior": FLAG,
            "history": HISTORIES.or_none(),
            "coords": MAPPINGS,
            "dims": MAPPINGS,
            "covariance": choice("guide", "linear_response"),
            "file": PATH.or_none(),
        },
    ),
    "pareto_k": Door(lambda: pe.pareto_k, PROGRAMS | {"num_samples": 40}, {"seed": SEED.or_none()}),
    "linear_response": Door(
        lambda: pe.linear_response,
        {"model": shared, "guide": MEAN, "args": (X,), "num_samples": 20},
        {
            "num_samples": count().or_none(),
            "functions": Kind(
                (
                    True,
                    3,
                    "f",
                    lambda: 3,
                    lambda d: None,
                    lambda d: "x",
                    lambda d: {"a": 3j},
                    lambda d: {},
                    lambda d: X,
                    lambda d: d["zz"],
                    object(),
                    X,
                )
            ),
            "method": choice("auto", "dense", "cg"),
            "seed": SEED.or_none(),
        },
    ),
    "LinearResponse.draws": Door(lambda: responded().draws, {"num_samples": 8}, {"seed": SEED.or_none()}),
    "loo": Door(
        lambda: pe.loo,
        {"data": Later(exported)},
        {"data": Kind((None, True, 3, "data", X, pe.Constant(1.0), *JUNK)), "var_name": NAME.or_none()},
    ),
    "infer_discrete": Door(
        lambda: pe.infer_discrete,
        {"model": discrete, "guide": lambda x: None, "args": (X,)},
        {
            "guide": PROGRAM.but(torch.zeros_like),
            "temperature": Kind(
                (None, "1", -1, 2, 0.5, float("nan"), 3j, [], [1], {}, object(), int, X, np.array([0, 1]))
            ),
            "seed": SEED.or_none(),
        },
    ),
    "simulation_based_calibration": Door(
        lambda: pe.simulation_based_calibration,
        {"model": shared, "fit": exact, "args": (torch.zeros(4),), "num_simulations": 20, "num_draws": 19, **QUIET},
        {
            "args": LIKE_DATA,
            "fit": FUNCTION.oddly(None),
            "num_simulations": count(20),
            "num_draws": count(19),
            "false_alarm": number(0.0, above=True, most=1.0),
        },
        is_slow=True,
    ),
    "Calibration.plot": Door(lambda: calibrated().plot, {}, {"axes": AXES}),
    "sweep": Door(
        lambda: pe.sweep, {"fit": noisy, "betas": [1.0], "num_samples": 1, **QUIET}, {"fit": FUNCTION, "betas": BETAS}
    ),
    "rate_distortion": Door(
        lambda: pe.rate_distortion,
        {"results": Later(lambda: {1.0: terms()}), "num_samples": 1},
        {"results": RESULTS, "entropy": number().or_none()},
    ),
    "RateDistortion.plot": Door(lambda: pe.rate_distortion({1.0: terms()}).plot, {}, {"axes": AXES}),
    "log_evidence": Door(
        lambda: pe.log_evidence,
        PROGRAMS | {"num_samples": 8, **QUIET},
        {
            "num_samples": count(2).or_none(),
            "method": choice("importance", "ais"),
            "start": choice("prior", "guide").or_none(),
            "num_temperatures": count(2).or_none(),
            "num_leapfrog": count().or_none(),
            "batch_size": count().or_none(),
            "seed": SEED.or_none(),
        },
    ),
    "bidirectional_evidence": Door(
        lambda: pe.bidirectional_evidence,
        {"model": model, "args": (X[:4],), "num_samples": 2, "num_temperatures": 3, **QUIET},
        {
            "args": LIKE_DATA,
            "num_samples": count(2),
            "num_temperatures": count(2).or_none(),
            "num_leapfrog": count(),
            "seed": SEED.or_none(),
        },
        is_slow=True,
    ),
    "code_length": Door(
        lambda: pe.code_length,
        {"terms": Later(terms), "resolution": 0.1},
        {
            "terms": TERMS,
            "resolution": Kind(
                (
                    None,
                    "1",
                    0,
                    -1.0,
                    float("nan"),
                    float("inf"),
                    {},
                    {"zz": 1.0},
                    {"x": "1"},
                    {"x": 0},
                    [0.1],
                    3j,
                    object(),
                    int,
                    X,
                    True,
                )
            ),
        },
    ),
}


def values_of(attribute: Any) -> Any:
    """Evaluate an attribute, as a penalty of its own does."""

    class Own(pe.Penalty):
        latent, weight, name = "z", 1.0, "own"

        def estimate(self, context: pe.PenaltyContext, critics: Any) -> pe.PenaltyTerm:
            return pe.PenaltyTerm(context.values_of(attribute).mean(), "upper")

    return pe.TraceBeta_ELBO(penalties=[Own()]).terms(model, GUIDE, X)


def documented() -> Iterator[str]:
    """Yield the callables that docs/api.md lists and that take arguments, methods as ``Class.method``."""
    blocks = re.split(r"\n\n", API.read_text())
    for block in blocks:
        if found := re.match(r"(?:```{eval-rst}\n)?\.\. autofunction:: (\w+)", block):
            yield found.group(1)
        if not (found := re.match(r"(?:```{eval-rst}\n)?\.\. autoclass:: (\w+)(\(\))?", block)):
            continue
        name, closed = found.groups()
        kind = getattr(pe, name)
        if not closed and not inspect.isabstract(kind):
            yield name
        yield from (f"{name}.{method}" for method in _methods(kind, block))


def _methods(kind: type, block: str) -> Iterator[str]:
    listed = re.search(r":members:(.*)", block)
    special = re.findall(r":special-members: (.*)", block)
    if listed is None:
        return
    names = [x.strip() for x in listed.group(1).split(",") if x.strip()]
    names = names or [n for n in vars(kind) if not n.startswith("_")]
    for name in [*names, *special]:
        method = inspect.getattr_static(kind, name)
        if inspect.isfunction(method) and len(inspect.signature(method).parameters) > 1:
            yield f"{name}"
