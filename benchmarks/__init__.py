"""Measurements, and the assets they run on; not part of the installed package."""
