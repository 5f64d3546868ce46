"""Roll-outs and their waves: state machines, gates and planning.

Pure: may import commands, conditions, fabric and the domains fleet and models.
"""
