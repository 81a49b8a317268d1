"""A model folder, or a hub repository, in; a `Model` out. What lies in the folder is checked, and never executed.

loading.py          `load`: the way through all of this
folder.py           which files must be there, and what lies there in their place
config_json.py      config.json and generation_config.json
checkpoint.py       safetensors files, by one table of names
quantized.py        matrices in fewer bits: rounded here, or packed in the checkpoint
tokenizer.py        text to token ids, and back
limits.py           how long libraries may take
added_tokens.py     special and other added tokens, from all files that tell of them
chat_template.py    a prompt to a conversation, in a process of its own (render_template.py)
progress.py         a progress bar, for what takes long
"""

from .folder import files_of
from .loading import DTYPES, Model, fetch, fetch_config, load
from .progress import Bar
from .tokenizer import END_OF_THINK, TextStream, Tokenizer, opening_of

__all__ = [
    "DTYPES",
    "END_OF_THINK",
    "Bar",
    "Model",
    "TextStream",
    "Tokenizer",
    "fetch",
    "fetch_config",
    "files_of",
    "load",
    "opening_of",
]
