"""Measurements behind `tutelage bench`."""
