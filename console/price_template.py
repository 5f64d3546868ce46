"""A price book to begin with. The prices are examples."""

TEMPLATE = """\
# Prices of one unit. Of several that fit, the narrowest holds: region, pool, phase; since and until are days in UTC.
currency: EUR
prices:
  - {meter: cpu, price: 0.04, per: hour}
  - {meter: memory, price: 0.005, per: GB-hour}
  - {meter: gpu, price: 2.50, per: hour}
  - {meter: wan_down, price: 0.09, per: GB}
  - {meter: wan_up, price: 0.00, per: GB}
  - {meter: stored, price: 0.10, per: GB-month}
  - {meter: inferences, price: 0.00, per: million}
# - {meter: gpu, pool: aggregators, price: 0.90, list_price: 2.50, per: hour, since: 2026-11-01}   # spot machines
"""
