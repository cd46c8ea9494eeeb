"""Decode, batch, classify, decide and move, overlapped.

In: settled `Photo`s. Out: `Outcome`s. Imports every package that a photo passes through; used by `service`.
"""
