"""Where runs are executed: in one process, on several hosts, or in a cluster.

Belongs here: the choice of launcher and executor, the Celery application and its launcher, and the parts of a deployment
as processes of their own. Does not belong here: what a run does, and the files of a deployment (`deploy/`). All of it is
Dagster's own machinery, configured; nothing here hands out work.
"""
