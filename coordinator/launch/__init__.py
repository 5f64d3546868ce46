"""Starting aggregators: as local processes or as Kubernetes Jobs.

May import commands and fabric.
"""
