"""One algorithm a file; none knows another. ``table.py`` lists them."""
