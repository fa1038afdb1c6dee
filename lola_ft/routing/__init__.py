"""Which experts which languages use: profiles, their comparison, and the choice of experts to train."""
