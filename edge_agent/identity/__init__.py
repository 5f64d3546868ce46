"""Who a node is and what it can do: credentials, capabilities, its cluster.

May import the configuration and fabric.
"""
