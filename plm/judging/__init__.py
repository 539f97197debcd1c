"""What texts that policies wrote are worth to whom."""
