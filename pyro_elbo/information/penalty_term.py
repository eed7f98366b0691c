"""The value of a penalty at one step, and the gradients of its critic."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pyro_elbo.information.critics import Critic
from pyro_elbo.ranks import mean_of_parts
from pyro_elbo.terms import Terms


@dataclass(frozen=True, repr=False)
class PenaltyTerm:
    """The contribution of one penalty to the objective, with its direction and bracket.

    Attributes:
        nats: the penalized value, per datum (dimensionless for ``hsic``), with its gradient.
        direction: how the value relates to the truth in expectation: ``"upper"`` or ``"lower"`` bound, ``"upper, up to
            a constant"``, ``"debiased"``, or ``"index"``: zero at independence, but not an information.
        low, high: two estimates, with expectations below and above the truth; None where the estimator has none.
        margins: sampling error below ``low`` and above ``high``, over rows.
        weight: λ at this step.
        scale: number of rows of the full data.
        critic, critic_loss: the network that the estimator trains beside the programs, and its loss.
    """

    nats: Float[Tensor, ""]
    direction: str
    low: Float[Tensor, ""] | None = None
    high: Float[Tensor, ""] | None = None
    margins: Float[Tensor, "2"] | None = None
    weight: float | Tensor = 0.0
    scale: float | Tensor = 1.0
    critic: Critic | None = None
    critic_loss: Float[Tensor, ""] | None = None

    def __repr__(self) -> str:
        bracket = "" if self.bracket is None else ", bracket {:.4g} to {:.4g}".format(*self.bracket)
        return f"PenaltyTerm({_number(self.nats):.4g}, {self.direction}{bracket}, weight {_number(self.weight):g})"

    @property
    def bracket(self) -> tuple[float, float] | None:
        """An interval that holds the truth in at least 95 % of batches of 128 rows and more; None without estimates."""
        if self.low is None or self.high is None or self.margins is None:
            return None
        below, above = self.margins.tolist()
        return self.low.item() - below, self.high.item() + above

    @property
    def cost(self) -> Float[Tensor, ""]:
        """The share of the objective: λ N I, in nats."""
        return self.weight * self.scale * self.nats


def critic_gradients(terms: Terms) -> Iterator[tuple[Critic, list[Tensor]]]:
    """Yield each penalty's critic with the gradient of its loss, in the order of its parameters."""
    for penalty in terms.penalties.values():
        if isinstance(penalty, PenaltyTerm) and penalty.critic is not None and penalty.critic_loss is not None:
            parameters = list(penalty.critic.network.parameters())
            yield penalty.critic, mean_of_parts(list(torch.autograd.grad(penalty.critic_loss, parameters)))


def _number(x: float | Tensor) -> float:
    return x.item() if isinstance(x, Tensor) else float(x)
