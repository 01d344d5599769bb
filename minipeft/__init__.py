"""minipeft: parameter-efficient fine-tuning of a small BERT, written to be read.

    from minipeft import load_bert, add_lora, Classifier, merge_lora

    encoder = load_bert("weights/all-MiniLM-L6-v2")  # a folder of Hugging Face files -> a plain nn.Module
    add_lora(encoder, rank=8, alpha=16)              # or freeze, train_biases, add_adapters: one technique
    model = Classifier(encoder, classes=2)           # encoder + pooling + head; the head is made last
    ...                                              # train every parameter that requires a gradient
    merge_lora(model)                                # plain linear layers again

What can be imported from here, and the file that holds it, in reading order:

    bert      Bert, BertConfig, load_bert, load_pooler
    head      Classifier, Head, pool, freeze, train_biases
    adapter   Adapter, AdapterLinear, add_adapters, remove_adapters, adapter_state, load_adapters
    lora      LoRALinear, add_lora, merge_lora, remove_lora, lora_state, load_lora
    data      load_tokenizer, tokenize, pad
    model     predict
    tools.checkpoint  open_run
    tools.export      export, save_bert
    tools.files       UserError

The functions of head.py, adapter.py and lora.py change any nn.Module in place; each of the three files works alone.
micro.py has all of it in 200 lines and imports nothing from here: read it first.
On the command line:

    python train.py lora --help       train one technique; the result is a run folder
    python compare.py --help          train several, and compare them
    python -m minipeft --help         use a run (predict, evaluate, export), or explain a technique
"""
_HOLDS = {  # the docstring above has the same table
    "bert": ("Bert", "BertConfig", "load_bert", "load_pooler"),
    "head": ("Classifier", "Head", "pool", "freeze", "train_biases"),
    "adapter": ("Adapter", "AdapterLinear", "add_adapters", "remove_adapters", "adapter_state", "load_adapters"),
    "lora": ("LoRALinear", "add_lora", "merge_lora", "remove_lora", "lora_state", "load_lora"),
    "data": ("load_tokenizer", "tokenize", "pad"),
    "model": ("predict",),
    "tools.checkpoint": ("open_run",),
    "tools.export": ("export", "save_bert"),
    "tools.files": ("UserError",),
}


def __getattr__(name):  # PEP 562: torch is imported when a name is asked for, so `train.py --help` is instant
    from importlib import import_module
    for file, names in _HOLDS.items():
        if name in names:
            return getattr(import_module("." + file, __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
