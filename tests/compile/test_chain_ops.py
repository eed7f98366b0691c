"""The loops over the paths of a discrete state: equal to sums of logarithms, linear in time."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_elbo as pe
from pyro_elbo.compile.scan.chain_ops import captured_messages
from pyro_elbo.terms import messages
from tests.programs_discrete import nothing
from tests.support.compiled import _graphs, _interpreted  # noqa: F401  (fixtures)

NEVER = -torch.inf


def factors(steps, rows, dtype=torch.float64):
    """Log factors of 7 steps, 5 rows, 4 states: impossible transitions, data that exclude states, and all of them."""
    torch.manual_seed(0)
    pair = 3 * torch.randn(steps, rows, 4, 4, dtype=dtype)
    node = 5 * torch.randn(7, 5, 4, dtype=dtype)
    pair[..., 1, 2] = pair[..., 3, :3] = NEVER
    node[3, 2] = torch.tensor([0.0, -900, -1800, -2700])
    node[2, 1, 0] = NEVER
    node[4, 4] = NEVER
    return pair, node


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("rows", [1, 5])
def test_messages_and_averages_equal_sums_of_logarithms(steps, rows):
    pair, node = factors(steps, rows)
    exact, found = messages(pair, node), captured_messages(pair, node)
    torch.testing.assert_close(tuple(found), tuple(exact), rtol=1e-12, atol=1e-11)
    x = torch.randn(steps, rows, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(7, 5, dtype=torch.float64)
    means = [chain.average(x) for chain in (found, exact)]
    torch.testing.assert_close(*means, rtol=1e-10, atol=1e-12)
    gradients = [torch.autograd.grad((weights * mean).sum(), x)[0] for mean in means]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_a_path_that_the_scale_of_one_step_forgets_is_found_again():
    """The state never changes, and data speak for the first until later ones speak for the second."""
    pair = torch.full((1, 1, 3, 3), NEVER)
    pair[..., 0, :2], pair[..., 1, 1], pair[..., 2, 2] = torch.tensor(0.5).log(), 0.0, 0.0
    node = torch.zeros(6, 1, 3)
    node[1:3, :, 1], node[3:, :, 0] = -200.0, -400.0
    pair[..., 0, 1] = NEVER
    pair = torch.cat([pair] * 6).clone()
    pair[0, 0, 0, 1] = torch.tensor(0.5).log()  # to state 1 in the first step only
    chain = captured_messages(pair, node)
    torch.testing.assert_close(chain.increments.sum(), torch.tensor(0.5).log() - 400, rtol=1e-6, atol=0)
    torch.testing.assert_close(chain.average((pair > NEVER).float()), torch.ones(6, 1))
    exact = messages(pair.double(), node.double())
    torch.testing.assert_close(chain.increments.double(), exact.increments, rtol=1e-5, atol=1e-4)


def test_single_precision_over_ten_thousand_steps():
    torch.manual_seed(0)
    pair, node = torch.randn(1, 1, 3, 3).log_softmax(-1), 10 * torch.randn(10_000, 1, 3)
    single, double = captured_messages(pair, node), messages(pair.double(), node.double())
    torch.testing.assert_close(single.increments.double(), double.increments, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.average(pair).double(), double.average(pair.double()), rtol=1e-4, atol=1e-5)


def hmm(x):
    logits, loc = pyro.param("step", lambda: torch.randn(3, 3)), pyro.param("loc", lambda: torch.randn(3))

    def step(k, x_t):
        k = pyro.sample("k", dist.Categorical(logits=logits[k]), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(loc[k], 1.0), obs=x_t)
        return k, None

    with pyro.plate("sequences", x.shape[1]):
        pe.scan(step, torch.tensor(0), x)


def test_no_tensor_of_a_graph_has_steps_and_sequences_and_pairs_of_states(interpreted, graphs):
    """Memory is linear in T · sequences · K, and neither the graph nor its compilation grows with T."""
    nodes = []
    for total in (11, 23):
        pyro.clear_param_store()
        pe.SVI(hmm, nothing, pyro.optim.SGD({"lr": 1e-3}), pe.TraceBeta_ELBO(), compile=True).run(
            2, torch.zeros(total, 13), progress=False
        )
        found = [n for n in graphs[-1].module.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        sizes = {n: n.meta["val"].numel() for n in found}
        assert max(sizes.values()) < total * 13 * 3 * 3, [n for n in found if sizes[n] >= total * 13 * 9]
        assert sum("pyro_elbo.messages" in str(n.target) for n in graphs[-1].module.graph.nodes) == 1
        nodes.append(len(graphs[-1].module.graph.nodes))
    assert nodes[0] == nodes[1]
