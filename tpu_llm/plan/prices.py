"""Dollars for an hour of one chip, by generation. Edit them to what you pay: `launch/plan.py` multiplies.

On demand, us regions, as cloud.google.com/tpu/pricing lists them. A generation that is not here has no price.
"""

PRICES = {
    'v4': 3.22,
    'v5e': 1.20,
    'v5p': 4.20,
    'v6e': 2.70,
}
