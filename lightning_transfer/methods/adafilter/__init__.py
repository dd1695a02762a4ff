"""AdaFilter (arXiv 1911.09659, AAAI 2020): choose the pretrained or the tuned response, per image and filter."""
