"""A reference LLM on top of exec-core: Llama-family GGUF files in plain torch, the same code on CUDA and on CPU.

    generate.py ── engine ── exec_core.Executor ══ worker (one per rank) ── model ── kv_cache
        │            │                                      │                  └──── collectives
    tokenizer    requests, steps                        checkpoint (this rank's slice of the file)

The driver's side (``gguf_file``, ``hparams``, ``tokenizer``, ``engine``, ``steps``) does not import torch.
"""
