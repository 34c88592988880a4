"""Each paper's equation in plain slow lines. The fast paths must agree with these."""
