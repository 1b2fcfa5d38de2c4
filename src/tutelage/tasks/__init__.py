"""Procedural lab tasks with exact verifiers: small enough for students of 30k parameters."""

from collections.abc import Mapping

from tutelage.tasks.base import LAB_KEY, Item, LabTask, TaskConfig
from tutelage.tasks.codeout import CODEOUT
from tutelage.tasks.gridwalk import GRIDWALK
from tutelage.tasks.modchain import MODCHAIN

__all__ = ["LAB_KEY", "TASKS", "Item", "LabTask", "TaskConfig"]

TASKS: Mapping[str, LabTask] = {task.name: task for task in (GRIDWALK, MODCHAIN, CODEOUT)}
