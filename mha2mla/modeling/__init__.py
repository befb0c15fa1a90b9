"""What a converted model is. The other files of this folder travel inside every checkpoint.

They import transformers, torch and each other (by relative import, from this folder only), so that
`trust_remote_code=True` can load a checkpoint where `mha2mla` is not installed.
"""
