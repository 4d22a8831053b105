"""Laws are checked on busy machines: how long an example takes says nothing about the code."""

from hypothesis import settings

settings.register_profile("busy", deadline=None)
settings.load_profile("busy")
