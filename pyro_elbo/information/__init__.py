"""Penalties on the information that a latent carries, and their estimators.

Takes ``Terms`` and the programs' arguments; gives ``PenaltyTerm``: a value with its direction and bracket.
``penalties`` holds the public penalties, ``estimators`` the formulas, ``aggregate`` the densities of q(z), ``critics``
the trained networks.
Imports terms and below.
"""

from pyro_elbo.information.aggregate import AggregatePosterior, Mixture, in_blocks
from pyro_elbo.information.critics import Critic
from pyro_elbo.information.estimators import AttributeSource, PenaltyContext, information_on_data
from pyro_elbo.information.penalties import (
    Estimator,
    MutualInformation,
    Penalty,
    TotalCorrelation,
    check_penalties,
)
from pyro_elbo.information.penalty_term import PenaltyTerm, critic_gradients

__all__ = [
    "Critic",
    "AggregatePosterior",
    "Estimator",
    "AttributeSource",
    "Mixture",
    "MutualInformation",
    "Penalty",
    "PenaltyContext",
    "PenaltyTerm",
    "TotalCorrelation",
    "check_penalties",
    "critic_gradients",
    "in_blocks",
    "information_on_data",
]
