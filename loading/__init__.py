"""What stands behind weights.py: files, the hub, configs, layouts, prompts.

files.py    read and write files: whole or not at all, errors a person can mend
hub.py      find a model in the Hugging Face cache, or download it
configs.py  check a config.json: what it asks for and we do not implement is an error; settings.json has the lists
parts.py    one network: what its file calls the tensors, and reading them, strictly
ldm.py      names of tensors in the original one-file layout, both ways
tokens.py   read a tokenizer's folder
prompts.py  templates and anchor words of a preset, names in all their spellings, the data of a training
cache.py    contexts of anchor prompts, encoded once for all targets
"""
