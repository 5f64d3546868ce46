"""The model registry: releases of each model, in order.

Pure: may import commands and fabric.
"""
