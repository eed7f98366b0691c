import pyro
import pytest
import torch

import pyro_elbo as pe
from models.hmm import HMM


@pytest.mark.parametrize("symbols", [None, 4])
@pytest.mark.parametrize("lengths", [None, [20, 3, 1, 11]])
def test_the_bound_is_the_evidence_and_training_raises_it(symbols, lengths):
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    hmm = HMM(3, symbols)
    x = torch.randn(4, 20) if symbols is None else torch.randint(0, 4, (4, 20))
    lengths = None if lengths is None else torch.tensor(lengths)
    evidence = hmm.log_evidence(x, lengths).sum()
    terms = pe.TraceBeta_ELBO().terms(hmm.model, hmm.guide, x, lengths)
    torch.testing.assert_close(terms.elbo, evidence, rtol=1e-10, atol=0)
    assert terms.posterior["k"].shape == (4, 20, 3)
    pe.SVI(hmm.model, hmm.guide, pyro.optim.Adam({"lr": 0.05}), pe.TraceBeta_ELBO()).run(10, x, lengths, progress=False)
    assert hmm.log_evidence(x, lengths).sum() > evidence + 1


def test_vectors_have_the_evidence_of_their_channels_and_padding_has_none():
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    hmm, x, lengths = HMM(3, channels=2), torch.randn(4, 6, 2), torch.tensor([6, 2, 4, 1])
    hmm.start_from([torch.randn(5, 2) for _ in range(3)])
    evidence = hmm.log_evidence(x, lengths)
    x[1, 2:] = torch.nan
    torch.testing.assert_close(hmm.log_evidence(x, lengths), evidence)
    torch.testing.assert_close(pe.TraceBeta_ELBO().terms(hmm.model, hmm.guide, x, lengths).elbo, evidence.sum())
