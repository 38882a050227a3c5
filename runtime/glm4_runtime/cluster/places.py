"""The nodes of a session's stages: a placement group of Ray."""

import contextlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from glm4_runtime.cluster.ray_module import require_ray
from glm4_runtime.errors import UnavailableError

# What a stage asks Ray for, so that Ray places the stage on a node that offers processors: nearly nothing, because
# stages share cores as replicas do.
_SHARE = 0.001
# How the names of our groups begin; Ray wants each name once.
_NAME = "glm4-stages"
# Seconds to find nodes for all stages.
_PLACING = 60.0


def stage_resource(number: int) -> str:
    """Ray's resource by which a node says that it has the files of a stage, counted from 1."""
    return f"stage-{number}"


class Places:
    """One place for each stage."""

    def __init__(self, count: int) -> None:
        """Reserve places: all on different nodes if there are enough, else spread as well as possible.

        If a node offers the resource ``stage-2``, the second stage runs on such a node.

        Raises:
            UnavailableError: no node has room.
        """
        ray = require_ray()
        offered = ray.cluster_resources()
        wanted = [
            {"CPU": _SHARE} | {name: _SHARE for name in (stage_resource(number),) if name in offered}
            for number in range(1, count + 1)
        ]
        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        strategy = "STRICT_SPREAD" if len(nodes) >= count else "SPREAD"
        self._group: Any = ray.util.placement_group(
            wanted, strategy=strategy, name=f"{_NAME}-{secrets.token_hex(8)}"
        )
        self._is_own = True
        if not self._group.wait(_PLACING):
            self.close()
            raise UnavailableError(
                f"Ray found no nodes for {count} stages within {_PLACING:g} s: each needs a node with processors, and "
                f"with the resource {stage_resource(1)}, {stage_resource(2)} ... if any node offers it"
            )

    @classmethod
    def of_this_actor(cls) -> "Places | None":
        """The places that were reserved for this actor and its stages. None: it is no such actor."""
        ray = require_ray()
        group = ray.util.get_current_placement_group()
        if group is None or not ray.util.placement_group_table(group)["name"].startswith(_NAME):
            return None
        found = cls.__new__(cls)
        found._group, found._is_own = group, False
        return found

    def of(self, number: int) -> Any:
        """The option ``scheduling_strategy`` of an actor on the node of a stage, counted from 0."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)

    def nodes(self) -> Sequence[str]:
        """The node of each stage."""
        table = require_ray().util.placement_group_table(self._group)
        found: Mapping[int, str] = table["bundles_to_node_id"]
        return [found[number] for number in sorted(found)]

    def close(self) -> None:
        """End whatever runs at places of our own."""
        if self._is_own:
            with contextlib.suppress(Exception):  # the whole cluster may be gone
                require_ray().util.remove_placement_group(self._group)
