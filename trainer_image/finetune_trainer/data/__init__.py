"""Data for instruction and text training: files in, checked and masked token datasets out (see preparation.prepare)."""
