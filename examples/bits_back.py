"""Compress images with a VAE, at the length that its bound promises, and give them back bit for bit.

Bits-back coding with an entropy coder that works as a stack. To store an image x, the sender takes bits off the stack
to choose a latent z from q(z | x), then puts x on it by p(x | z), and z by p(z). The receiver undoes the three steps in
reverse, and with them returns the bits that chose z: an image costs log2 q(z | x) - log2 p(x, z) bits, on average
-ELBO / ln 2. Only the first image needs bits that were there before.

The images are the 8 x 8 digits of scikit-learn (counts 0 to 16); q and p live on a grid, finer than q is wide. Run with
``python -m examples.bits_back``; it needs the extra ``coding`` (the library ``constriction``). Figure and code are
saved to ``runs/bits_back/``.
"""

import argparse
import bz2
import importlib.util
import lzma
import zlib
from pathlib import Path
from typing import NamedTuple

import constriction
import numpy as np
import pyro
import torch
from jaxtyping import Float
from torch import Tensor

import pyro_elbo as pe
from models.sequences import digits
from models.vae import VAEGuide, VAEModel

TOTAL = 16
STEP = 1 / 64  # width of the grid of z
REACH = 8  # the grid ends at 8 standard deviations of the prior
WORD = 32  # bits that the coder stores at once
INITIAL_WORDS = 16
EDGE = 1e-4  # pixels keep this chance of either side, so that no count costs infinitely many bits
SIZES = {"z_dim": 8, "hidden": 128, "total": TOTAL}


class Compressed(NamedTuple):
    """The code of some images: 32-bit words, how many there were before, and the bits after each image."""

    words: np.ndarray
    initial_bits: int
    bits: list[int]


class Codec:
    """The three distributions of a VAE for an entropy coder, on the grid of z."""

    def __init__(self, model: VAEModel, guide: VAEGuide) -> None:
        # One image at a time, in double precision: both directions must compute the very same numbers.
        self.decoder, self.guide = model.decoder.double().eval(), guide.double().eval()
        last = round(REACH / STEP)
        self.grid = constriction.stream.model.QuantizedGaussian(-last, last)
        self.pixels = constriction.stream.model.Binomial(TOTAL)
        self.prior = np.zeros(model.z_dim), np.full(model.z_dim, 1 / STEP)

    def posterior(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of q(z | x), in steps of the grid."""
        with torch.no_grad():
            loc, scale = self.guide.encode(torch.tensor(x, dtype=torch.float64)[None])
        return loc[0].numpy() / STEP, scale[0].numpy() / STEP

    def likelihood(self, z: np.ndarray) -> np.ndarray:
        """Success probabilities of p(x | z), for z in steps of the grid."""
        with torch.no_grad():
            p = self.decoder(torch.tensor(z * STEP)[None])[0].sigmoid()
        return p.clamp(EDGE, 1 - EDGE).numpy()

    def compress(self, images: np.ndarray, seed: int) -> Compressed:
        """Put the images on a stack of random bits."""
        words = np.random.default_rng(seed).integers(2**WORD, size=INITIAL_WORDS, dtype=np.uint64).astype(np.uint32)
        coder = constriction.stream.stack.AnsCoder(words, seal=True)
        initial, bits = coder.num_bits(), []
        for x in images:
            z = coder.decode(self.grid, *self.posterior(x))
            coder.encode_reverse(x, self.pixels, self.likelihood(z))
            coder.encode_reverse(z, self.grid, *self.prior)
            bits.append(coder.num_bits())
        return Compressed(coder.get_compressed(), initial, bits)

    def decompress(self, code: Compressed, count: int) -> tuple[np.ndarray, int]:
        """Return the images, and the bits that are left: those that were there before."""
        coder, images = constriction.stream.stack.AnsCoder(code.words), []
        for _ in range(count):
            z = coder.decode(self.grid, *self.prior)
            x = coder.decode(self.pixels, self.likelihood(z))
            coder.encode_reverse(z, self.grid, *self.posterior(x))
            images.append(x)
        return np.stack(images[::-1]), coder.num_bits()


def train(x: Tensor, epochs: int, seed: int, out: Path) -> tuple[VAEModel, VAEGuide]:
    torch.manual_seed(seed)  # for the initial weights; pe.fit has its own seed
    model, guide = VAEModel(**SIZES), VAEGuide(**SIZES)
    options = {"lr": 3e-3, "max_epochs": epochs, "batch_size": 100, "seed": seed, "dir": out, "overwrite": True}
    pe.fit(model, guide, x, **options)
    return model, guide


def others(images: np.ndarray) -> dict[str, float]:
    """Bits per image of other compressors, on all images as one string of bytes."""
    raw = images.astype(np.uint8).tobytes()
    sizes = {"zlib": zlib.compress(raw, 9), "bz2": bz2.compress(raw, 9), "lzma": lzma.compress(raw)}
    counts = np.bincount(images.ravel(), minlength=TOTAL + 1) / images.size
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum() * images.shape[1]
    return {name: 8 * len(x) / len(images) for name, x in sizes.items()} | {"entropy of counts": entropy}


def draw(code: Compressed, promised: float, sizes: dict[str, float], path: Path) -> None:
    """Plot the bits of the stack over the images beside those promised, and the sizes of other compressors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=[1.3, 1])
    n = np.arange(1, len(code.bits) + 1)
    left.plot(n, np.array(code.bits) / 8000, color="#1f5fa8", lw=2, label="length of the code")
    left.plot(
        n, (code.initial_bits + promised * n) / 8000, color="#b3452c", ls="--", label="initial bits − ELBO / ln 2"
    )
    left.set(xlabel="test images", ylabel="kB")
    left.legend(frameon=False)
    right.barh(list(sizes), list(sizes.values()), color=["#1f5fa8", *["#9aa5b1"] * (len(sizes) - 1)])
    right.invert_yaxis()
    right.set(xlabel="bits per image")
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def split(seed: int) -> tuple[Float[Tensor, "n 64"], Float[Tensor, "m 64"]]:
    x = digits().flatten(1)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return x[order[:1400]], x[order[1400:]]


