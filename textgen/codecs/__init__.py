"""What sequences are made of: text as tokens."""
