"""Selective joint fine-tuning (arXiv 1702.08690, CVPR 2017): borrow the source images that look like the target's."""
