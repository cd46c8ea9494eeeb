"""Files on disk to labelled photos in disjoint parts.

In: a folder, zip or CSV. Out: a `Dataset`, or a list of `Sample`s. Imports the sorter's decoder, and nothing of the
trainer.
"""
