"""fedtide: event-driven federated learning from cloud to edge.

The import root. Its packages are links to the directories beside this one; see docs/decisions/0018-one-import-root.md.
"""
