r"""A convolutional variational autoencoder of image patches, with a Laplace or a Gaussian likelihood.

    z_n ~ Normal(0, I),     x_n | z_n ~ Laplace(image(z_n), b)   or   Normal(image(z_n), b²),  independent over pixels
    q(z_n | x_n) = Normal(mean(x_n), diag(scale(x_n)²))

A pixel that is off by r costs |r| / b nats under Laplace and r² / 2b² under Normal. A scratch puts many pixels far off:
its cost grows with the square under Normal, so that latents pay for drawing scratches, and with r alone under Laplace.
Kingma, Welling (2014), arXiv:1312.6114; Kalinin, Dyck, Jesse, Ziatdinov (2021), Exploring order parameters and dynamic
processes in disordered systems via variational autoencoders, Science Advances 7.
"""

from dataclasses import dataclass
from os import PathLike
from typing import Literal

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from jaxtyping import Float, Int
from scipy.ndimage import gaussian_filter, map_coordinates, maximum_filter
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.nn.functional import softplus

SIDE = 16  # pixels of a patch
KINDS = ("regular", "vacancy", "brighter atom", "dimmer atom", "interstitial")
SMALLEST_SCALE = 1e-2  # of pixels with a standard deviation near 1

Likelihood = Literal["laplace", "gaussian"]
LIKELIHOODS = {"laplace": dist.Laplace, "gaussian": dist.Normal}


