"""Who may take part: join tokens, keys, certificates, and what each sender may report.

Pure: may import commands and fabric.
"""
