"""Search to a budget: candidates toward a goal, by Optuna, on one process or many.

space      what may be tried: read from the techniques' options
outlook    what a recipe is predicted to come to, so that the hopeless is never trained
samplers   who proposes the next recipe
halving    tournaments: many train a little, the better ones train on
jobs       one recipe to try, wherever
pools      in this process or in several; cluster: as Ray tasks; serve: a worker's side
timing     latencies that can be compared
study      what is remembered, and by whom it is being written
loop       propose, try, tell; compare: every technique alone
"""

from taut.search.compare import Compared, Comparison, compare
from taut.search.loop import search
from taut.search.result import SearchResult

__all__ = ["Compared", "Comparison", "SearchResult", "compare", "search"]
