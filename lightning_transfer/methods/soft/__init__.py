"""Soft fine-tuning (arXiv 1909.02236, 2019): keep the source loss and remove it softly."""
