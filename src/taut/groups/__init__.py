"""What must be cut together in a network, read off its exported graph, and the cut itself."""

from taut.groups.cut import Cut, cut
from taut.groups.find import Cuts, Group, Groups, Member, Whole

__all__ = ["Cut", "Cuts", "Group", "Groups", "Member", "Whole", "cut"]
