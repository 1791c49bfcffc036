"""Claims of replicas on a Ray cluster: one small named actor decides on them.

It outlives the application, so that two versions of it, one starting while the other ends, share their claims. Ray
starts it again where its node is gone; replicas then tell it what they hold.
"""

import hashlib
from collections.abc import Collection
from typing import Any

import ray

from transformerfam.serving.claims import LeasedClaims
from transformerfam.serving.leases import LEASE_SECONDS, LeaseTable
from transformerfam.serving.store import Store

NAMESPACE = "transformerfam"
ANSWER_SECONDS = 10.0
"""How long the actor is waited for."""
START_SECONDS = 300.0
"""How long a replica that starts waits for it."""


class RayTable:
    """A `LeaseTable` in an actor that every replica with the same store reaches.

    Args:
        store: address of the store.
        lease_seconds: after which a replica that says nothing holds nothing.
    """

    def __init__(self, store: str, lease_seconds: float = LEASE_SECONDS) -> None:
        options: dict[str, Any] = {
            "name": f"claims-{hashlib.sha256(store.encode()).hexdigest()[:16]}",
            "namespace": NAMESPACE,
            "get_if_exists": True,
            "lifetime": "detached",
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 3,
        }
        self._actor = ray.remote(LeaseTable).options(**options).remote(lease_seconds)

    def wait(self) -> None:
        """Wait until the actor answers.

        Raises:
            Exception: it does not, within `START_SECONDS`.
        """
        ray.get(self._actor.confirm.remote("", ""), timeout=START_SECONDS)

    def take(self, holder: str, name: str) -> bool:
        """Give a claim to a holder; see `LeaseTable`."""
        return bool(self._answer(self._actor.take.remote(holder, name)))

    def free(self, holder: str, name: str) -> None:
        """Take a claim from its holder, without waiting for it."""
        self._actor.free.remote(holder, name)

    def confirm(self, holder: str, name: str) -> bool:
        """Return whether a holder has a claim; see `LeaseTable`."""
        return bool(self._answer(self._actor.confirm.remote(holder, name)))

    def beat(self, holder: str, names: Collection[str]) -> None:
        """Note that a holder is there; see `LeaseTable`."""
        self._answer(self._actor.beat.remote(holder, list(names)))

    def leave(self, holder: str) -> None:
        """Forget a holder and its claims."""
        self._answer(self._actor.leave.remote(holder))

    def _answer(self, reference: Any) -> Any:
        return ray.get(reference, timeout=ANSWER_SECONDS)


def ray_claims(store: Store) -> LeasedClaims:
    """Return the claims of a replica in its store."""
    table = RayTable(store.url)
    table.wait()
    return LeasedClaims(table)
