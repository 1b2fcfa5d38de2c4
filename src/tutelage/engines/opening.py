"""From a recipe's `[engines.*]` table to an engine at work."""

import contextlib
import importlib
from collections.abc import Iterator, Mapping

from tutelage.core.artifact import Artifact, Site
from tutelage.core.errors import EngineError
from tutelage.engines.base import Engine
from tutelage.recipe.engines import HERE, EngineTable


@contextlib.contextmanager
def opened(role: str, inputs: Mapping[str, Artifact], site: Site) -> Iterator[Engine]:
    """The engine of the model in `role`, as the recipe says, for the time of the block.

    Raises EngineError when the engine is not installed or its server does not answer, ModelError
    when the model cannot be loaded.
    """
    table = site.engines.get(role, HERE)
    engine = _module(table).open_engine(inputs[role], table, device=site.device)
    try:
        yield engine
    finally:
        engine.close()


def _module(table: EngineTable):  # noqa: ANN202 - a module with `open_engine`
    try:
        return importlib.import_module(f"tutelage.engines.{table.kind}")
    except ModuleNotFoundError as error:
        if not table.extra or (error.name or "").startswith("tutelage"):
            raise
        raise EngineError(
            f"the engine {table.kind!r} needs {error.name}, which is not installed: "
            f"pip install 'tutelage[{table.extra}]'"
        ) from None
