"""Names of SCAFFOLD's array records on the wire (https://arxiv.org/abs/1910.06378)."""

CONTROL = "scaffold-control"
"""On the way down: the server's control variate."""
CHANGE = "scaffold-change"
"""On the way up: how the node's control variate has changed."""
