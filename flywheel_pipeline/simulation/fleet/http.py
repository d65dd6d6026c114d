"""A simulated fleet over HTTP: each appliance posts to the agent API with its own token, as agents do.

Belongs here: tokens, posting, waiting when told to, the offline queue's retries. Does not belong here: the API.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from flywheel_pipeline.errors import FlywheelError, UsageError
from flywheel_pipeline.simulation.fleet.stream import Delivery

if TYPE_CHECKING:
    import httpx

PATH: Final = "/api/agent/executions"
#: An agent keeps a post in its offline queue for 60 minutes, and so does this.
OFFLINE_SECONDS: Final = 3600.0
_FIRST_WAIT_SECONDS: Final = 0.5
_LONGEST_WAIT_SECONDS: Final = 60.0
_TIMEOUT_SECONDS: Final = 30.0
#: Answers that a retry cannot change, for any post: the token, the address or this simulator is wrong.
_HOPELESS: Final = frozenset({401, 403, 404, 405})


def read_tokens(path: Path) -> dict[str, str]:
    """Read bearer tokens by appliance id from a JSON object {"<appliance id>": "<token>"}.

    Raises:
        UsageError: no such file, or not of this form. The message never repeats a token.
    """
    try:
        tokens = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"There is no token file {path}.") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as JSON.") from error
    good = isinstance(tokens, dict) and all(isinstance(k, str) and isinstance(v, str) for k, v in tokens.items())
    if not good:
        raise UsageError(f'{path} is no token file: {{"<appliance id>": "<token>", …}}.')
    return dict(tokens)


class Appliances:
    """The appliances of a fleet as HTTP clients. `answers` counts status codes, `retries` repeated attempts."""

    def __init__(
        self,
        url: str,
        tokens: dict[str, str],
        *,
        offline_seconds: float = OFFLINE_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Prepare to post to `url`, the root of the agent API; `sleep` waits, in seconds."""
        import httpx

        if not url.startswith(("http://", "https://")):
            raise UsageError(f"{url} is no HTTP address.", hint="Like http://127.0.0.1:8000")
        self._client: httpx.Client = httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_SECONDS)
        self._errors: type[Exception] = httpx.TransportError
        self._tokens = tokens
        self._offline_seconds = offline_seconds
        self._sleep = sleep
        self.answers: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.retries = 0

    def __enter__(self) -> Appliances:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def require_tokens(self, appliance_ids: Iterable[str]) -> None:
        """Refuse to begin where an appliance has no token.

        Raises:
            UsageError: naming the first one.
        """
        missing = sorted(set(appliance_ids) - self._tokens.keys())
        if missing:
            raise UsageError(
                f"{len(missing)} appliances have no token, first {missing[0]}.",
                hint="The token file holds one token for each appliance of fleet.json.",
            )

    def post(self, delivery: Delivery) -> int:
        """Post one delivery and return the status of the final answer: 2xx taken in, other 4xx refused with its reason.

        429 waits as long as Retry-After says; no answer and 5xx are retried with growing waits, as an agent's offline
        queue does.

        Raises:
            FlywheelError: the server could not be reached for an hour, or refuses every post of this appliance.
        """
        headers = {
            "Authorization": f"Bearer {self._tokens[delivery.appliance_id]}",
            "Content-Type": "application/json",
        }
        waited, wait = 0.0, _FIRST_WAIT_SECONDS
        while True:
            pause, why = wait, ""
            try:
                answer = self._client.post(PATH, content=delivery.body, headers=headers)
            except self._errors as error:
                why = type(error).__name__
            else:
                status = answer.status_code
                if status in _HOPELESS:
                    raise FlywheelError(
                        f"The server answers {status} to {delivery.appliance_id}: no retry will change that.",
                        hint="Is the address the agent API's, and the token this appliance's?",
                    )
                if status == 429:
                    pause, why = _retry_after(answer.headers.get("Retry-After"), wait), "429"
                elif status >= 500:
                    why = str(status)
                else:
                    self.answers[status] += 1
                    self.outcomes[_outcome(answer)] += 1
                    return status
            if waited + pause > self._offline_seconds:
                raise FlywheelError(
                    f"{delivery.execution_id} could not be delivered within {self._offline_seconds / 60:.0f} minutes; last: {why}."
                )
            self.retries += 1
            self._sleep(pause)
            waited += pause
            wait = min(wait * 2, _LONGEST_WAIT_SECONDS)


def _retry_after(value: str | None, otherwise: float) -> float:
    """Return the seconds that a Retry-After header names; `otherwise` where it names none."""
    try:
        seconds = float(value or "")
    except ValueError:
        return otherwise
    return max(seconds, 0.0) if seconds == seconds else otherwise


def _outcome(answer: httpx.Response) -> str:
    """Return the word in which the API says what became of a post; its status where it says none."""
    try:
        body: Any = answer.json()
    except ValueError:
        return str(answer.status_code)
    said = (body.get("outcome") or body.get("reason_code")) if isinstance(body, dict) else None
    return str(said) if said else str(answer.status_code)
