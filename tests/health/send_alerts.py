"""A sender as a process of its own, to be killed: drains the outbox of FLYWHEEL_DATABASE_URL until nothing waits.

Its clock runs FLYWHEEL_TEST_HASTE times as fast, so that claims of killed senders run out within the test.
"""

import datetime as dt
import os
import time

from flywheel_pipeline.database.engine import open_engine
from flywheel_pipeline.health.alerting.channels import get_alerting
from flywheel_pipeline.health.alerting.outbox import drain

HASTE = float(os.environ.get("FLYWHEEL_TEST_HASTE", "1"))


def clock() -> dt.datetime:
    """Return a time that runs faster than the wall's, the same in every process."""
    epoch = float(os.environ["FLYWHEEL_TEST_EPOCH"])
    return dt.datetime.fromtimestamp(epoch + (time.time() - epoch) * HASTE, dt.UTC)


if __name__ == "__main__":
    engine = open_engine(os.environ["FLYWHEEL_DATABASE_URL"])
    while drain(engine, get_alerting(), clock=clock).waiting:
        time.sleep(0.1)
