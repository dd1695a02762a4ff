"""AdaFilter (arXiv 1911.09659, AAAI 2020): per image and per filter, the pretrained response or the tuned one."""
