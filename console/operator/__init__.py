"""The operator of custom resources: specs become API requests, the API's views become status.

May import the client and fabric.
"""
