"""What ranks above 0 do: they wait for rank 0's pipeline, and join the steps that it trains.

Rank 0's word decides what is made; nobody else looks at the store for what is finished.
"""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tutelage import pipeline
from tutelage.core.artifact import Artifact, WorkDir
from tutelage.core.errors import ArtifactError, RecipeError
from tutelage.core.progress import Reporter
from tutelage.core.team import Team
from tutelage.models import source as models
from tutelage.recipe.load import Variant
from tutelage.store import Store


def follow(variants: Sequence[Variant], store: Store, *, until: str, team: Team) -> None:
    """Join every step that rank 0 trains, until it has no more.

    Raises what `pipeline.run` does; ArtifactError and RecipeError where this process sees another
    store or recipe than rank 0.
    """
    planned: Mapping[str, pipeline.Planned] = {}
    while word := team.hear():
        planned = planned or {p.node.name: p for p in pipeline.plan(variants, store, until=until)}
        name, fingerprint = json.loads(word)
        if name not in planned or planned[name].fingerprint != fingerprint:
            raise RecipeError(
                f"process {team.rank} has another step {name!r} than process 0; give all processes "
                "the same recipe, code, models and store"
            )
        _join(planned, name, variants, store, team)


def _join(
    planned: Mapping[str, pipeline.Planned], name: str, variants: Sequence[Variant], store: Store,
    team: Team,
) -> None:  # fmt: skip
    node, runtime = planned[name].node, variants[0].recipe.runtime
    inputs = {role: _input(planned[each], store, team) for role, each in node.inputs.items()}
    with tempfile.TemporaryDirectory(prefix="tutelage-") as folder:
        work = WorkDir.open(
            Path(folder), reporter=Reporter(quiet=True), device=runtime.device, team=team,
            engines=node.engines,
        )  # fmt: skip
        pipeline.take_part(node, inputs, work)


def _input(planned: pipeline.Planned, store: Store, team: Team) -> Artifact:
    node = planned.node
    if node.source:
        return models.locate(node.source, memo=store.memo).as_artifact(planned.identity)
    artifact = store.find(node.stage, planned.fingerprint)
    if artifact is None:
        raise ArtifactError(
            f"process {team.rank} does not find the result of {node.name!r} in {store.root}; all "
            "machines of a run need one store, under the same path"
        )
    return artifact
