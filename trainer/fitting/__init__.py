"""From labelled photos to a fitted network: features, recipes, the training loop, checkpoints. Imports `data`."""
