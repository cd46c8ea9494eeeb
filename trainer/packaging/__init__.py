"""From a fitted network to a measured model folder with its report. Imports `data` and `fitting`."""
