"""Every model trains from every seed: no NaN, and a bound that rises."""

import pyro
import pytest
import torch

import pyro_elbo as pe
from models.conditional_vae import ConditionalVAE
from models.dmm import DMM
from models.fair_vae import FairVAE
from models.srnn import SRNN
from models.ss_vae import SSVAE
from models.vae import VAEGuide, VAEModel
from models.vrnn import VRNN, MarkovVRNN
from tests.support.rows import every_other, thorough

frames = torch.rand(12, 6, 8, generator=torch.Generator().manual_seed(0)).gt(0.6).float()
lengths = torch.arange(12) % 6 + 1
counts = torch.randint(0, 17, (40, 64), generator=torch.Generator().manual_seed(0)).float()
classes = torch.arange(40) % 2


def sequential(kind):
    """A sequence model of 8 pixels, on ragged data."""
    return lambda: (kind(8, 3), (frames, lengths))


def vae():
    return (VAEModel(64, 3, 16), VAEGuide(64, 3, 16)), (counts,)


def fair_vae():
    return FairVAE(64, {}, z_dim=3, hidden=(16,), target=False), (counts / 16, classes)


MODELS = {
    "DMM": sequential(DMM),
    "SRNN": sequential(SRNN),
    "VRNN": sequential(VRNN),
    "MarkovVRNN": sequential(MarkovVRNN),
    "VAE": vae,
    "FairVAE": fair_vae,
    "SSVAE": lambda: (SSVAE(64, 2, z_dim=3, hidden=16), (counts, torch.where(classes == 0, 0, -1))),
    "ConditionalVAE": lambda: (ConditionalVAE(64, 2, z_dim=3, hidden=16), (counts, classes)),
}
SEEDS = [0, *map(thorough, range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lr", every_other([0.1, 0.01]))
@pytest.mark.parametrize("name", MODELS)
def test_trains_from_every_seed(name, lr, seed):
    pyro.set_rng_seed(seed)
    programs, args = MODELS[name]()
    model, guide = programs if isinstance(programs, tuple) else (programs.model, programs.guide)
    svi = pe.SVI(model, guide, pyro.optim.Adam({"lr": lr}), pe.TraceBeta_ELBO())
    losses = svi.run(100 if seed else 15, *args, progress=False)
    assert losses[-5:].mean() < losses[:5].mean()