class PatchVAE(nn.Module):
    """Model and guide of patches of 16 x 16 pixels: ``model(x)`` and ``guide(x)``.

    Args:
        likelihood: of the pixels, with one scale for all.
        z_dim: latent dimensions.
        channels: of the first convolution; the second has twice as many.
    """

    def __init__(self, likelihood: Likelihood, *, z_dim: int = 4, channels: int = 8) -> None:
        super().__init__()
        if likelihood not in LIKELIHOODS:
            raise ValueError(f"likelihood must be one of {sorted(LIKELIHOODS)}, got {likelihood!r}.")
        self.likelihood, self.z_dim = LIKELIHOODS[likelihood], z_dim
        narrow, corner = 2 * channels, SIDE // 4
        self.encoder = nn.Sequential(
            nn.Conv2d(1, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(channels, narrow, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(narrow * corner**2, 2 * z_dim),
        )
        self.decoder = nn.Sequential(
            nn.Linear(z_dim, narrow * corner**2),
            nn.SiLU(),
            nn.Unflatten(-1, (narrow, corner, corner)),
            nn.ConvTranspose2d(narrow, channels, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(channels, 1, 4, stride=2, padding=1),
        )
        self.raw_scale = nn.Parameter(torch.zeros(()))

    def model(self, x: Float[Tensor, "n {SIDE} {SIDE}"]) -> Float[Tensor, "*particles n {SIDE} {SIDE}"]:
        pyro.module("patches", self)
        with pyro.plate("sites", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.z_dim), 1.0).to_event(1))
            image = self.decode(z)
            pyro.sample("x", self.likelihood(image, self.scale).to_event(2), obs=x)
        return image

    def guide(self, x: Float[Tensor, "n {SIDE} {SIDE}"]) -> Float[Tensor, "*particles n z_dim"]:
        pyro.module("patches", self)
        with pyro.plate("sites", len(x)):
            return pyro.sample("z", dist.Normal(*self.encode(x)).to_event(1))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The scale b of the pixels."""
        return softplus(self.raw_scale) + SMALLEST_SCALE

    def encode(self, x: Float[Tensor, "n {SIDE} {SIDE}"]) -> tuple[Float[Tensor, "n z_dim"], Float[Tensor, "n z_dim"]]:
        """Mean and standard deviation of q(z | x)."""
        loc, raw = self.encoder(x.unsqueeze(1)).chunk(2, -1)
        return loc, softplus(raw) + 1e-3

    def decode(self, z: Float[Tensor, "*particles n z_dim"]) -> Float[Tensor, "*particles n {SIDE} {SIDE}"]:
        """The mean image of z."""
        return self.decoder(z.flatten(0, -2)).squeeze(1).unflatten(0, z.shape[:-1])


@dataclass(frozen=True)
class Lattice:
    """Patches of a triangular lattice of atoms, with a known kind of site in the center of each, noise and scratches.

    An atom is a Gaussian blob of height 1. The site in the center is regular, empty, 60 % brighter, 50 % dimmer, or
    has a further atom half way to a neighbor. Counts are Poisson(dose · intensity). A scratch is a bright straight
    line across the patch. The five kinds are equally frequent, and scratches independent of them.

    Attributes:
        spacing: distance of neighbors, pixels.
        width: standard deviation of a blob, pixels.
        dose: counts per pixel at an intensity of 1.
        jitter: standard deviation of the lattice's position in each direction, pixels.
        scratched: share of scratched patches.
        brightness: intensity of a scratch.
    """

    spacing: float = 8.0
    width: float = 1.6
    dose: float = 20.0
    jitter: float = 0.2
    scratched: float = 0.4
    brightness: float = 5.0

    def draw(self, n: int, seed: int) -> tuple[Float[Tensor, "n {SIDE} {SIDE}"], Int[Tensor, " n"]]:
        """Draw patches in units of their standard deviation without scratches, and the kinds of their centers."""
        generator = torch.Generator().manual_seed(seed)
        kinds = torch.randint(len(KINDS), (n,), generator=generator)
        shift = self.jitter * torch.randn(n, 2, generator=generator)
        clean = self.image(kinds, shift)
        angle, offset, luck = torch.rand(3, n, 1, 1, generator=generator)
        y, x = grid()
        distance = torch.cos(np.pi * angle) * x + torch.sin(np.pi * angle) * y - SIDE * (offset - 0.5)
        scratch = self.brightness * (luck < self.scratched) * torch.exp(-distance.square() / (2 * 0.5**2))
        noisy = torch.poisson(self.dose * (clean + scratch), generator=generator) / self.dose
        spread = (clean.var() + clean.mean() / self.dose).sqrt()
        return (noisy - clean.mean()) / spread, kinds

    def image(self, kinds: Int[Tensor, " n"], shift: Float[Tensor, "n 2"]) -> Float[Tensor, "n {SIDE} {SIDE}"]:
        """Intensity without noise and scratches, over a background of 0.1."""
        steps = torch.arange(-3.0, 4.0)
        i, j = (x.flatten() for x in torch.meshgrid(steps, steps, indexing="ij"))
        atoms = self.spacing * torch.stack([3**0.5 / 2 * i, j + i / 2], 1)
        extra = torch.tensor([[0.0, self.spacing / 2]])
        heights = torch.ones(len(kinds), len(atoms) + 1)
        heights[:, len(atoms) // 2] = torch.tensor([1.0, 0.0, 1.6, 0.5, 1.0])[kinds]
        heights[:, -1] = (kinds == KINDS.index("interstitial")).float()
        y, x = grid()
        places = torch.cat([atoms, extra])[:, None, None] + shift[:, None, None, None]
        square = (y - places[..., 0]).square() + (x - places[..., 1]).square()
        return 0.1 + torch.einsum("na,nayx->nyx", heights, torch.exp(-square / (2 * self.width**2)))


def grid() -> tuple[Float[Tensor, "{SIDE} 1"], Float[Tensor, "1 {SIDE}"]]:
    """Rows and columns of a patch in pixels, 0 in its center."""
    along = torch.arange(SIDE) - (SIDE - 1) / 2
    return along[:, None], along[None]


def find_sites(image: np.ndarray, blur: float = 3.0) -> np.ndarray:
    """Return the places (row, column) of all sites of a triangular lattice, occupied or not, in pixels.

    Bright spots are numbered from the middle outwards, each beside a numbered neighbor. A cubic polynomial from numbers
    to places, fitted to them, follows the drift of the microscope and also places the sites without a spot.
    """
    smooth = gaussian_filter(image.astype(float), blur)
    peaks = (smooth == maximum_filter(smooth, int(4 * blur) + 1)) & (smooth > gaussian_filter(smooth, 10 * blur))
    spots = np.argwhere(peaks).astype(float)
    numbers = number_spots(spots, lattice_steps(spots))
    found = spots[list(numbers)]
    indices = np.array(list(numbers.values()))
    coefficients = np.linalg.lstsq(cubic(indices), found, rcond=None)[0]
    reach = np.abs(indices).max() + 1
    every = np.argwhere(np.ones((2 * reach + 1,) * 2)) - reach
    every = every[nearest(every, indices)[0] < 1.5]  # a polynomial means nothing far from the spots that made it
    places = cubic(every) @ coefficients
    return places[((places >= SIDE) & (places < np.array(image.shape) - SIDE)).all(1)]


def lattice_steps(spots: np.ndarray) -> np.ndarray:
    """Return the six steps to a neighbor: the medians of what lies around spots, 60 degrees apart."""
    steps = (spots[nearest(spots, spots, 7)[1][:, 1:]] - spots[:, None]).reshape(-1, 2)
    angles = np.arctan2(steps[:, 0], steps[:, 1])
    start = np.angle(np.exp(6j * angles).mean()) / 6
    sector = np.round((angles - start) / (np.pi / 3)).astype(int) % 6
    first, second = np.median(steps[sector == 0], 0), np.median(steps[sector == 1], 0)
    return np.stack([first, second, second - first, -first, -second, first - second])


def number_spots(spots: np.ndarray, steps: np.ndarray) -> dict[int, tuple[int, int]]:
    """Number spots by walking from the middle one to neighbors that lie within a quarter of a step of their place."""
    tree, limit = cKDTree(spots), np.linalg.norm(steps[0]) / 4
    moves = [(1, 0), (0, 1), (-1, 1), (-1, 0), (0, -1), (1, -1)]
    start = int(tree.query(spots.mean(0))[1])
    numbers, waiting = {start: (0, 0)}, [start]
    while waiting:
        spot = waiting.pop(0)
        distances, neighbors = tree.query(spots[spot] + steps)
        for distance, neighbor, move in zip(distances, neighbors, moves, strict=True):
            if distance < limit and int(neighbor) not in numbers:
                numbers[int(neighbor)] = (numbers[spot][0] + move[0], numbers[spot][1] + move[1])
                waiting.append(int(neighbor))
    return numbers


def cubic(indices: np.ndarray) -> np.ndarray:
    """Return the monomials of two numbers up to degree three."""
    i, j = indices.T.astype(float) / 20
    return np.stack([i**a * j**b for a in range(4) for b in range(4 - a)], 1)


def nearest(places: np.ndarray, among: np.ndarray, count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and numbers of the nearest of ``among`` to every place."""
    return cKDTree(among).query(places, count)


def cut_patches(image: np.ndarray, sites: np.ndarray, step: float = 1.5) -> Float[Tensor, "n {SIDE} {SIDE}"]:
    """Return patches centered on the sites, ``step`` pixels of the image a pixel, in standard deviations.

    A blur of half a step suppresses what the coarser grid cannot show, and one of 60 pixels is taken off as uneven
    background.
    """
    level = gaussian_filter(image, step / 2) - gaussian_filter(image, 60.0)
    along = step * (np.arange(SIDE) - (SIDE - 1) / 2)
    offsets = np.stack(np.meshgrid(along, along, indexing="ij"))
    values = map_coordinates(level, sites.T[:, :, None, None] + offsets[:, None], order=1)
    return torch.from_numpy(((values - values.mean()) / values.std()).astype(np.float32))


def load_mos2(path: str | PathLike) -> tuple[np.ndarray, float]:
    """A dark-field image of MoS2 (rows x columns, 0 to 1) and the width of a pixel in nanometers."""
    with np.load(path, allow_pickle=False) as data:
        return data["image"] / 65535, float(data["pixel_nm"])


def brightness(image: np.ndarray, sites: np.ndarray) -> np.ndarray:
    """Return how bright sites are: blurred intensity less the median of 25 sites around, in robust deviations."""
    blurred = gaussian_filter(image, 4.0)[tuple(np.round(sites).astype(int).T)]
    excess = blurred - np.median(blurred[nearest(sites, sites, 25)[1]], 1)
    return excess / (1.4826 * np.median(np.abs(excess)))
