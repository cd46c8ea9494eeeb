"""A fitted network to a model folder: quantised, calibrated, measured, with a report.

In: a torch network and a `Dataset`. Out: a folder that `sorter run --model` takes. Imports `fitting`, `data` and
`progress`.
"""
