"""Taut makes trained networks smaller and faster, and measures that it did.

model + task ──trace──▶ sites, work, what feeds what
             ──statistics──▶ sensitivities
   recipe ──apply──▶ the same nn.Module, trainable in compressed form
          ──recover──▶ trained again, distilled from the original
          ──pack──▶ packed layers ──▶ net.taut (one small, safe file)
          ──tune──▶ each layer packed or dense, whichever is faster here
          ──measure──▶ candidate ──plan, search──▶ frontier ──▶ report.html
          ──export──▶ a file for another engine, with the same answers
"""

from taut import data, techniques, zoo
from taut.compress import Result, apply, compress
from taut.errors import TautError
from taut.export import export
from taut.fastest import fastest
from taut.goal import Goal
from taut.measure import measure
from taut.pack import inspect, load, pack
from taut.recipe import Recipe
from taut.recover import Recover, recover
from taut.schedules import attach_schedules
from taut.search import compare, search
from taut.task import Task, load_task
from taut.trace import trace
from taut.tune import tune
from taut.watch import Watch

__all__ = [
    "Goal",
    "Recipe",
    "Recover",
    "Result",
    "Task",
    "TautError",
    "Watch",
    "apply",
    "attach_schedules",
    "compare",
    "compress",
    "data",
    "export",
    "fastest",
    "inspect",
    "load",
    "load_task",
    "measure",
    "pack",
    "recover",
    "search",
    "techniques",
    "trace",
    "tune",
    "zoo",
]
