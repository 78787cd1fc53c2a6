"""Training of the demonstration models: text, tokenizer, decoder, training, evaluation, export to GGUF.

Needs `pip install -e ".[train]"`; nothing of VAI imports it. The steps, in order, are the modules' own commands:
`python -m train.corpus`, `train.tokenizer`, `train.train`, `train.evaluate`, `train.export`; `pytest train` tries all.
"""
