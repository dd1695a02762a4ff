"""Train with the pretrained statistics of BatchNorm, as the authors of LP-FT do (arXiv 2202.10054, ICLR 2022)."""
