"""Sound: pitch and formants measured back from the wave."""

import pytest
import torch

from tfkit import data as D


def fundamental(wave):
    """The first lag at which the autocorrelation is nearly as high as anywhere after its first fall, in Hz."""
    n = len(wave)
    power = torch.fft.rfft(wave, 2 * n).abs() ** 2
    lag = torch.fft.irfft(power)[: n // 2] / (n - torch.arange(n // 2))
    start = int((lag < 0).nonzero()[0])
    high = lag[1:-1] > 0.9 * lag[start:].max()
    best = next(i for i in range(start, n // 2) if high[i - 1] and lag[i - 1] < lag[i] >= lag[i + 1])
    a, b, c = lag[best - 1 : best + 2].tolist()
    return D.RATE / (best + (a - c) / (2 * (a - 2 * b + c)))


@pytest.mark.parametrize("instrument", D.INSTRUMENTS)
@pytest.mark.parametrize("pitch", [110.0, 220.0, 313.0])
def test_a_note_has_its_pitch(instrument, pitch):
    wave = D.note(pitch, 0.5, instrument)
    assert wave.shape == (4000,) and wave.abs().max() <= 1 and wave.abs().max() > 0.5
    assert fundamental(wave) == pytest.approx(pitch, rel=0.01)


def test_instruments_differ_in_their_harmonics():
    power = {name: D.spectrogram(D.note(250.0, 0.3, name), 1024, 1024)[0] for name in D.INSTRUMENTS}
    at = lambda name, k: float(power[name][k * 32 - 1 : k * 32 + 2].sum())  # 250 Hz is bin 32 of 1024
    assert at("clarinet", 2) < 1e-4 * at("clarinet", 3)  # odd harmonics only
    assert at("flute", 2) / at("flute", 1) == pytest.approx(2**-6, rel=0.05)  # amplitude k^-3
    assert at("string", 2) / at("string", 1) == pytest.approx(2**-2, rel=0.05)
    string = D.note(250.0, 0.5, "string")
    assert string[-400:].abs().max() < 0.2 * string[:400].abs().max()


def test_a_glide_follows_its_curve():
    curve = torch.linspace(200, 400, 4000)
    wave = D.note(curve, 0.5, "flute")
    assert fundamental(wave[:800]) == pytest.approx(float(curve[400]), rel=0.03)
    assert fundamental(wave[-800:]) == pytest.approx(float(curve[3600]), rel=0.03)


@pytest.mark.parametrize("name", D.VOWELS)
def test_a_vowel_has_its_formants(name):
    """With a voice of 50 Hz the harmonics trace the envelope: without the fall 1 / k, its peaks are there."""
    power = D.spectrogram(D.vowel(name, 50.0, 0.32), 2560, 2560)[0]  # 3.125 Hz a bin, harmonics every 16
    k = torch.arange(1, 78)
    level = (power[k * 16] ** 0.5 * k).log()
    peaks = [50 * int(i + 1) for i in range(1, 76) if level[i] > level[i - 1] and level[i] > level[i + 1]]
    for formant in D.VOWELS[name]:
        assert min(abs(formant - p) for p in peaks) <= 50, (formant, peaks)


def test_utterances():
    u = D.utterances(6, length=3, seconds=0.1)
    assert u.waves.shape == (6, 2400) and u.vowels.shape == (6, 3) and u.vowels.max() < len(D.VOWELS)
    assert u.waves.abs().max() <= 0.5 and u.pitch.min() >= 90 and u.pitch.max() <= 220
    assert torch.equal(u.waves, D.utterances(6, 3, 0.1).waves)
    assert not torch.equal(u.waves, D.utterances(6, 3, 0.1, seed=1).waves)
    for b in range(6):
        names = list(D.VOWELS)
        middle = 0.5 * D.vowel(names[int(u.vowels[b, 1])], float(u.pitch[b]), 0.1)
        assert torch.allclose(u.waves[b, 1000:1400], middle[200:600])  # between the fades it is the vowel itself
    assert u.waves[:, 800].abs().max() < 1e-6  # faded out


def test_spectrogram_against_the_definition():
    wave = torch.randn(2, 1000, dtype=torch.float64)
    found = D.spectrogram(wave, window=128, hop=50)
    assert found.shape == (2, 1 + (1000 - 128) // 50, 65)
    stft = torch.stft(
        wave, 128, 50, window=torch.hann_window(128, dtype=torch.float64), center=False, return_complex=True
    )
    assert torch.allclose(found, (stft.abs() ** 2).mT)
    tone = torch.sin(2 * torch.pi * 1000 * torch.arange(4000) / D.RATE)
    assert D.spectrogram(tone).mean(0).argmax() == 32  # 1000 Hz is bin 32 of 256
