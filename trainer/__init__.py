"""Makes the model folders that the sorter runs.

In: labelled photos. Out: a model folder with a report. Each layer imports only those below it, and of the sorter only
what decodes and classifies photos, and reads verdicts from the history:

    cli           commands
    learn         a model folder and verdicts to a better model folder
    build         one fit from dataset to model folder
    packaging     a fitted network to a measured model folder
    fitting       photos to a fitted network
    data          files on disk to labelled, divided photos
    progress      what is shown while all this runs
"""
