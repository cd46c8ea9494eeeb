"""Sorts the photos in a folder into cats and dogs."""

__version__ = "0.1.0"