def main(out: Path, *, seed: int = 0, smoke_test: bool = False) -> None:
    trained, test = split(seed)
    model, guide = train(trained, 10 if smoke_test else 150, seed, out)
    pyro.set_rng_seed(seed)
    model, guide, test = model.double(), guide.double(), test.double()
    loss = pe.TraceBeta_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        length = pe.code_length(loss.terms(model.eval(), guide.eval(), test))
    print(length)

    images, codec = test.numpy().astype(np.int32), Codec(model, guide)
    code = codec.compress(images, seed)
    back, left = codec.decompress(code, len(images))
    net = (code.bits[-1] - code.initial_bits) / len(images)
    sizes = {"bits back": net, **others(images)}
    print("\nbits per test image: " + ", ".join(f"{name} {bits:.1f}" for name, bits in sizes.items()))
    code.words.tofile(out / "digits.ans")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(code, length.per_datum, sizes, out / "bits_back.png")

    excess = code.bits[-1] / (length.total + code.initial_bits) - 1
    exact = np.array_equal(back, images) and left == code.initial_bits
    print(
        f"\n{len(images)} images in {code.bits[-1]} bits; promised {length.total:.0f} + {code.initial_bits} initial "
        f"bits: {excess:+.2%}; given back bit for bit: {exact}"
    )
    assert exact, "the images and the initial bits must come back"
    # A model in its first epochs finds some counts next to impossible; the coder grants each a chance of 2^-24.
    assert excess < 0.01, f"the code must not be longer than promised by 1 %, got {excess:+.2%}"
    assert smoke_test or excess > -0.01, f"the code must have the promised length within 1 %, got {excess:+.2%}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bits_back"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke-test", action="store_true", help="few epochs: the same claim, at a longer code")
    args = parser.parse_args()
    main(args.out, seed=args.seed, smoke_test=args.smoke_test)
