"""Who may say what: TUF metadata from a root that is kept offline, and signatures over what goes down to nodes.

May import messages, plans and what stands below them.
"""
