"""Daily demand of categories: counts, forecasts that add up, and categories that break out of their forecast."""

# The columns of the accuracy by level, as a page and the terminal show them.
ACCURACY = {
    "level": "level",
    "series": "series",
    "mase": "MASE",
    "mase_seasonal_naive": "MASE, seasonal naive",
    "inside_80": "inside 80 %",
    "inside_95": "inside 95 %",
}
