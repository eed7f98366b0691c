"""Draws from the fitted guide, their importance weights, and the export to ArviZ.

Takes model, guide and data; gives ``Draws`` with log p and log q, Pareto-smoothed weights, k-hat, leave-one-out,
draws and predictions as labeled arrays, ArviZ's groups, linear response, and the KL between a guide before and after
it moved.
Imports terms and below.
"""

from pyro_elbo.posterior.arviz import to_arviz, to_container
from pyro_elbo.posterior.draws import Draws
from pyro_elbo.posterior.importance import ParetoK, judge, loo, pareto_k
from pyro_elbo.posterior.layout import lead
from pyro_elbo.posterior.linear_response import linear_response
from pyro_elbo.posterior.predict import label_arrays, label_latents, predict_data, sample_guide
from pyro_elbo.posterior.response import LinearResponse
from pyro_elbo.posterior.symmetrized_kl import SymmetrizedKL

__all__ = [
    "Draws",
    "LinearResponse",
    "ParetoK",
    "SymmetrizedKL",
    "judge",
    "label_arrays",
    "label_latents",
    "lead",
    "linear_response",
    "loo",
    "pareto_k",
    "predict_data",
    "sample_guide",
    "to_arviz",
    "to_container",
]
