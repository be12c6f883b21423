"""What must be cut together in a network, read off its exported graph, and the cut itself."""

from taut.groups.cut import cut
from taut.groups.find import Cuts, Group, Groups, Member, Whole

__all__ = ["Cuts", "Group", "Groups", "Member", "Whole", "cut"]
