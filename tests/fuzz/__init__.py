"""What may be fed any bytes: targets, a corpus for each, and who runs them."""
