"""From a dataset on disk to disjoint parts of labelled photos. Imports nothing else of the trainer but `files`."""
