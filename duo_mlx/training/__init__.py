"""Training of Duo models with MLX (Duo-LLM, arXiv 2410.10846, section "Training").

``stage`` says what a stage is; ``routing`` is stage 1, random routing, ``small`` trains the small FFNs of a grafted
model. ``trainer`` is the loop that knows no stage, ``run`` a whole run in its folder. Texts become token files in
``texts``, ``tokens`` and ``data``.
"""
