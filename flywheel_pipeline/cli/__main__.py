"""`python -m flywheel_pipeline.cli`: the command where its console script is not on the path."""

from flywheel_pipeline.cli.app import main

main()
