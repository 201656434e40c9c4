"""Data that needs no download: real where it can be, with a known answer where a mechanism needs one.

One file a kind of data; everything is offered here. Images are float32 in [0, 1], token tensors int64. Every generator
takes a `seed`, leaves the global random state alone and returns the same tensors for the same seed.
"""

# ruff: noqa: F403  each module lists its public names in __all__
from tfkit.data.graphs import *
from tfkit.data.images import *
from tfkit.data.restoration import *
from tfkit.data.scenes import *
from tfkit.data.series import *
from tfkit.data.shapes import *
from tfkit.data.sound import *
from tfkit.data.tasks import *
from tfkit.data.text import *
from tfkit.data.tokens import *
from tfkit.data.video import *
