"""Bad arguments raise a ValueError that names the value."""

import pytest
import torch  # noqa: F401  the calls below use it

from tfkit import data as D  # noqa: F401


@pytest.mark.parametrize("call, value", [
    ("digits(test=1.5)", "1.5"), ("digits(test=0.0)", "0"), ("photograph('dog')", "dog"), ("series('rain')", "rain"),
    ("text('latin')", "latin"), ("corpus(validation=2.0)", "2"), ("copy(0, 3)", "0"), ("reverse(2, -1)", "-1"),
    ("sort(2, 3, symbols=1)", "1"), ("parity(-2, 3)", "-2"), ("modular_addition(1)", "1"), ("induction(3, 0)", "0"),
    ("associative_recall(3, 17)", "17"), ("associative_recall(0, 3)", "0"), ("listops(3, length=3)", "3"),
    ("listops(0)", "0"), ("translation(0)", "0"), ("windows(torch.arange(4), 4, 2)", "4"),
    ("picture('dog')", "dog"), ("photograph('cat', 0, 5)", "0"), ("crops(1005)", "1005"), ("crops(0)", "0"),
    ("crops(size=48)", "48"), ("faces(test=1.0)", "1.0"), ("faces(0)", "0"), ("colored_digits(contrast=1.5)", "1.5"),
    ("patches(0)", "0"), ("patches(3, part='all')", "all"), ("patches(3, names=['dog'])", "dog"),
    ("patches(3, names=[])", ""), ("patches(3, names=['microaneurysms'])", "102"), ("patches(3, size=5)", "5"),
    ("color_jitter(torch.rand(1, 3, 2, 2), strength=-1)", "-1"), ("windows(torch.arange(9), 4, 0)", "0"),
    ("gaussian_kernel(4)", "4"), ("gaussian_kernel(5, 0.0)", "0.0"), ("motion_kernel(0)", "0"),
    ("blur(torch.rand(1, 1, 4, 4), torch.rand(9, 9))", "9"), ("holes(3, 8, missing=1.5)", "1.5"),
    ("holes(3, 8, pieces=0)", "0"), ("restoration('fog')", "fog"), ("restoration('blur', strength=0.0)", "0.0"),
    ("restoration('small', strength=2.5)", "5"), ("scenes(0)", "0"), ("scenes(3, size=8)", "8"),
    ("scenes(3, objects=21)", "21"), ("scenes(3, part='all')", "all"), ("stereo(0)", "0"), ("two_views(3, 7)", "7"),
    ("two_views(3, turn=2.0)", "2.0"), ("two_views(3, noise=-1)", "-1"), ("heights('moon')", "moon"),
    ("moving_digits(3, size=9, speed=3)", "9"), ("moving_digits(0)", "0"), ("moving_digits(3, digits=0)", "0"),
    ("pan(3, frames=60)", "209"), ("pan(3, part='all')", "all"), ("pan(3, speed=-1)", "-1"),
    ("Solid('cone', (1.0, 2.0))", "cone"), ("Solid('sphere', (1.0, 2.0))", "1"),
    ("Solid('box', (1.0, 2.0, -3.0))", "-3"),
    ("Solid('torus', (0.2, 0.5))", "0.5"), ("Solid('sphere', (1.0,)).mesh(3)", "3"), ("clouds(0)", "0"),
    ("Solid('sphere', (1.0,)).sample(0)", "0"), ("clouds(3, noise=-0.5)", "-0.5"), ("graph('web')", "web"),
    ("communities(3, inside=1.5)", "1.5"), ("communities(3, nodes=2, groups=3)", "2"), ("triangles(0)", "0"),
    ("triangles(3, chance=-0.5)", "-0.5"), ("cycle_pair(2)", "2"), ("skip_links(11, (1,))", "1"),
    ("skip_links(10, (5,))", "5"), ("note(10.0)", "10.0"), ("note(220.0, 0.0)", "0.0"),
    ("note(220.0, 0.1, 'drum')", "drum"),
    ("vowel('o')", "o"), ("vowel('a', 5000.0)", "5000.0"), ("utterances(0)", "0"),
    ("utterances(3, seconds=0.01)", "0.01"),
    ("spectrogram(torch.rand(100), 256)", "256"), ("spectrogram(torch.rand(500), hop=0)", "0"),
    ("forecast(torch.rand(50, 1), 0, 3)", "0"), ("forecast(torch.rand(50), 5, 3)", "50"),
    ("forecast(torch.full((50, 1), torch.nan), 5, 3)", "50"), ("forecast(torch.rand(50, 1), 5, 3, (0.9, 0.1))", "0.9"),
    ("forecast(torch.rand(50, 1), 40, 3)", "40"), ("forecast(torch.rand(50, 1), 5, 20)", "20"),
    ("events(3, jump=1.0, decay=1.0)", "1.0"), ("events(3, base=0.0)", "0.0"), ("events(0)", "0"),
    ("names('rivers')", "rivers"), ("names('days', ['xx'])", "xx"), ("dates(0)", "0"), ("dates(3, ['xx'])", "xx"),
])  # fmt: skip
def test_errors_name_the_value(call, value):
    with pytest.raises(ValueError, match=rf"(?<![\d]){value}\b"):
        result = eval(f"D.{call}")
        next(result)
