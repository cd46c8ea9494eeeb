"""Labelled photos to a fitted network: features, recipes, the training loop, checkpoints.

In: options and a `Dataset`. Out: a torch network and what each epoch measured. Imports `data` and `progress`.
"""
