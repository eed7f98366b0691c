"""Draws from the fitted guide, their importance weights, and the export to ArviZ.

Takes model, guide and data; gives ``Draws`` with log p and log q, all at once or in chunks, how densities add up
(``Weighting``), Pareto-smoothed weights, k-hat, leave-one-out, draws and predictions as labeled arrays, ArviZ's groups,
linear response, the most probable discrete latents, and the KL between a guide before and after it moved.
Imports terms and below.
"""

from pyro_elbo.posterior.arviz import to_arviz, to_container
from pyro_elbo.posterior.draws import Draws, draw_in_chunks
from pyro_elbo.posterior.importance import ParetoK, judge, loo, pareto_k
from pyro_elbo.posterior.infer_discrete import infer_discrete
from pyro_elbo.posterior.layout import lead
from pyro_elbo.posterior.linear_response import linear_response
from pyro_elbo.posterior.predict import label_arrays, label_latents, predict_data, sample_guide
from pyro_elbo.posterior.psis import format_k
from pyro_elbo.posterior.response import LinearResponse
from pyro_elbo.posterior.symmetrized_kl import SymmetrizedKL
from pyro_elbo.posterior.weights import Weighting, find_weighting, is_discrete, sum_plates

__all__ = [
    "Draws",
    "LinearResponse",
    "ParetoK",
    "SymmetrizedKL",
    "Weighting",
    "draw_in_chunks",
    "find_weighting",
    "format_k",
    "infer_discrete",
    "is_discrete",
    "judge",
    "label_arrays",
    "label_latents",
    "lead",
    "linear_response",
    "loo",
    "pareto_k",
    "predict_data",
    "sample_guide",
    "sum_plates",
    "to_arviz",
    "to_container",
]
