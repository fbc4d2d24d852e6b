"""Real fine-tuning: which quality a method reaches, and how surely one is better than another."""
