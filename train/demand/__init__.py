"""Daily demand of categories: counts, forecasts that add up, and categories that break out of their forecast."""
