"""Trigger rules: which signal fires which rule.

Pure: may import commands, conditions and fabric.
"""
