"""How long tests wait for what must happen. A limit is there against hanging only: machines may be
slow, and no test says anything of speed."""

import time
from collections.abc import Callable

PATIENCE = 300  # seconds


def wait_for(condition: Callable[[], object]) -> None:
    """Returns when the condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.02)
