"""The loop around the pipeline, once over a backlog or as a daemon, and what it tells systemd, Prometheus and a hook.

In: an inbox and a pipeline. Out: a log line and a count for each photo. Used by `cli`.
"""
