"""The fleet simulator: fleets of appliances with planted truth, from a scenario in YAML and a seed.

Belongs here: what a scenario may say (`scenario`), what its fleet reports and when (`stream`, `reports`), the truth
beside it (`truth`), the ways out (`sinks`, `database`, `http`), days stepped through the pipeline (`lab`), and the
score (`score`, `drawing`). Does not belong here: intake, gates, decisions; the simulator never looks at what the
pipeline concludes, except at the manifests, as an appliance does.
"""
