"""Measurements of the package; see each script's top for what it measures and how to run it."""
