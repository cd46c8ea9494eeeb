"""Sort what is too much for one machine: object stores, many nodes.

`stores` (S3 in `s3`), `probe` and `object_mover` are the object store; `listing` and `shards` are a job's list of work
and its immutable files. boto3 and pyarrow come with the extra `cluster`, and nothing outside this package imports them.
"""
