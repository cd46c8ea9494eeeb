"""Decode, batch, classify, decide and move, overlapped.

In: settled `Photo`s. Out: one `Outcome` for each. Imports every package that a photo passes through after
the inbox; used by `service`.

Data flows one way. Stages hand on frozen dataclasses through queues, and none waits for an answer from a later one.
Some are given a callback for that, which does nothing but pass the data on: the decoders' `deliver` (into the batcher)
and `fail` (the error that ends the pipeline), the mover's `tell` (into the outcomes), and `on_moved` and `measures` for
those who want to know without being a stage. See README.md beside this file.
"""
