"""The pretraining objectives; `union.py` lists them."""
