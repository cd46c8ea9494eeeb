"""The loop around the pipeline, over a backlog or as a daemon, and what it reports to systemd, Prometheus and a hook.

In: an inbox and a running pipeline. Out: a log line and a count for each file. Imports everything that the pipeline
imports, and the inbox's watcher; used by `cli`. See README.md beside this file.
"""
