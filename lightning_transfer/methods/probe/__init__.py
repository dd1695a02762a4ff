"""LP-FT (arXiv 2202.10054, ICLR 2022): start a new head as the linear probe of the pretrained features."""
