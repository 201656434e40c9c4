"""Synthesized sounds whose pitch and vowels are known, and their spectrograms. Waves are (t,) in [-1, 1]."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tfkit.data._base import at_least, generator, one_of, uniform

__all__ = ["INSTRUMENTS", "RATE", "VOWELS", "Utterances", "note", "spectrogram", "utterances", "vowel"]

RATE = 8000  # samples a second
# Three formants of men's vowels in Hz. Source: "Control Methods Used in a Study of the Vowels", 1952, table II.
VOWELS = {
    "i": (270, 2290, 3010), "ae": (660, 1720, 2410), "a": (730, 1090, 2440), "u": (300, 870, 2240),
    "er": (490, 1350, 1690),
}  # fmt: skip
# instrument: (amplitude of harmonic k is k ** -slope, only odd harmonics, decay a second)
INSTRUMENTS = {"flute": (3.0, False, 0.0), "clarinet": (1.0, True, 0.0), "string": (1.0, False, 4.0)}


def _harmonics(pitch: Tensor | float, seconds: float, gain) -> Tensor:
    """The sum over k of gain(k, k pitch) sin(2 pi k phase), harmonics below RATE / 2, highest absolute value 1."""
    at_least(1e-3, seconds=seconds)
    t = torch.arange(round(seconds * RATE)) / RATE
    pitch = torch.as_tensor(pitch, dtype=torch.float64).expand(len(t))
    if not 20 <= float(pitch.min()) or not float(pitch.max()) < RATE / 2:
        raise ValueError(
            f"pitch must be between 20 and {RATE / 2} Hz, got {float(pitch.min())} to {float(pitch.max())}"
        )
    phase = 2 * torch.pi * (pitch.cumsum(0) - pitch[0]) / RATE  # the integral of the pitch
    k = torch.arange(1, int(RATE / 2 / float(pitch.max())) + 1, dtype=torch.float64).unsqueeze(1)  # (k, 1)
    wave = (gain(k, k * pitch) * (k * phase).sin()).sum(0)
    return (wave / wave.abs().max().clamp(min=1e-9)).float()


def note(pitch: Tensor | float = 220.0, seconds: float = 0.5, instrument: str = "string") -> Float[Tensor, "t"]:
    """A musical tone of known pitch, in Hz a number or a curve (t,): vibrato and glides keep their phase.

    `INSTRUMENTS` says how its harmonics fall and how it decays. Raises ValueError for a pitch outside 20 to 4000 Hz.
    """
    one_of("instrument", instrument, INSTRUMENTS)
    slope, odd, decay = INSTRUMENTS[instrument]
    wave = _harmonics(pitch, seconds, lambda k, f: k**-slope * ((k % 2 == 1) | (not odd)))
    return wave * (-decay * torch.arange(len(wave)) / RATE).exp()


def vowel(name: str = "a", pitch: Tensor | float = 120.0, seconds: float = 0.2) -> Float[Tensor, "t"]:
    """A vowel by its formants: harmonics of the voice (falling as 1 / k) through three resonances 80 Hz wide.

    The gain at frequency f is the product of F^2 / |F^2 - f^2 + i 80 f| over the formants F in `VOWELS`.
    """
    one_of("vowel", name, VOWELS)

    def gain(k: Tensor, f: Tensor) -> Tensor:
        out = 1 / k
        for F in VOWELS[name]:
            out = out * F**2 / torch.hypot(F**2 - f**2, 80 * f)
        return out

    return _harmonics(pitch, seconds, gain)


class Utterances(NamedTuple):
    """Waves, the vowel in each place as an index into `VOWELS`, and the pitch of each voice in Hz."""

    waves: Float[Tensor, "b t"]
    vowels: Int[Tensor, "b n"]
    pitch: Float[Tensor, "b"]


def utterances(count: int, length: int = 4, seconds: float = 0.12, seed: int = 0) -> Utterances:
    """Speech-like: `length` vowels one after the other, each faded in and out, in a voice of 90 to 220 Hz; level 0.5.

    Raises ValueError for counts below 1 or a vowel shorter than 0.04 s.
    """
    at_least(1, count=count, length=length)
    at_least(0.04, seconds=seconds)
    rng, names = generator(seed), list(VOWELS)
    chosen, pitch = torch.randint(len(names), (count, length), generator=rng), uniform(rng, 90, 220, count)
    t = torch.arange(round(seconds * RATE)) / RATE
    fade = 0.5 * (torch.minimum(t, t.flip(0)) / 0.02).clamp(max=1)  # up and down within 20 ms
    waves = [
        torch.cat([fade * vowel(names[k], float(f), seconds) for k in row])
        for row, f in zip(chosen, pitch, strict=True)
    ]
    return Utterances(torch.stack(waves), chosen, pitch)


def spectrogram(wave: Float[Tensor, "*b t"], window: int = 256, hop: int = 64) -> Float[Tensor, "*b frames bins"]:
    """Power |STFT|^2 under a Hann window, without padding: 1 + (t - window) // hop frames, window // 2 + 1 bins.

    Bin k is the frequency k RATE / window. Raises ValueError when the wave is shorter than the window.
    """
    at_least(1, hop=hop)
    if not 2 <= window <= wave.shape[-1]:
        raise ValueError(f"window must be between 2 and the {wave.shape[-1]} samples of the wave, got {window}")
    frames = wave.unfold(-1, window, hop) * torch.hann_window(window, dtype=wave.dtype, device=wave.device)
    return torch.fft.rfft(frames).abs() ** 2
