"""What people ask for, as data: policies, plans, rules, windows, releases.

Pure: may import tensors.
"""
