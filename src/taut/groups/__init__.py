"""What must be cut together in a network, read off its exported graph, and the cut itself."""

from taut.groups.cut import cut
from taut.groups.find import Cuts, Group, Groups, Member, Whole
from taut.groups.reading import Reader, readers
from taut.groups.rewrite import AsGraph, cut_graph

__all__ = [
    "AsGraph", "Cuts", "Group", "Groups", "Member", "Reader", "Whole", "cut", "cut_graph",
    "readers",
]  # fmt: skip
